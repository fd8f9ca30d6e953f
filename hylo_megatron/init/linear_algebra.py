"""Small pieces shared by the initialisations. N tokens, D features."""

import torch
from torch import Tensor


def covariance(x_ND: Tensor) -> Tensor:
    """Second moment ``E[x xᵀ]`` in fp64."""
    x = x_ND.double()
    return x.T @ x / len(x)


def constant_direction(x_ND: Tensor, ridge: float = 1e-3) -> Tensor:
    """``w`` with ``x · w ≈ 1`` on the data: lets bias-free layers hold a constant (a gate that is open, a bias)."""
    c = covariance(x_ND)
    c += ridge * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype, device=c.device)
    return torch.linalg.solve(c, x_ND.double().mean(0)).float()


def ridge_correction(features_NF: Tensor, target_ND: Tensor, weight_DF: Tensor, ridge: float = 0.02) -> Tensor:
    """``W + ΔW``, ΔW the ridge regression of what ``W`` leaves over: the fit is pulled towards ``W``, not to zero."""
    f = features_NF.double()
    rest = target_ND.double() - f @ weight_DF.double().T
    gram = f.T @ f
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return (weight_DF.double() + torch.linalg.solve(gram, f.T @ rest).T).to(weight_DF.dtype)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Mean over tokens of ``|got - want|`` over mean over tokens of ``|want|``."""
    got, want = got.flatten(0, -2).float(), want.flatten(0, -2).float()
    return ((got - want).norm(dim=-1).mean() / want.norm(dim=-1).mean().clamp_min(1e-12)).item()


def linearised_qkv(layer, arch) -> tuple[Tensor, Tensor, Tensor]:
    """``W_Q [H,K,D], W_K [G,K,D], W_V [G,K,D]`` such that ``W x`` stands for what attention uses.

    Biases are held by the constant direction of the data; a per-head norm (Qwen3) by its weight over the head's mean
    rms on the data. Without calibration data both are left out (the norm's weight is kept).
    """
    heads, groups, dim = arch.num_attention_heads, arch.num_key_value_heads, arch.head_dim
    weights = {n: layer[f"self_attn.{n}_proj.weight"].clone() for n in "qkv"}
    has_data = layer.inputs_BSD.numel() > 0
    x = layer.inputs_BSD.flatten(0, 1) if has_data else None
    if arch.attention_bias and has_data:
        one = constant_direction(x)
        for n in "qkv":
            weights[n] += torch.outer(layer[f"self_attn.{n}_proj.bias"], one)
    shaped = [weights[n].view(count, dim, -1) for n, count in (("q", heads), ("k", groups), ("v", groups))]
    if arch.qk_norm:
        for i, n in enumerate("qk"):
            scale = layer[f"self_attn.{n}_norm.weight"]
            if has_data:
                out = torch.einsum("nd,hkd->nhk", x, shaped[i])
                shaped[i] = shaped[i] / out.square().mean((0, 2)).sqrt()[:, None, None]
            shaped[i] = shaped[i] * scale[:, None]
    return tuple(shaped)
