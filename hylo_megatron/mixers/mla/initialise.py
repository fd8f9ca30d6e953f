"""Attention -> MLA. ``from_rows`` is the paper's transfer; ``calibrated`` fits activations.

Legend: H query heads, G key-value heads, K head dim, D model, P rope pairs (rope dims / 2), R latent rank. Rotary
pairs are half-split: pair i of a head is rows i and i + K/2, and is written as one complex row where that is simpler.
Scores keep their size: MLA divides by sqrt(nope + rope), attention by sqrt(K), so queries carry the ratio. YaRN's
attention factor scales cos and sin of queries and keys: the rotary part gets its square when the model runs, and the
no-position part has it in the queries.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hylo_megatron.config import Architecture
from hylo_megatron.config.geometry import check_heads
from hylo_megatron.kernels.rope import rope_frequencies
from hylo_megatron.mixers.initialise import covariance, linearised_qkv

OUTPUT_PROJECTION = "self_attn.o_proj.weight"
REFIT = False  # calibration fits all of its weights already


def rope_pairs(arch: Architecture) -> Tensor:
    """Return for each rope pair of the MLA layer the pair of the head that has its frequency ``[P]``."""
    check_heads(arch.head_dim, arch.geometry, {"mla"})
    rope = arch.geometry.mla.qk_rope_head_dim
    return torch.arange(rope // 2) * (arch.head_dim // rope)


def _pair_rows(pairs: Tensor, head_dim: int) -> Tensor:
    return torch.cat([pairs, pairs + head_dim // 2])


def _nope_rows(arch: Architecture, rope: Tensor) -> Tensor:
    """Return the rows that become the no-position part, in complete pairs; those without a rope pair come first."""
    g, half = arch.geometry.mla, arch.head_dim // 2
    order = [i for i in range(half) if i not in set(rope.tolist())] + rope.tolist()
    pairs = torch.tensor(sorted(order[: g.qk_nope_head_dim // 2]), dtype=torch.long)
    return _pair_rows(pairs, arch.head_dim)


def _factor(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return ``up [rows, rank], down [rank, D]``, the best approximation of that rank, with Σ split evenly."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    root = s[:rank].sqrt()
    return _widened(u[:, :rank] * root, root[:, None] * v[:rank], rank)


def _widened(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return both factors with zeros up to ``rank``, where the matrix has a lower one."""
    return F.pad(up, (0, rank - len(down))), F.pad(down, (0, 0, 0, rank - len(down)))


def _score_factors(arch: Architecture) -> Tensor:
    """Return the part of YaRN's factor on scores that the rotation does not apply, by row of a query [nope + rope].

    Without a rotation (NoPE) it applies none.
    """
    g = arch.geometry.mla
    _, scaling = rope_frequencies(arch.rope_parameters, arch.head_dim, arch.max_position_embeddings)
    rotated = 1.0 if arch.mla_rope else scaling**2
    return torch.tensor([scaling**2] * g.qk_nope_head_dim + [rotated] * g.qk_rope_head_dim).double()


def _query(up: Tensor, down: Tensor | None, arch: Architecture) -> dict[str, Tensor]:
    """Return the weights of queries ``up · down · x``, or ``up · x``, with YaRN's factor."""
    factors = _score_factors(arch).to(up.device)
    up = up * factors.repeat(len(up) // len(factors))[:, None]
    return {"q_proj.weight": up} if down is None else {"q_a_proj.weight": down, "q_b_proj.weight": up}


def _kept_norms(layer, arch: Architecture) -> dict[str, Tensor]:
    """Return Qwen3's per-head norms for MLA, if it keeps them.

    A norm takes the size of a query away, so YaRN's factor goes into its weight.
    """
    if not arch.mla_qk_norm:
        return {}
    pairs = rope_pairs(arch)
    g, rope, nope = arch.geometry.mla, _pair_rows(pairs, arch.head_dim), _nope_rows(arch, pairs)
    rows = torch.cat([nope, rope])[: g.qk_nope_head_dim + g.qk_rope_head_dim]
    query, key = (layer[f"self_attn.{n}_norm.weight"].cpu()[rows] for n in "qk")
    query = query * _score_factors(arch)[: len(rows)]
    return {"self_attn.q_norm.weight": query, "self_attn.k_norm.weight": key}


def _assemble(arch, q, latent_down, key_up_GnR, value_up_GvR, k_rope, out) -> dict[str, Tensor]:
    repeat = arch.num_attention_heads // arch.num_key_value_heads
    up = torch.cat([key_up_GnR, value_up_GvR], 1).repeat_interleave(repeat, 0)
    weights = q | {
        "kv_a_proj_with_mqa.weight": torch.cat([latent_down, k_rope]),
        "kv_b_proj.weight": up.flatten(0, 1),
        "o_proj.weight": out,
    }
    return {f"self_attn.{name}": tensor.float() for name, tensor in weights.items()}


def from_rows(layer, arch: Architecture, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Return the paper's transfer: truncated SVD with the head-averaged rope key (arXiv 2503.11132)."""
    g = arch.geometry.mla
    norms_go_in = arch.qk_norm and not arch.mla_qk_norm
    q, k, v = (w.double() for w in linearised_qkv(layer, replace(arch, qk_norm=norms_go_in)))
    pairs = rope_pairs(arch).to(q.device)
    rope, nope = _pair_rows(pairs, arch.head_dim), _nope_rows(arch, pairs).to(q.device)
    # Rows that appear in both parts count twice in the score.
    rows = torch.cat([nope, rope])
    twice = torch.bincount(rows, minlength=arch.head_dim)[rows, None]
    scale = math.sqrt((g.qk_nope_head_dim + g.qk_rope_head_dim) / arch.head_dim) / twice
    up, q_down = q, None
    if g.q_lora_rank:
        up, q_down = _factor(q.flatten(0, 1), g.q_lora_rank)
        up = up.unflatten(0, q.shape[:2])
    queries = _query((torch.cat([up[:, nope], up[:, rope]], 1) * scale).flatten(0, 1), q_down, arch)
    joint_up, joint_down = _factor(torch.cat([k[:, nope].flatten(0, 1), v.flatten(0, 1)]), g.kv_lora_rank)
    key_up, value_up = joint_up.split([k.shape[0] * len(nope), v.shape[0] * v.shape[1]])
    weights = _assemble(
        arch, queries, joint_down, key_up.unflatten(0, (k.shape[0], -1)), value_up.unflatten(0, (v.shape[0], -1)),
        k[:, rope].mean(0), layer["self_attn.o_proj.weight"],
    )  # fmt: skip
    return weights | _kept_norms(layer, arch)


def _complex(w_xKD: Tensor) -> Tensor:
    half = w_xKD.shape[-2] // 2
    return torch.complex(w_xKD[..., :half, :], w_xKD[..., half:, :])


def _real(w_xPD: Tensor) -> Tensor:
    return torch.cat([w_xPD.real, w_xPD.imag], -2)


def shared_rope_key(q_HKD: Tensor, k_GKD: Tensor, cov: Tensor, pairs: Tensor):
    """Return the best shared key per frequency: ``q_rope [H,2P,D], k_rope [2P,D]``, and what it leaves of the keys.

    The shared key is the principal component of the groups' complex keys, weighted by queries. 2-D rotations and
    scalings commute with RoPE, so each query head absorbs its own complex coefficient. The remainder of the keys is
    complex, over all pairs: ``[G,K/2,D]``.
    """
    qc, kc, cc = _complex(q_HKD), _complex(k_GKD), cov.to(torch.complex128)
    groups, repeat = len(kc), len(qc) // len(kc)
    strength = torch.einsum("hpd,de,hpe->hp", qc, cc, qc.conj()).real.clamp_min(1e-18)
    strength = strength.unflatten(0, (groups, repeat)).sum(1).sqrt()  # [G, K/2]
    weighted = kc[:, pairs] * strength[:, pairs, None]
    gram = torch.einsum("gpd,de,fpe->pgf", weighted, cc, weighted.conj())
    energy, basis = torch.linalg.eigh(gram)
    top, root = basis[..., -1], energy[:, -1].clamp_min(1e-18).sqrt()  # [P, G], [P]
    component = torch.einsum("pg,gpd->pd", top.conj(), weighted) / root[:, None]  # unit variance
    coefficient = top.T * root / strength[:, pairs]  # k_g ~ coefficient[g] * component
    remainder = kc.clone()
    remainder[:, pairs] -= coefficient[..., None] * component
    per_head = coefficient.repeat_interleave(repeat, 0)
    return _real(qc[:, pairs] * per_head.conj()[..., None]), _real(component), remainder


def position_sensitivity(frequencies: Tensor, reach: int = 1024) -> Tensor:
    """Return the mean of ``|1 - exp(i f t)|²`` over log-spaced distances t: how wrong a pair without rotation is."""
    distance = torch.exp(torch.linspace(0, math.log(reach), 256, dtype=torch.float64))
    return (2 - 2 * torch.cos(frequencies.double().cpu()[:, None] * distance)).mean(1)


def _remainder_part(q_HKD, remainder_GPD, sensitivity, cov, width: int):
    """Return no-position rows for the remainder of the keys: the ``width / 2`` pairs where that helps most."""
    qc, cc = _complex(q_HKD), cov.to(torch.complex128)
    groups, repeat = len(remainder_GPD), len(qc) // len(remainder_GPD)
    energy = torch.einsum("gpd,de,gpe->gp", remainder_GPD, cc, remainder_GPD.conj()).real
    query = torch.einsum("hpd,de,hpe->hp", qc, cc, qc.conj()).real.unflatten(0, (groups, repeat)).sum(1)
    gain = (energy * query).sum(0) * (1 - sensitivity.to(energy.device)).clamp_min(0)
    chosen = gain.topk(width // 2).indices.sort().values
    helps = (gain[chosen] > 0).to(remainder_GPD.dtype)  # a fast pair without its rotation would do harm
    return _real(qc[:, chosen]), _real(remainder_GPD[:, chosen] * helps[:, None])


def _latent(keys_GnD, values_GvD, q_HnD, cov, rank: int):
    """Return the joint factor of keys and values that is best on the data; keys are weighted by their queries."""
    groups, repeat = len(keys_GnD), len(q_HnD) // len(keys_GnD)
    y = torch.cat([keys_GnD.flatten(0, 1), values_GvD.flatten(0, 1)])
    n_keys = keys_GnD.shape[0] * keys_GnD.shape[1]
    query = torch.einsum("hnd,de,hne->hn", q_HnD, cov, q_HnD).unflatten(0, (groups, repeat)).sum(1).flatten()
    query = query.sqrt().clamp_min(1e-6)
    variance = torch.einsum("yd,de,ye->y", y, cov, y)
    key_weight = query / ((query.square() * variance[:n_keys]).sum().sqrt() + 1e-12)
    value_weight = torch.ones_like(variance[n_keys:]) / (variance[n_keys:].sum().sqrt() + 1e-12)
    weight = torch.cat([key_weight, value_weight])
    yw = y * weight[:, None]
    energy, basis = torch.linalg.eigh(yw @ cov @ yw.T)
    keep = min(rank, len(energy))
    energy, basis = energy[-keep:], basis[:, -keep:]
    sigma = energy.clamp_min(1e-14).sqrt()
    down, up = 0.5 * (basis.T @ yw) / sigma[:, None], 2 * (basis * sigma) / weight[:, None]
    up, down = _widened(up, down, rank)
    return down, up[:n_keys].unflatten(0, (groups, -1)), up[n_keys:].unflatten(0, (groups, -1))


def calibrated(layer, arch: Architecture, frequencies: Tensor) -> dict[str, Tensor]:
    """Return a calibrated MLA with plain rope frequencies. ``frequencies``: the base model's ``[K / 2]``.

    It is exact when the latent holds everything, rope dims equal the head dim and there is one key-value head. Else it
    loses what the latent truncates, and the part of the groups' fast keys that one shared key cannot hold.
    """
    g = arch.geometry.mla
    q, k, v = (w.double() for w in linearised_qkv(layer, arch))
    q = q * math.sqrt((g.qk_nope_head_dim + g.qk_rope_head_dim) / arch.head_dim)
    cov = covariance(layer.inputs_BSD.flatten(0, 1))
    q_rope, k_rope, remainder = shared_rope_key(q, k, cov, rope_pairs(arch).to(q.device))
    q_nope, k_nope = _remainder_part(q, remainder, position_sensitivity(frequencies), cov, g.qk_nope_head_dim)
    down, key_up, value_up = _latent(k_nope, v, q_nope, cov, g.kv_lora_rank)
    up, q_down = torch.cat([q_nope, q_rope], 1).flatten(0, 1), None
    if g.q_lora_rank:  # the subspace that keeps most of the queries' variance on the data
        basis = torch.linalg.eigh(up @ cov @ up.T)[1][:, -g.q_lora_rank :]
        up, q_down = basis, basis.T @ up
    queries = _query(up, q_down, arch)
    weights = _assemble(arch, queries, down, key_up, value_up, k_rope, layer["self_attn.o_proj.weight"])
    return weights | _kept_norms(layer, arch)
