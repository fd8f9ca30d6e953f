"""megatron's Gated DeltaNet without a GPU: the fla kernels it names become the torch references."""

import torch


def install() -> bool:
    """Returns whether the torch references were put in place (False where a CUDA device can run fla)."""
    import megatron.core.ssm.gated_delta_net.common as common
    import megatron.core.ssm.gated_delta_net.gdn as gdn

    if torch.cuda.device_count() > 0:
        return False
    from hylo_megatron.kernels.conv import causal_conv1d
    from hylo_megatron.kernels.gated_delta import chunk_gated_delta_rule
    from hylo_megatron.kernels.norm import l2norm

    def convolve(x, weight, bias=None, activation=None, initial_state=None, output_final_state=False, **_):
        return causal_conv1d(x, weight, bias, activation)

    common.HAVE_FLA = True
    common.l2norm = l2norm
    gdn.causal_conv1d = convolve
    gdn.chunk_gated_delta_rule = chunk_gated_delta_rule
    return True
