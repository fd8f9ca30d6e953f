"""megatron's Gated DeltaNet asks for fla when it is imported; where no GPU can run it, torch takes its place."""

import torch


def install() -> bool:
    """Returns whether the torch references were put in place (False where a CUDA device can run fla)."""
    import megatron.core.ssm.gated_delta_net.common as common
    import megatron.core.ssm.gated_delta_net.gdn as gdn

    if torch.cuda.device_count() > 0:
        return False
    from hylo_megatron.kernels import causal_conv1d, chunk_gated_delta_rule

    def convolve(x, weight, bias=None, activation=None, initial_state=None, output_final_state=False, **_):
        return causal_conv1d(x, weight, bias, activation)

    common.HAVE_FLA = True
    gdn.causal_conv1d = convolve
    gdn.chunk_gated_delta_rule = chunk_gated_delta_rule  # named at construction; layers/linear_blocks.py replaces it
    return True
