"""Refitting an output projection, and the error that is left. N tokens, D model, F features."""

import torch
from torch import Tensor


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
