"""Names that are replaced while megatron-core is imported, so that the import takes a third of its time."""

import sys

from hylo_megatron.engine.cpu import without_cuda
from hylo_megatron.engine.patch import Patch, instead
from hylo_megatron.errors import HyLoError


def import_megatron() -> None:
    """Import the parts of megatron-core that are changed. Raises ``HyLoError`` when megatron does not import."""
    from hylo_megatron.engine.register import installed

    try:
        with installed("importing"):
            import megatron.core
            import megatron.core.ssm.gated_delta_net  # noqa: F401
    except ImportError as error:
        raise HyLoError(
            f"megatron-core does not import ({error}): it brings training and checkpoints; "
            "install with  pip install 'hylo-megatron[train]'  (Python 3.12)"
        ) from error


def no_compiler(original, run):
    """Return a ``torch.compile`` that leaves its function alone."""
    return lambda model=None, **_: model if model is not None else lambda function: function


def _hidden(name: str) -> Patch:
    """Hide a module of fla. Without CUDA all of fla is hidden; with CUDA what this product does not use."""
    return Patch(
        group="importing",
        target=f"sys:modules[{name}]",
        replacement=instead(None),
        why="all of fla is 480 modules, more than half of the seconds that a training takes to import; fla-core has no"
        " layers and models at all",
        package="flash-linear-attention",
        versions="==0.6.0",
        expects="missing",
        needed=lambda: name not in sys.modules and (name == "fla") == without_cuda(),
    )


PATCHES = (
    Patch(
        group="importing",
        target="torch:compile",
        replacement=no_compiler,
        why="megatron's jit_fuser compiles functions; with dynamo disabled that changes nothing, but imports Inductor",
        upstream="megatron/core/jit.py",
        package="torch",
        versions=">=2.11",
        expects="(model, fullgraph, dynamic, backend, mode, options, name, ... 11, f1a7a927)",
        needed=without_cuda,
    ),
    *(_hidden(name) for name in ("fla", "fla.layers", "fla.models")),
)
