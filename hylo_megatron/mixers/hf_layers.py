"""Layers that the transformers modules of mixers share.

A mixer's ``LAYER(config, layer_number)`` is called with the normed input [B,S,D], the rotation, the positions that a
query sees (``hf/inputs.py:allowed``), the real tokens, and the ``HyLoCache`` of ``hf/cache.py``. Each may be None.
"""

import torch
from torch import nn
from transformers import PreTrainedConfig

from hylo_megatron import kernels
from hylo_megatron.config.positions import rotary_width
from hylo_megatron.kernels.rope import Angles, cos_and_sin, query_scale, rope_frequencies, scaled, turn


class HyLoRMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return kernels.rms_norm(x, self.weight, self.eps)


class HyLoGateNorm(HyLoRMSNorm):
    """RMSNorm of ``x``, times ``activation`` (``silu`` or ``sigmoid``) of ``gate``, in one kernel."""

    def __init__(self, size: int, eps: float, activation: str = "silu"):
        super().__init__(size, eps)
        self.activation = activation

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return kernels.ops_for(x).gated_rms_norm(x, gate, self.weight, self.eps, activation=self.activation)


class HyLoConv1d(nn.Conv1d):
    """Holds a depthwise convolution; calling it returns weight [C,W] and bias, which a kernel applies."""

    def __init__(self, channels: int, width: int, bias: bool):
        super().__init__(channels, channels, width, groups=channels, bias=bias)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.weight.squeeze(1), self.bias


def held(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return what a ``HyLoConv1d`` holds. The layer is called, so that hooks run that bring offloaded weights back.

    Raises ``ValueError`` where an adapter has taken the layer's place.
    """
    if not isinstance(layer, HyLoConv1d):
        name = HyLoConv1d.__name__
        raise ValueError(f"a {name} layer was replaced by {type(layer).__name__}: leave {name} layers out of adapters")
    return layer()


def is_plain_linear(layer: nn.Module) -> bool:
    """Return whether ``layer.weight`` is all of the layer: no adapter, quantised or sharded weight and no hook."""
    hooked = "forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks
    return type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and layer.bias is None and not hooked


class Rotation:
    """``Angles`` of positions [B,S], tensors [B,S,..]. Frequencies are computed once and never saved."""

    def __init__(self, config: PreTrainedConfig):
        self.config, self.frequencies = config, {}

    def __call__(self, positions_BS: torch.Tensor) -> Angles:
        config = self.config
        width = rotary_width(config.linear_type, config.geometry()) if config.linear_rope else 0
        scale = query_scale(positions_BS, config.log_scale) if config.log_scale else None
        return Angles(*self.of_mla(positions_BS), scale, *self.cos_and_sin(positions_BS, width))

    def of_mla(self, positions_BS: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return self.cos_and_sin(positions_BS, self.config.qk_rope_head_dim if self.config.mla_rope else 0)

    def cos_and_sin(self, positions_BS: torch.Tensor, width: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if not width:
            return None, None
        key, config = (positions_BS.device, width), self.config
        if key not in self.frequencies:
            frequencies, scaling = rope_frequencies(config.rope_parameters, width, config.max_position_embeddings)
            self.frequencies[key] = frequencies.to(positions_BS.device), scaling
        return cos_and_sin(positions_BS, *self.frequencies[key])


def rotate(x_BSHP: torch.Tensor, cos_BSp: torch.Tensor | None, sin_BSp: torch.Tensor | None) -> torch.Tensor:
    """Rotate the last dimension of ``x``; all heads of a position turn alike. Without angles ``x`` is returned."""
    return x_BSHP if cos_BSp is None else turn(x_BSHP, cos_BSp.unsqueeze(2), sin_BSp.unsqueeze(2))


def scale_queries(query_BSHK: torch.Tensor, scale_BS1: torch.Tensor | None) -> torch.Tensor:
    return query_BSHK if scale_BS1 is None else scaled(query_BSHK, scale_BS1.unsqueeze(2))


def real_tokens(real_BS: torch.Tensor | None) -> torch.Tensor | None:
    """Return [B,S,1], True at real tokens, or None where no position is padding."""
    return None if real_BS is None or real_BS.all() else real_BS.unsqueeze(-1)
