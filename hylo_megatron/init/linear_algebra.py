"""Refitting an output projection, and the error that is left. N tokens, D model, F features."""

from collections.abc import Iterable, Iterator

from torch import Tensor

from hylo_megatron.mixers.initialise import ridge_solve


def ridge_corrections(
    features_NF: Tensor, target_ND: Tensor, weight_DF: Tensor, ridges: Iterable[float]
) -> Iterator[Tensor]:
    """Yield ``W + ΔW`` for each strength, ΔW the ridge regression, towards ``W``, of what ``W`` leaves over."""
    f = features_NF.double()
    moment = f.T @ (target_ND.double() - f @ weight_DF.double().T)
    gram = f.T @ f
    for ridge in ridges:
        yield (weight_DF.double() + ridge_solve(gram, moment, ridge).T).to(weight_DF.dtype)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Mean over tokens of ``|got - want|`` over mean over tokens of ``|want|``."""
    got, want = got.flatten(0, -2).float(), want.flatten(0, -2).float()
    return ((got - want).norm(dim=-1).mean() / want.norm(dim=-1).mean().clamp_min(1e-12)).item()
