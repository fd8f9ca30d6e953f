"""megatron's Gated DeltaNet asks for fla when it is imported; where no GPU can run it, torch takes its place."""

import contextlib
import sys
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def imported_in_part() -> Iterator[None]:
    """Inside, megatron finds of fla what is used here: its kernels on a GPU, nothing without one.

    All of it is 480 modules and more than half of the seconds that a training takes to import everything. Where only
    fla-core is installed, its layers and models are missing too.
    """
    unused = ("fla.layers", "fla.models") if torch.cuda.device_count() else ("fla",)
    hidden = [name for name in unused if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def install() -> bool:
    """Returns whether the torch references were put in place (False where a CUDA device can run fla)."""
    import megatron.core.ssm.gated_delta_net.common as common
    import megatron.core.ssm.gated_delta_net.gdn as gdn

    if torch.cuda.device_count() > 0:
        return False
    from hylo_megatron.kernels import causal_conv1d, chunk_gated_delta_rule, l2norm

    def convolve(x, weight, bias=None, activation=None, initial_state=None, output_final_state=False, **_):
        return causal_conv1d(x, weight, bias, activation)

    common.HAVE_FLA, common.l2norm = True, l2norm
    gdn.causal_conv1d = convolve
    gdn.chunk_gated_delta_rule = chunk_gated_delta_rule  # named at construction; layers/linear_blocks.py replaces it
    return True
