"""What all mixers share: the norm, the rotation, parameters that stay in fp32, and the padding mask."""

import copy

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hylo_megatron import kernels
from hylo_megatron.errors import HyLoError
from hylo_megatron.hf.configuration_hylo import HyLoConfig


class HyLoRMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return kernels.rms_norm(x, self.weight, self.eps)


class KeepsFp32(nn.Module):
    """Parameters named in ``fp32_names`` keep fp32 through ``.to(bfloat16)``: rounding them changes every decay."""

    fp32_names: tuple[str, ...] = ()

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


def rope_frequencies(config: HyLoConfig, device=None) -> tuple[torch.Tensor, float]:
    """Frequencies [P/2] and the factor on cos and sin, by transformers' functions for ``rope_type``."""
    kind = config.rope_parameters.get("rope_type", "default")
    dim = config.qk_rope_head_dim
    if kind == "default":
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0
    if kind not in ("linear", "llama3", "yarn"):
        raise HyLoError(f"config.json: rope_type {kind!r} is not supported, expected default, linear, llama3 or yarn")
    of_rope_dims = copy.deepcopy(config)
    of_rope_dims.head_dim = dim
    return ROPE_INIT_FUNCTIONS[kind](of_rope_dims, device)


class Rotation:
    """cos and sin [B,S,P] of positions [B,S]. Frequencies are made on first use, in fp32, and never saved."""

    def __init__(self, config: HyLoConfig):
        self.config, self.by_device = config, {}

    def __call__(self, positions_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        device = positions_BS.device
        if device not in self.by_device:
            self.by_device[device] = rope_frequencies(self.config, device)
        frequencies, factor = self.by_device[device]
        angles_BSP = (positions_BS[..., None].float() * frequencies).repeat(1, 1, 2)
        return angles_BSP.cos() * factor, angles_BSP.sin() * factor


def rotate(x_BSHP: torch.Tensor, cos_BSP: torch.Tensor, sin_BSP: torch.Tensor) -> torch.Tensor:
    """Half-split (NeoX) rotation of the last dimension, in fp32."""
    first, second = x_BSHP.float().chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    return (x_BSHP.float() * cos_BSP.unsqueeze(2) + turned * sin_BSP.unsqueeze(2)).to(x_BSHP.dtype)


def real_tokens(mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """[B,S,1], True at the last ``length`` positions' real tokens; None where nothing is padded."""
    if mask is None:
        return None
    real = mask[:, -length:].bool()
    return None if real.all() else real.unsqueeze(-1)
