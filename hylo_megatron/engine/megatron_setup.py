"""Makes megatron importable and right on this machine. Packages that use megatron import it first, in ``__init__``."""

import importlib.util
import logging
import warnings

from hylo_megatron.checkpoint import safe_pickles
from hylo_megatron.engine import cpu, distributed_optimizer, fla_kernels, mamba
from hylo_megatron.errors import HyLoError

warnings.filterwarnings("ignore", module=r"megatron\..*")
warnings.filterwarnings("ignore", message=r".*(transformer.engine|Apex|apex|barrier\(\)|nvidia_resiliency_ext).*")

logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found" at each import

cpu.install()
try:
    with cpu.without_compiler(), fla_kernels.imported_in_part():
        import megatron.core
        import megatron.core.ssm.gated_delta_net  # noqa: F401
except ImportError as error:
    raise HyLoError(
        f"megatron-core does not import ({error}): it brings training and checkpoints; "
        "install with  pip install 'hylo-megatron[train]'  (Python 3.12)"
    ) from error
safe_pickles.install()
if cpu.needed():
    cpu.install_after_import()
distributed_optimizer.install()
fla_kernels.install()
mamba.install()


def skip_compiling_helpers() -> None:
    """The wheel brings the dataset helpers compiled, and no Makefile: compiling them at start-up would fail."""
    import megatron.core.datasets.utils as dataset_utils

    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp"):
        dataset_utils.compile_helpers = lambda: None


skip_compiling_helpers()
