"""What all mixers share: the norm, the rotation, parameters that stay in fp32, and the padding mask."""

import torch
from torch import nn

from hylo_megatron import kernels
from hylo_megatron.hf.configuration_hylo import HyLoConfig
from hylo_megatron.kernels.rope import rope_frequencies


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


class Rotation:
    """cos and sin [B,S,P] of positions [B,S]. Frequencies are made on first use and never saved."""

    def __init__(self, config: HyLoConfig):
        self.config, self.by_device = config, {}

    def __call__(self, positions_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        device, config = positions_BS.device, self.config
        if device not in self.by_device:
            frequencies, factor = rope_frequencies(
                config.rope_parameters, config.qk_rope_head_dim, config.max_position_embeddings
            )
            self.by_device[device] = frequencies.to(device), factor
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
