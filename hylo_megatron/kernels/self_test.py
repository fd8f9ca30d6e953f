"""A check at start-up: compare values and gradients of a model's GPU kernels with the torch references, in seconds.

Some pairs of versions are known to compute wrong gradients without an error (``docs/traps.md``), which would ruin a
run.
"""

import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hylo_megatron.config import Architecture
from hylo_megatron.errors import HyLoError
from hylo_megatron.kernels.choose import TORCH, Ops, ops

LENGTH = 512
TOLERANCE = 0.02  # ‖kernel - reference‖ / ‖reference‖; rounding to bf16 gave 2e-3 to 4e-3 on an H200


def _random(*shape: int, device) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)


# Each case returns inputs with a model's sizes on one of ``tp`` ranks, and a function of kernels and these inputs.
Case = tuple[list[Tensor], Callable]


def gdn_case(arch: Architecture, tp: int, device) -> Case:
    g = arch.geometry.gdn
    keys, values = g.num_key_heads // tp, g.num_value_heads // tp
    q, k = (_random(1, LENGTH, keys, g.key_head_dim, device=device) for _ in "qk")
    v = _random(1, LENGTH, values, g.value_head_dim, device=device)
    decay = -F.softplus(_random(1, LENGTH, values, device=device).float() - 2)
    beta = _random(1, LENGTH, values, device=device).sigmoid()

    def run(kernels: Ops, q, k, v, decay, beta):
        return kernels.chunk_gated_delta_rule(q, k, v, g=decay, beta=beta, use_qk_l2norm_in_kernel=True)[0]

    return [q, k.roll(1, 1), v, decay, beta], run


def kda_case(arch: Architecture, tp: int, device) -> Case:
    """The kernel also computes the decay."""
    g = arch.geometry.kda
    heads, dim = g.num_heads // tp, g.head_dim
    q, k, v, raw = (_random(1, LENGTH, heads, dim, device=device).roll(i, 1) for i in range(4))
    beta = _random(1, LENGTH, heads, device=device).sigmoid()
    rate, bias = torch.linspace(-1, 1, heads, device=device), torch.linspace(-4, 2, heads * dim, device=device)

    def run(kernels: Ops, q, k, v, raw, beta, rate, bias):
        decay = dict(g=raw, A_log=rate, dt_bias=bias)
        return kernels.chunk_kda(q, k, v, beta=beta, use_qk_l2norm_in_kernel=True, **decay)[0]

    return [q, k, v, raw, beta, rate, bias], run


def mamba2_case(arch: Architecture, tp: int, device) -> Case:
    g = arch.geometry.mamba2
    heads, groups = g.num_heads // tp, g.num_groups // tp
    x = _random(1, LENGTH, heads, g.head_dim, device=device)
    dt = F.softplus(_random(1, LENGTH, heads, device=device).float() - 2)
    B, C = (_random(1, LENGTH, groups, g.state_size, device=device) for _ in "BC")
    A = -torch.linspace(0.5, 2, heads, device=device)
    return [x, dt, B, C.roll(1, 1)], lambda kernels, x, dt, B, C: kernels.chunk_ssd(x, dt, A, B, C)[0]


def projection_case(arch: Architecture, tp: int, device) -> Case:
    """Three sections, the second convolved; sequences are interleaved, as in training."""

    def run(kernels: Ops, x, weight):
        return torch.cat(kernels.split_convolve(x.transpose(0, 1), weight, None, (64, 128, 18), start=64), -1)

    return [_random(LENGTH, 2, 224, device=device), _random(128, 4, device=device)], run


def norm_case(dim_of: Callable, activation: str, arch: Architecture, tp: int, device) -> Case:
    """The gated norm within heads."""

    def run(kernels: Ops, x, gate, weight):
        return kernels.gated_rms_norm(x, gate, weight, 1e-5, activation=activation)

    dim = dim_of(arch.geometry)
    x, gate = (_random(1, LENGTH, 4, dim, device=device) for _ in range(2))
    return [x, gate.roll(1, 1), _random(dim, device=device) + 1], run


def mlp_case(arch: Architecture, tp: int, device) -> Case:
    """Norm, SwiGLU and the distance of layer-wise distillation, one after another."""

    def run(kernels: Ops, x, weight, target):
        return kernels.distance(kernels.swiglu_packed(kernels.rms_norm(x, weight, 1e-5)), target.detach())

    width = arch.hidden_size // 2 * 2
    target = _random(1, LENGTH, width // 2, device=device)
    return [_random(1, LENGTH, width, device=device), _random(width, device=device) + 1, target], run


_EVERY = {"projection": projection_case, "MLP": mlp_case}
_GDN_NORM = partial(norm_case, lambda geometry: geometry.gdn.value_head_dim, "silu")
_KDA_NORM = partial(norm_case, lambda geometry: geometry.kda.head_dim, "sigmoid")
CASES = {
    "gdn": {"gated delta rule": gdn_case, "gated norm": _GDN_NORM, **_EVERY},
    "kda": {"Kimi delta attention": kda_case, "gated norm": _KDA_NORM, **_EVERY},
    "mamba2": {"state-space scan": mamba2_case, **_EVERY},
}


def errors_of(run: Callable, kernels: Ops, inputs: list[Tensor]) -> list[float]:
    """Return relative errors of the output and of each input's gradient against the torch reference in fp32."""
    results = []
    for candidate, dtype in ((kernels, None), (TORCH, torch.float32)):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
        out = run(candidate, *leaves)
        weight = _random(*out.shape, device=out.device).to(out.dtype)
        grads = torch.autograd.grad((out * weight).float().sum(), leaves, allow_unused=True)
        results.append([out.detach(), *(g for g in grads if g is not None)])
    pairs = ((a.float(), b.float()) for a, b in zip(*results, strict=True))
    return [((a - b).norm() / b.norm().clamp_min(1e-20)).item() for a, b in pairs]


def self_test(arch: Architecture, tp: int = 1, device: str | torch.device = "cuda", kernels: Ops | None = None) -> str:
    """Return one line with the worst error of each kernel that ``arch`` uses.

    Raises ``HyLoError`` if a kernel is wrong.
    """
    kernels, started, found = kernels or ops(device), time.time(), {}
    for kind in sorted(set(arch.plan) & set(CASES)):
        for name, case in CASES[kind].items():
            inputs, run = case(arch, tp, device)
            found[name] = errors_of(run, kernels, inputs)
    # nan counts as wrong
    wrong = {name: errors for name, errors in found.items() if not all(e < TOLERANCE for e in errors)}
    if wrong:
        name, errors = next(iter(wrong.items()))
        raise HyLoError(
            f"{kernels.name}'s {name} disagrees with the reference (relative errors of output and gradients:"
            f" {', '.join(f'{e:.2g}' for e in errors)}; allowed {TOLERANCE}): this pair of triton and fla versions"
            " computes wrong results; `make doctor` names known ones, --no-self-test trains anyway"
        )
    listed = ", ".join(f"{name} {max(errors):.1e}" for name, errors in found.items())
    return f"kernels agree with their references ({kernels.name}; {listed}; {time.time() - started:.1f} s)"
