"""Bytes that a layer sends from rank to rank under context parallelism: formulas, and the table of the docs."""

from dataclasses import replace

from hylo_megatron.config import Architecture, geometry_preset
from hylo_megatron.config.layout import ParallelLayout
from hylo_megatron.mixers import MIXERS, window
from hylo_megatron.mixers.memory import Share
from hylo_megatron.mixers.sent import Passes
from hylo_megatron.recipes.shapes import shape

FORMULAS = {
    "MLA, all-gather": ("(n-1) T (R+P) e", "(n-1) T (R+P) e"),
    "MLA, ring": ("(n-1) T (R+P) e", "(n-1) T (R+P) e + 4 n T (R+P)"),
    "GDN, all-to-all": ("(n-1)/n T (C+Y) e", "(n-1)/n T (C+Y) e"),
    "GDN, states": ("(n-1) 2B (4 H K (K+V) + (W-1) N e)", "(n-1) 2B (4 H K V + (W-1) N e)"),
    "Mamba-2, all-to-all": ("(n-1)/n T (C+Y) e", "(n-1)/n T (C+Y) e"),
    "Mamba-2, states": ("(n-1) 2B (4 H (K V + 1) + (W-1) N e)", "(n-1) 2B (4 H K V + (W-1) N e)"),
    "window, halo": ("(n-1)/n B (2 (w-1) + s) 2 G d e", "(n-1)/n B (2 (w-1) + s) 2 G d e"),
}
KINDS = {"MLA": "mla", "GDN": "gdn", "Mamba-2": "mamba2"}
WAYS = {
    "all-gather": {"exchange": "all_gather"}, "ring": {"exchange": "p2p"}, "all-to-all": {"linear_cp": "a2a"},
    "states": {"linear_cp": "states"}, "halo": {},
}  # fmt: skip
WINDOW = {"size": 256, "sinks": 4}


def sent(choice: str, arch: Architecture, ranks: int, tokens: int, batch: int) -> Passes:
    """Return the bytes that a rank with ``tokens`` tokens of ``batch`` sequences sends in a layer, in bf16."""
    kind, way = choice.split(", ")
    at = Share(ParallelLayout(cp=ranks, **WAYS[way]), batch, tokens // batch)
    part = window if kind == "window" else MIXERS[KINDS[kind]].part("sent")
    found = part.exchange(arch, at)
    return found.waited + found.behind


def divides(choice: str, arch: Architecture, ranks: int) -> bool:
    """Whether an all-to-all can distribute the heads of the mixer."""
    kind, way = choice.split(", ")
    if way != "all-to-all":
        return True
    _, heads = MIXERS[KINDS[kind]].heads
    return getattr(getattr(arch.geometry, KINDS[kind]), heads) % ranks == 0


def table() -> str:
    """Return the formulas, and their values for a published shape: Llama-3.2-1B at 64K tokens in bf16."""
    length, sizes, base = 65536, (2, 4, 8), shape("llama1b")
    lines = ["| layer, choice | a rank sends, forward | backward |", "|---|---|---|"]
    lines += [f"| {choice} | {forward} | {backward} |" for choice, (forward, backward) in FORMULAS.items()]
    head = " | ".join(f"n = {n}" for n in sizes)
    lines += ["", f"| geometry | layer, choice | {head} |", "|---|---|" + "---:|" * len(sizes)]
    for preset in ("published", "native"):
        geometry = geometry_preset(preset, base.hidden_size, base.num_attention_heads, base.head_dim)
        arch = replace(base, geometry=geometry, window=WINDOW)
        for choice in FORMULAS:
            cells = []
            for n in sizes:
                passes = sent(choice, arch, n, length // n, 1)
                both = (passes.forward + passes.backward) * n / length
                cells.append(f"{both:,.0f}" if divides(choice, arch, n) else "does not divide")
            lines.append(f"| {preset} | {choice} | {' | '.join(cells)} |")
    return "\n".join(lines)
