"""Layers that the transformers modules of mixers share.

A mixer's ``LAYER(config, layer_number)`` is called with the normed input [B,S,D], the rotation, the positions that a
query sees (``hf/inputs.py:allowed``), the real tokens, and the ``HyLoCache`` of ``hf/cache.py``. Each may be None.
"""

import torch
from torch import nn
from transformers import PreTrainedConfig

from hylo_megatron import kernels
from hylo_megatron.kernels.rope import Angles, cos_and_sin, query_scale, rope_frequencies, scaled, turn


class HyLoRMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return kernels.rms_norm(x, self.weight, self.eps)


class HyLoGateNorm(HyLoRMSNorm):
    """RMSNorm of ``x``, times SiLU of ``gate``, in one kernel."""

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return kernels.ops_for(x).gated_rms_norm(x, gate, self.weight, self.eps)


class HyLoKeyNorm(HyLoRMSNorm):
    """A norm whose weight is also applied in parts: called without ``x``, it returns the weight."""

    def forward(self, x: torch.Tensor | None = None) -> torch.Tensor:
        return self.weight if x is None else super().forward(x)


class HyLoConv1d(nn.Conv1d):
    """Holds a depthwise convolution; calling it returns weight [C,W] and bias, which a kernel applies."""

    def __init__(self, channels: int, width: int, bias: bool):
        super().__init__(channels, channels, width, groups=channels, bias=bias)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.weight.squeeze(1), self.bias


def held(layer: nn.Module, kind: type[HyLoKeyNorm | HyLoConv1d]):
    """Return what the layer holds. The layer is called, so that hooks run that bring offloaded weights back.

    Raises ``ValueError`` where an adapter has taken the layer's place.
    """
    if not isinstance(layer, kind):
        name = kind.__name__
        raise ValueError(f"a {name} layer was replaced by {type(layer).__name__}: leave {name} layers out of adapters")
    return layer()


def is_plain_linear(layer: nn.Module) -> bool:
    """Return whether ``layer.weight`` is all of the layer: no adapter, quantised or sharded weight and no hook."""
    hooked = "forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks
    return type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and layer.bias is None and not hooked


class KeepsFp32(nn.Module):
    """Base of linear mixers. Parameters in ``fp32_names`` stay fp32 in ``.to(bfloat16)``: rounding changes decays."""

    fp32_names: tuple[str, ...] = ()

    def initial_values(self) -> None:
        """Fill the parameters in ``fp32_names`` through ``transformers.initialization``, for a model that is new."""
        raise NotImplementedError

    def _apply(self, fn, recurse=True):
        kept = {id(getattr(self, name)) for name in self.fp32_names}

        def apply(tensor):
            moved = fn(tensor)
            if id(tensor) not in kept or moved.dtype == tensor.dtype:
                return moved
            return tensor.to(moved.device)

        return super()._apply(apply, recurse)


def fp32_parameter(size: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(size, dtype=torch.float32))


class Rotation:
    """``Angles`` of positions [B,S], tensors [B,S,P/2] and [B,S,1]. Frequencies are computed once and never saved."""

    def __init__(self, config: PreTrainedConfig):
        self.config, self.by_device = config, {}

    def __call__(self, positions_BS: torch.Tensor) -> Angles:
        log_scale = self.config.log_scale
        cos, sin = self._cos_and_sin(positions_BS) if self.config.mla_rope else (None, None)
        return Angles(cos, sin, query_scale(positions_BS, log_scale) if log_scale else None)

    def _cos_and_sin(self, positions_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        device, config = positions_BS.device, self.config
        if device not in self.by_device:
            frequencies, scaling = rope_frequencies(
                config.rope_parameters, config.qk_rope_head_dim, config.max_position_embeddings
            )
            self.by_device[device] = frequencies.to(device), scaling
        return cos_and_sin(positions_BS, *self.by_device[device])


def rotate(x_BSHP: torch.Tensor, cos_BSp: torch.Tensor | None, sin_BSp: torch.Tensor | None) -> torch.Tensor:
    """Rotate the last dimension of ``x``; all heads of a position turn alike. Without angles ``x`` is returned."""
    return x_BSHP if cos_BSp is None else turn(x_BSHP, cos_BSp.unsqueeze(2), sin_BSp.unsqueeze(2))


def scale_queries(query_BSHK: torch.Tensor, scale_BS1: torch.Tensor | None) -> torch.Tensor:
    return query_BSHK if scale_BS1 is None else scaled(query_BSHK, scale_BS1.unsqueeze(2))


def real_tokens(real_BS: torch.Tensor | None) -> torch.Tensor | None:
    """Return [B,S,1], True at real tokens, or None where no position is padding."""
    return None if real_BS is None or real_BS.all() else real_BS.unsqueeze(-1)
