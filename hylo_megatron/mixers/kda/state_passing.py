"""Kimi Delta Attention over a sequence that ranks share: like the gated delta rule, whose transfer is a matrix too."""

from dataclasses import replace

from torch import Tensor

from hylo_megatron.kernels import Ops
from hylo_megatron.mixers.gdn.state_passing import chunk_gated_delta_rule


def chunk_kda(local: Ops, group, *inputs: Tensor, **kwargs) -> tuple[Tensor, None]:
    """Do as ``kernels.kda.chunk_kda`` does."""
    return chunk_gated_delta_rule(replace(local, chunk_gated_delta_rule=local.chunk_kda), group, *inputs, **kwargs)
