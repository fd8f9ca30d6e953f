"""Makes megatron importable and right on this machine. Packages that use megatron import this first, in ``__init__``."""

import warnings

from hylo_megatron.errors import HyLoError
from hylo_megatron.platform import cpu, distributed_optimizer, fla_kernels, mamba

warnings.filterwarnings("ignore", module=r"megatron\..*")
warnings.filterwarnings("ignore", message=r".*(transformer.engine|Apex|apex|barrier\(\)|nvidia_resiliency_ext).*")

cpu.install()
try:
    import megatron.core  # noqa: F401
except ImportError as error:
    raise HyLoError(
        f"megatron-core does not import ({error}): it brings training and checkpoints; "
        "install with  pip install 'hylo-megatron[train]'  (Python 3.12)"
    ) from error
if cpu.needed():
    cpu.install_after_import()
distributed_optimizer.install()
fla_kernels.install()
mamba.install()
