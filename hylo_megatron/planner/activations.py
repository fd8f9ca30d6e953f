"""Bytes that one sub-layer's backward pass keeps, and what it works in (``mixers/memory.py`` has the units).

``tests/programs/activation_bytes.py`` counts the same tensors.
"""

from dataclasses import replace

from hylo_megatron.config import Architecture
from hylo_megatron.config.decisions import mlp_rows
from hylo_megatron.config.positions import has_window, rotary_width
from hylo_megatron.mixers import MIXERS, window
from hylo_megatron.mixers.memory import Share, SubLayer


def mixer(kind: str, arch: Architecture, at: Share, frozen_window: bool = False) -> SubLayer:
    """Return bytes of the mixer ``kind`` with its norm. ``frozen_window``: see ``window.beside``."""
    block = MIXERS[kind].part("memory").activations(arch, at)
    return window.beside(block, arch, at, frozen_window) if has_window(arch.window, kind) else block


def tables(arch: Architecture, kinds: set[str], at: Share) -> int:
    """Return bytes that all layers of each of ``kinds`` share, such as rotary tables."""
    linear = {kind for kind in kinds if MIXERS[kind].linear}
    shared = sum(MIXERS[kind].part("memory").tables(arch, at) for kind in kinds - linear)
    shared += window.tables(arch, at) if any(has_window(arch.window, kind) for kind in kinds) else 0
    return shared + sum(_linear_table(kind, arch, at) for kind in linear if arch.linear_rope)


def _linear_table(kind: str, arch: Architecture, at: Share) -> int:
    """Return bytes of fp32 cosines and sines for the positions of this rank, or of all ranks with all-to-all."""
    ranks = 1 if at.layout.passes_states else at.layout.cp
    return 4 * at.length * ranks * rotary_width(kind, arch.geometry)


def mlp(arch: Architecture, at: Share, trained: bool) -> SubLayer:
    """Return bytes of the MLP with its norm.

    Kept are x and gate | up. Trained weights need the normed x and SwiGLU's result too, others the norm's fp32
    statistics.
    """
    d, f = arch.hidden_size, arch.intermediate_size / at.layout.tp
    kept, rest = at.outer(d) + at.inner(2 * f), at.outer(d) + at.inner(f)
    statistics = at.outer(2)
    work = at.inner(2 * f) + (at.outer(d) if trained else rest)  # gradients of gate | up, of the result and of x
    return SubLayer(kept + (rest if trained else statistics), work, at.outer(d))


def one_block(arch: Architecture, at: Share, block: int | None) -> Share:
    """Return the part of ``at`` that an MLP whose values are not kept computes at once; ``at`` where it runs whole."""
    tp = at.layout.tp
    gathered = tp if at.layout.sequence_parallel else 1
    rows = mlp_rows(at.length // gathered, at.sequences * gathered, 2 * arch.intermediate_size // tp, block)
    return replace(at, length=rows * gathered)


def mlp_block_by_block(arch: Architecture, at: Share, part: Share, trained: bool) -> SubLayer:
    """Return bytes of an MLP that is recomputed in blocks like ``part``: its input, and the gradient of that.

    Trained weights need fp32 sums of their gradients over the blocks, and the gradients of one block.
    """
    d, whole = arch.hidden_size, mlp(arch, part, trained)
    gradients = (4 + 2) * 3 * d * arch.intermediate_size // at.layout.tp if trained else 0
    return SubLayer(at.outer(d), at.outer(d) + whole.kept + whole.work + gradients, at.outer(d))


def teacher_work(arch: Architecture, at: Share, part: Share) -> int:
    """Return the peak of a Transformer layer without a backward pass, whose MLP runs in blocks like ``part``.

    Its input stands beside the larger of (a) the MLP's output and of a block the norm, gate, up and their product,
    (b) the norm, q, k, v, rotated, and the output. With context parallelism (b) also has the own keys and values
    side by side, those of all ranks, and the output of one block beside that of all so far, which is fp32 with more
    than two ranks.
    """
    tp, heads, keys = at.layout.tp, arch.num_attention_heads, arch.num_key_value_heads
    tensors, cp = 3 * heads + 4 * keys, at.layout.cp
    if cp > 1:
        tensors += heads * (1 if cp == 2 else 2) + 2 * keys * (1 + cp)
    attention = at.outer(arch.hidden_size) + at.inner(tensors * arch.head_dim / tp)
    mlp_work = part.outer(arch.hidden_size) + part.inner(3 * arch.intermediate_size / tp)
    if part != at:
        mlp_work += at.outer(arch.hidden_size)
    return at.outer(arch.hidden_size) + max(mlp_work, attention)
