"""A check at start-up: compare values and gradients of a model's GPU kernels with the torch references, in seconds.

Some pairs of versions are known to compute wrong gradients without an error (``docs/traps.md``), which would ruin a
run.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hylo_megatron.config import Architecture
from hylo_megatron.config.layout import ParallelLayout, Work
from hylo_megatron.errors import HyLoError
from hylo_megatron.kernels.choose import TORCH, Ops, ops
from hylo_megatron.kernels.chunked import compute_dtype

LENGTH = 512  # tokens of a sequence that are compared
TOLERANCE = 0.02  # ‖kernel - reference‖ / ‖reference‖; rounding to bf16 gave 2e-3 to 4e-3 on an H200


def random_bf16(*shape: int, device) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class RankShape:
    """What a linear block of one rank works on: ``1 / split`` of the heads, and ``rows`` sequences of ``length``.

    fla tunes a kernel for the numbers of heads and rows, for the widths, and for steps of the number of tokens.
    ``states``: rows start from a state and give their last one to other ranks (``mixers/state_passing.py``), which
    takes other variants of the kernels, and a wider scan of the delta rules.
    """

    split: int = 1
    rows: int = 1
    length: int = LENGTH
    states: bool = False

    @classmethod
    def of(cls, arch: Architecture, layout: ParallelLayout, work: Work) -> "RankShape":
        if layout.passes_states:  # each rank has two chunks of a sequence
            return cls(split=layout.tp, rows=2 * work.micro_batch, length=work.seq_length // (2 * layout.cp),
                       states=True)  # fmt: skip
        return cls(split=layout.tp * layout.cp, rows=work.micro_batch, length=work.seq_length)

    @property
    def compared(self) -> int:
        """Tokens of each sequence that are compared: fewer of many sequences, since the references take long."""
        return min(self.length, max(LENGTH // 4, min(LENGTH, 4 * LENGTH // self.rows)))


@dataclass(frozen=True)
class Case:
    """``run`` is a function of kernels and ``inputs``, whose sizes are a model's on one rank.

    The first ``sequences`` inputs, ``[rows, tokens, ...]``, are lengthened by zeros to the run's length, so that fla
    tunes its kernels here for the run. All of these kernels are causal. ``reference`` computes the same another way;
    it is ``run`` with torch's kernels where it is None. ``blame``: what a disagreement means, and what to do.
    """

    inputs: list[Tensor]
    run: Callable
    sequences: int = 0
    reference: Callable | None = None
    blame: str = (
        "this pair of triton and fla versions computes wrong results; `make doctor` names known ones, --no-self-test"
        " trains anyway"
    )


def delta_rule(rule: Callable, inputs: tuple[Tensor, ...], at: RankShape, seen: float = 1.0, **kwargs) -> Tensor:
    """Return the output of a delta rule for ``q, k, v`` as the run calls it.

    Where ranks pass states the last state is added, ``seen`` times, so that its gradient is compared too.
    """
    q, _, v = inputs
    kwargs["use_qk_l2norm_in_kernel"] = True
    if not at.states:
        return rule(*inputs, **kwargs)[0]
    start = v.new_zeros(len(v), v.shape[2], q.shape[-1], v.shape[-1], dtype=compute_dtype(v))
    out, last = rule(*inputs, **kwargs, initial_state=start, output_final_state=True)
    return out + seen * last.mean(2).unsqueeze(1)  # about as large as the output


def gdn_case(arch: Architecture, at: RankShape, device) -> Case:
    g, size = arch.geometry.gdn, (at.rows, at.compared)
    keys, values = g.num_key_heads // at.split, g.num_value_heads // at.split
    q, k = (random_bf16(*size, keys, g.key_head_dim, device=device) for _ in "qk")
    v = random_bf16(*size, values, g.value_head_dim + at.states * g.key_head_dim, device=device)
    decay = -F.softplus(random_bf16(*size, values, device=device).float() - 2)
    beta = random_bf16(*size, values, device=device).sigmoid()

    def run(kernels: Ops, q, k, v, decay, beta):
        return delta_rule(kernels.chunk_gated_delta_rule, (q, k, v), at, g=decay, beta=beta)

    return Case([q, k.roll(1, 1), v, decay, beta], run, sequences=5)


def kda_case(arch: Architecture, at: RankShape, device) -> Case:
    """The kernel also computes the decay. The zeros that lengthen a sequence decay the last state: it is not seen."""
    g, size = arch.geometry.kda, (at.rows, at.compared)
    heads, dim = g.num_heads // at.split, g.head_dim
    q, k, v, raw = (random_bf16(*size, heads, dim, device=device).roll(i, 1) for i in range(4))
    v = F.pad(v, (0, at.states * dim))  # as when states are passed
    beta = random_bf16(*size, heads, device=device).sigmoid()
    rate, bias = torch.linspace(-1, 1, heads, device=device), torch.linspace(-4, 2, heads * dim, device=device)

    def run(kernels: Ops, q, k, v, raw, beta, rate, bias):
        decay = dict(g=raw, A_log=rate, dt_bias=bias)
        return delta_rule(kernels.chunk_kda, (q, k, v), at, seen=0.0, beta=beta, **decay)

    return Case([q, k, v, raw, beta, rate, bias], run, sequences=5)


def mamba2_case(arch: Architecture, at: RankShape, device) -> Case:
    g, size = arch.geometry.mamba2, (at.rows, at.compared)
    heads, groups = g.num_heads // at.split, g.num_groups // at.split
    x = random_bf16(*size, heads, g.head_dim, device=device)
    dt = F.softplus(random_bf16(*size, heads, device=device).float() - 2)
    B, C = (random_bf16(*size, groups, g.state_size, device=device) for _ in "BC")
    A = -torch.linspace(0.5, 2, heads, device=device)

    def run(kernels: Ops, x, dt, B, C):
        if not at.states:
            return kernels.chunk_ssd(x, dt, A, B, C)[0]
        out, last = kernels.chunk_ssd(x, dt, A, B, C, output_final_state=True)
        return out + last.sum(-1).unsqueeze(1)  # about as large as the output

    return Case([x, dt, B, C.roll(1, 1)], run, sequences=4)


def projection_case(arch: Architecture, at: RankShape, device) -> Case:
    """Three sections, the second convolved; sequences are interleaved, as in training."""

    def run(kernels: Ops, x, weight):
        return torch.cat(kernels.split_convolve(x.transpose(0, 1), weight, None, (64, 128, 18), start=64), -1)

    return Case([random_bf16(LENGTH, 2, 224, device=device), random_bf16(128, 4, device=device)], run)


def norm_case(shape_of: Callable, activation: str, arch: Architecture, at: RankShape, device) -> Case:
    """The gated norm within heads."""

    def run(kernels: Ops, x, gate, weight):
        return kernels.gated_rms_norm(x, gate, weight, 1e-5, activation=activation)

    heads, dim = shape_of(arch.geometry)
    x, gate = (random_bf16(at.rows, at.compared, heads // at.split, dim, device=device) for _ in range(2))
    return Case([x, gate.roll(1, 1), random_bf16(dim, device=device) + 1], run, sequences=2)


def mlp_case(arch: Architecture, at: RankShape, device) -> Case:
    """Norm, SwiGLU and the distance of layer-wise distillation, one after another."""

    def run(kernels: Ops, x, weight, target):
        return kernels.distance(kernels.swiglu_packed(kernels.rms_norm(x, weight, 1e-5)), target.detach())

    width = arch.hidden_size // 2 * 2
    target = random_bf16(1, LENGTH, width // 2, device=device)
    return Case([random_bf16(1, LENGTH, width, device=device), random_bf16(width, device=device) + 1, target], run)


_EVERY = {"projection": projection_case, "MLP": mlp_case}
_GDN_NORM = partial(norm_case, lambda model: (model.gdn.num_value_heads, model.gdn.value_head_dim), "silu")
_KDA_NORM = partial(norm_case, lambda model: (model.kda.num_heads, model.kda.head_dim), "sigmoid")
# The recurrence is last: another process compiles a kernel of the gated delta rule (engine/tilelang_ahead.py).
CASES = {
    "gdn": {"gated norm": _GDN_NORM, **_EVERY, "gated delta rule": gdn_case},
    "kda": {"gated norm": _KDA_NORM, **_EVERY, "Kimi delta attention": kda_case},
    "mamba2": {**_EVERY, "state-space scan": mamba2_case},
}


def lengthened(x: Tensor, length: int) -> Tensor:
    """Return ``[rows, tokens, ...]`` with zeros up to ``length`` tokens."""
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, length - x.shape[1]))


def errors_of(case: Case, kernels: Ops, length: int = 0) -> list[float]:
    """Return relative errors of the output and of each input's gradient, if any, against the torch reference in fp32.

    ``length``: tokens of the sequences that ``kernels`` compute. The reference computes those that are compared.
    """
    results = []
    for is_reference in (False, True):
        leaves = [x.detach().to(torch.float32 if is_reference else x.dtype).requires_grad_() for x in case.inputs]
        given = list(leaves)
        if is_reference:
            out = (case.reference or case.run)(TORCH, *given)
        elif case.sequences:
            compared = case.inputs[0].shape[1]
            given[: case.sequences] = (lengthened(x, max(length, compared)) for x in leaves[: case.sequences])
            out = case.run(kernels, *given)[:, :compared]
        else:
            out = case.run(kernels, *given)
        weight = random_bf16(*out.shape, device=out.device).to(out.dtype)
        sum_ = (out * weight).float().sum()
        grads = torch.autograd.grad(sum_, leaves, allow_unused=True) if out.requires_grad else ()
        results.append([out.detach(), *(g for g in grads if g is not None)])
    pairs = ((a.float(), b.float()) for a, b in zip(*results, strict=True))
    return [((a - b).norm() / b.norm().clamp_min(1e-20)).item() for a, b in pairs]


def self_test(arch: Architecture, at: RankShape | None = None, device: str | torch.device = "cuda",
              kernels: Ops | None = None, more: dict[str, Case] | None = None) -> str:  # fmt: skip
    """Return one line with the worst error of each kernel that ``arch`` uses, and of the cases in ``more``.

    ``at``: a rank's part of the run. Raises ``HyLoError`` if a kernel is wrong.
    """
    kernels, started, found, at = kernels or ops(device), time.time(), {}, at or RankShape()
    linear = (
        (f"{kernels.name}'s {name}", case(arch, at, device))
        for kind in sorted(set(arch.plan) & set(CASES))
        for name, case in CASES[kind].items()
    )
    for name, case in itertools.chain(linear, (more or {}).items()):
        errors = found[name] = errors_of(case, kernels, at.length)
        if not all(error < TOLERANCE for error in errors):  # nan counts as wrong
            raise HyLoError(
                f"{name} disagrees with the reference (relative errors of output and gradients:"
                f" {', '.join(f'{error:.2g}' for error in errors)}; allowed {TOLERANCE}): {case.blame}"
            )
    listed = ", ".join(f"{name} {max(errors):.1e}" for name, errors in found.items())
    return f"kernels agree with their references ({listed}; {time.time() - started:.1f} s)"
