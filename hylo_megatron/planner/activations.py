"""Bytes that one layer's backward pass keeps, and what it works in: bf16, the kernels of a GPU.

Every term is a tensor that an autograd function of the layer saves: ``kernels/fused.py`` and ``triton_*.py``, fla
0.6.0's ``ChunkGatedDeltaRuleFunction``, ``LayerNormGatedFunction`` and ``SwiGLUFunction``, torch's flash attention,
megatron's linear layers (which save their input where their weight is trained). ``tests/activation_bytes.py`` counts
them. A half of a layer, a mixer or an MLP with its norm, is what the engine counts and recomputes as a layer.

Legend: M key heads, H heads (value heads), K key, V value dim, G groups, N state, R latent, P rope dim, F MLP width.
"""

from dataclasses import dataclass

from hylo_megatron.config import Architecture
from hylo_megatron.config.decisions import CHUNK
from hylo_megatron.config.layout import ParallelLayout, passes_states


@dataclass(frozen=True)
class Share:
    """Of a micro-batch, what one rank has."""

    layout: ParallelLayout
    sequences: int
    length: int  # of the part of a sequence that this rank has

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    def inner(self, width: float) -> int:
        """A bf16 tensor of ``width`` values a token, which tensor parallelism has cut."""
        return int(2 * self.tokens * width)

    def outer(self, width: int) -> int:
        """One between layers, which only sequence parallelism cuts."""
        return self.inner(width) // (self.layout.tp if self.layout.sequence_parallel else 1)

    def states(self, size: int) -> int:
        """fp32 matrices of ``size`` values for each of a rank's two stretches of a sequence."""
        return 4 * 2 * self.sequences * size


@dataclass(frozen=True)
class Half:
    """``kept`` from the forward to the backward pass; ``work``: what backward needs beside it; ``entry``: its input,
    all that is kept where it is recomputed."""

    kept: int
    work: int
    entry: int


def aligned(width: int) -> int:
    """``AlignedColumnParallelLinear``: projections of linear blocks end at a multiple of 16."""
    return -(-width // 16) * 16


def _padded_weight(width: int, arch: Architecture) -> int:
    """The copy that ends in zeros, saved in place of the weight."""
    return 2 * aligned(width) * arch.hidden_size if width % 16 else 0


def mlp(arch: Architecture, at: Share, trained: bool) -> Half:
    """x, gate | up; and, for the gradients of trained weights, the normed x and SwiGLU's result (else the norm's fp32
    statistics)."""
    d, f = arch.hidden_size, arch.intermediate_size / at.layout.tp
    kept, rest = at.outer(d) + at.inner(2 * f), at.outer(d) + at.inner(f)
    statistics = at.outer(2)
    work = at.inner(2 * f) + (at.outer(d) if trained else rest)  # gradients of gate | up, of the result and of x
    return Half(kept + (rest if trained else statistics), work, at.outer(d))


def mla(arch: Architecture, at: Share) -> Half:
    """The normed x, latents, queries, keys, values padded to the keys' width, outputs with their fp32 denominators.
    Values as wide as keys stay views of the projection; outputs, of what attention returns."""
    g, heads, d = arch.geometry.mla, arch.num_attention_heads // at.layout.tp, arch.hidden_size
    key = g.qk_nope_head_dim + g.qk_rope_head_dim
    kept = at.outer(d + (g.q_lora_rank or 0)) + at.inner(heads * (key + g.v_head_dim) + 2 * heads)
    if arch.mla_qk_norm:
        kept += at.inner(heads * key + 2 * heads)  # queries before their norm, and its statistics
    if at.layout.cp > 1:  # keys and values are made again of the latents, which go round
        kept += at.inner(g.kv_lora_rank + g.qk_rope_head_dim + heads * g.v_head_dim)
    else:
        values = 2 * key if g.v_head_dim < key else g.qk_nope_head_dim + g.v_head_dim
        kept += at.outer(g.kv_lora_rank) + at.inner(heads * (key + values))
        kept += at.inner(heads * key + 2 * heads) if arch.mla_qk_norm else 0
    kept += 4 * at.length * g.qk_rope_head_dim  # cosines and sines, a table for each layer
    return Half(kept, at.inner(4 * heads * key), at.outer(d))


def gdn(arch: Architecture, at: Share) -> Half:
    """The normed x, the projection, fla's q, k, v and triangular inverses (64 values a token and head), output, gate
    and gated output; fp32 gates and norms' statistics."""
    g, tp, d = arch.geometry.gdn, at.layout.tp, arch.hidden_size
    m, h, k, v = g.num_key_heads // tp, g.num_value_heads // tp, g.key_head_dim, g.value_head_dim
    width = 2 * m * k + 2 * h * v + 2 * h
    across = passes_states(at.layout.linear_cp, g.num_key_heads, tp, at.layout.cp)
    exact = at.layout.cp > 1 and not across
    kept = at.outer(d) + at.inner(width if exact else aligned(width)) + at.inner(2 * m * k + 4 * h * v + CHUNK * h)
    kept += at.inner(h + 2 * (4 * h + 2 * m))  # beta; decay in three forms, three statistics
    kept += 0 if exact else _padded_weight(width, arch)
    if across:  # K more values a head, which come out as ``read``; states of own stretches, transfers of the others
        others = (2 * at.layout.cp - 1) / 2
        kept += at.inner(2 * h * k) + at.states(int(h * k * (k + 2.5 * v + others * k)))
    work = at.inner(2 * h * k * v / CHUNK + 4 * h * v + 4 * h * k)  # states and their gradients; dq, dk, dv, w, u, ..
    return Half(kept, work, at.outer(d))


def mamba2(arch: Architecture, at: Share) -> Half:
    """The normed x, the projection, z, x, x dt, B, C, the scan's output, gated and normed; fp32 dt in four forms."""
    g, tp, d = arch.geometry.mamba2, at.layout.tp, arch.hidden_size
    h, groups, p, n = g.num_heads // tp, g.num_groups // tp, g.head_dim, g.state_size
    width = 2 * h * p + 2 * groups * n + h
    across = passes_states(at.layout.linear_cp, g.num_groups, tp, at.layout.cp)
    exact = at.layout.cp > 1 and not across
    kept = at.outer(d) + at.inner(width if exact else aligned(width)) + at.inner(6 * h * p + 2 * h * n)
    kept += at.inner(2 * (4 * h + groups)) + (0 if exact else _padded_weight(width, arch))
    if across:
        kept += at.inner(groups * n + h * p + 2 * h) + at.states(int(1.5 * h * p * n))
    work = at.inner(2 * h * p * n / CHUNK + 2 * h * n + h * p)
    return Half(kept, work, at.outer(d))


MIXERS = {"mla": mla, "gdn": gdn, "mamba2": mamba2}


def teacher_work(arch: Architecture, at: Share) -> int:
    """A Transformer layer without a backward pass: x and its norm beside gate, up and their product, or beside q, k
    and v, rotated, and the output. Context parallelism: keys and values at hand, joined and coming, those of a rank
    written out for every head, and outputs of this rank and of all so far (fp32), scaled and added."""
    tp, heads, keys = at.layout.tp, arch.num_attention_heads, arch.num_key_value_heads
    tensors = 10 * heads + 6 * keys if at.layout.cp > 1 else 3 * heads + 4 * keys
    attention = at.inner(tensors * arch.head_dim / tp)
    return 2 * at.outer(arch.hidden_size) + max(at.inner(3 * arch.intermediate_size / tp), attention)
