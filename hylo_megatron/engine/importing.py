"""Names that are replaced while megatron-core is imported, and what it compiles at its start."""

import importlib.util
import sys

from hylo_megatron.engine.cpu import without_cuda
from hylo_megatron.engine.patch import Patch, entries, instead


def no_compiler(original, run):
    """Return a ``torch.compile`` that leaves its function alone."""
    return lambda model=None, **_: model if model is not None else lambda function: function


def _hidden(name: str) -> tuple[Patch, ...]:
    """Hide a module of fla. Without CUDA all of fla is hidden; with CUDA what this product does not use."""
    return entries(
        "importing", "flash-linear-attention",
        (f"sys:modules[{name}]", instead(None), "missing",
         "all of fla is 480 modules, more than half of the seconds that a training takes to import; fla-core has no"
         " layers and models at all"),
        needed=lambda: name not in sys.modules and (name == "fla") == without_cuda(),
    )  # fmt: skip


PATCHES = (
    *entries(
        "importing", "torch",
        ("torch:compile", no_compiler,
         "(model, fullgraph, dynamic, backend, mode, options, name, ... 11, f1a7a927)",
         "megatron's jit_fuser compiles functions. Our layers call none of them, but the training warms two up, which"
         " imports Inductor and compiles for seconds (megatron/core/jit.py)"),
    ),
    *(each for name in ("fla", "fla.layers", "fla.models") for each in _hidden(name)),
    *entries(
        "megatron", "megatron-core",
        ("megatron.core.datasets.utils:compile_helpers", instead(lambda: None), "()",
         "the wheel brings the helpers compiled, and no Makefile: compiling them at the start fails"
         " (megatron/core/datasets/utils.py)"),
        needed=lambda: importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None,
    ),
)  # fmt: skip
