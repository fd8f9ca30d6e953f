"""The window of a layer at the start: the base model's weights, and gates that fit the base model's heads.

The mixer beside it is then initialised on what the window leaves over. Legend: B batch, S sequence, D model,
H query heads, K head dim, N tokens.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hylo_megatron.config import Architecture
from hylo_megatron.config.positions import has_window
from hylo_megatron.init.teacher import AttentionLayer, BaseModel
from hylo_megatron.mixers import MIXERS
from hylo_megatron.mixers.initialise import ridge_solve
from hylo_megatron.mixers.window import GATE, hf_name

RIDGE = 0.5


@dataclass(frozen=True, kw_only=True)
class Found:
    """A layer's window. ``rest`` is the layer without the window's part, ``output_BSD`` that part."""

    rest: AttentionLayer
    weights: dict[str, Tensor]
    output_BSD: Tensor | float = 0.0


def window_beside(base: BaseModel, layer: AttentionLayer, arch: Architecture) -> Found:
    """Return the window of a layer, and the layer itself without weights where the student has none.

    Without calibration data the gates are 1.
    """
    kind = arch.plan[layer.index]
    if not has_window(arch.window, kind):
        return Found(rest=layer, weights={})
    weights = {
        hf_name(name, kind): tensor.cpu() for name, tensor in layer.weights.items() if name.startswith("self_attn.")
    }
    gate_HD = torch.zeros(arch.num_attention_heads, arch.hidden_size, device=base.device)
    rest, output = layer, 0.0
    if layer.inputs_BSD.numel():
        heads = torch.cat([base.attention(row[None], layer.weights, arch.window) for row in layer.inputs_BSD])
        fit = layer.first(layer.fitted_rows)
        gate_HD = fitted_gates(fit.inputs_BSD, heads[: layer.fitted_rows], fit.heads_BSHK)
        heads = heads * 2 * F.linear(layer.inputs_BSD, gate_HD).sigmoid().unsqueeze(-1)
        output = F.linear(heads.flatten(2), layer["self_attn.o_proj.weight"])
        rest = replace(layer, heads_BSHK=layer.heads_BSHK - heads, output_BSD=layer.output_BSD - output)
    return Found(rest=rest, weights=weights | {f"{MIXERS[kind].module}.{GATE}": gate_HD.cpu()}, output_BSD=output)


def fitted_gates(x_BSD: Tensor, window_BSHK: Tensor, whole_BSHK: Tensor) -> Tensor:
    """Return ``[H, D]``, by ridge regression of the factor by which the window's head comes closest to the whole one.

    At each token this is about the share of the attention's weight that lies within the window. Tokens count by the
    size of the head's output. The regression is pulled towards gates of 1, and takes the sigmoid for linear there.
    """
    power_NH = window_BSHK.square().sum(-1).flatten(0, 1).double()
    factor_NH = (window_BSHK * whole_BSHK).sum(-1).flatten(0, 1) / power_NH.clamp_min(1e-12)
    x = x_BSD.flatten(0, 1).double()
    gates = []
    for power, factor in zip(power_NH.T, factor_NH.clamp(0, 2).T, strict=True):
        weighted = x * (power / power.mean().clamp_min(1e-12))[:, None]
        gates.append(ridge_solve(weighted.T @ x, weighted.T @ (2 * (factor - 1)), RIDGE))
    return torch.stack(gates).to(x_BSD.dtype)
