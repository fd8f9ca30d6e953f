"""Draw a token per row from logits: temperature, nucleus (top-p) and one uniform number per row.

The uniform numbers are a hash of seed, row and position, so a row draws the same numbers in whatever batch it is.
"""

from torch import Tensor

GOLDEN, FIRST, SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # splitmix64, as signed numbers
BITS = 24  # fp32 holds every multiple of 2**-24 below 1


def _shifted(x: Tensor, by: int) -> Tensor:
    """Return ``x >> by`` of unsigned 64-bit numbers."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _mixed(x: Tensor) -> Tensor:
    """Return splitmix64's finalizer of int64 ``x``; products wrap around."""
    x = (x ^ _shifted(x, 30)) * FIRST
    x = (x ^ _shifted(x, 27)) * SECOND
    return x ^ _shifted(x, 31)


def uniforms(seed: int, row: Tensor, position: Tensor) -> Tensor:
    """Return fp32 numbers from 0 to below 1, one for each (row, position), both int64."""
    stream = _mixed(row * GOLDEN + (seed + 1) % 2**63)
    return _shifted(_mixed(stream + (position + 1) * GOLDEN), 64 - BITS).float() * 2.0**-BITS


def draw(logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float) -> Tensor:
    """Return token ids [B]: the first of the nucleus, in the vocabulary's order, whose cumulative share exceeds the
    uniform number.

    The nucleus is the smallest set of the likeliest tokens that has the share ``top_p``, and all tokens as likely as
    its last one.
    """
    shares = (logits_BV.float() / temperature).softmax(-1)
    if top_p < 1:
        ordered = shares.sort(-1, descending=True).values
        last = (ordered.cumsum(-1) < top_p).sum(-1, keepdim=True).clamp_max(shares.shape[-1] - 1)
        shares = shares.where(shares >= ordered.gather(-1, last), 0)
    sums = shares.double().cumsum(-1)
    return (sums <= uniform_B[:, None].double() * sums[:, -1:]).sum(-1).clamp_max(shares.shape[-1] - 1)
