"""Bytes that a layer sends from rank to rank under context parallelism: formulas, and the table of the docs."""

from dataclasses import dataclass

from hylo_megatron.config import GDNGeometry, Geometry, Mamba2Geometry, geometry_preset

STATE = 4  # bytes: states, and the ring's gradients, travel in fp32
FORMULAS = {
    "MLA, all-gather": ("(n-1) T (R+P) e", "(n-1) T (R+P) e"),
    "MLA, ring": ("(n-1) T (R+P) e", "(n-1) T (R+P) e + 4 n T (R+P)"),
    "GDN, all-to-all": ("(n-1)/n T (C+Y) e", "(n-1)/n T (C+Y) e"),
    "GDN, states": ("(n-1) 2B (4 H K (K+V) + (W-1) N e)", "(n-1) 2B (4 H K V + (W-1) N e)"),
    "Mamba-2, all-to-all": ("(n-1)/n T (C+Y) e", "(n-1)/n T (C+Y) e"),
    "Mamba-2, states": ("(n-1) 2B (4 H (K V + 1) + (W-1) N e)", "(n-1) 2B (4 H K V + (W-1) N e)"),
    "window, halo": ("(n-1)/n B (2 (w-1) + s) 2 G d e", "(n-1)/n B (2 (w-1) + s) 2 G d e"),
}


@dataclass(frozen=True)
class Linear:
    """Sizes of a linear block that decide what it sends."""

    heads: int
    divides: int  # heads, or groups, that an all-to-all deals out
    channels: int  # of the input projection
    convolved: int  # those of them that the convolution takes
    outputs: int  # of the mixer, before the output projection
    state: int  # numbers in a head's state
    transfer: int  # numbers in a head's transfer matrix
    taps: int  # of the convolution


@dataclass(frozen=True)
class Window:
    """Sizes of a window: its tokens, its sinks, and the key heads of ``width`` values."""

    size: int
    sinks: int
    groups: int
    width: int


@dataclass(frozen=True)
class Model:
    geometry: Geometry
    window: Window


def gdn(g: GDNGeometry) -> Linear:
    keys, values = g.num_key_heads * g.key_head_dim, g.num_value_heads * g.value_head_dim
    return Linear(
        g.num_value_heads, g.num_key_heads, 2 * keys + 2 * values + 2 * g.num_value_heads, 2 * keys + values, values,
        g.key_head_dim * g.value_head_dim, g.key_head_dim**2, g.conv_kernel,
    )  # fmt: skip


def mamba2(g: Mamba2Geometry) -> Linear:
    values, shared = g.num_heads * g.head_dim, 2 * g.num_groups * g.state_size
    return Linear(
        g.num_heads, g.num_groups, 2 * values + shared + g.num_heads, values + shared, values,
        g.head_dim * g.state_size, 1, g.conv_kernel,
    )  # fmt: skip


def sent(choice: str, model: Model, ranks: int, tokens: int, batch: int, element: int) -> tuple[int, int] | None:
    """Return the bytes that a rank with ``tokens`` tokens sends in a layer, forward and backward.

    For windows this is the mean of all ranks, whose chunks must not be shorter than the window. None where an
    all-to-all cannot deal out the heads.
    """
    geometry, window = model.geometry, model.window
    others, (kind, way) = ranks - 1, choice.split(", ")
    if kind == "window":
        moved = 2 * (window.size - 1) + window.sinks
        forward = others * batch * moved * 2 * window.groups * window.width * element // ranks
        return forward, forward
    if kind == "MLA":
        latents = tokens * (geometry.mla.kv_lora_rank + geometry.mla.qk_rope_head_dim)
        forward = others * latents * element
        return forward, forward + (ranks * latents * STATE if way == "ring" else 0)
    x = gdn(geometry.gdn) if kind == "GDN" else mamba2(geometry.mamba2)
    if way == "all-to-all":
        forward = others * tokens * (x.channels + x.outputs) * element // ranks
        return None if x.divides % ranks else (forward, forward)
    halo, rows = (x.taps - 1) * x.convolved * element, 2 * batch * others
    return rows * (x.heads * (x.transfer + x.state) * STATE + halo), rows * (x.heads * x.state * STATE + halo)


def table() -> str:
    """Return the formulas, and their values for a published shape: Llama-3.2-1B at 64K tokens in bf16."""
    length, sizes = 65536, (2, 4, 8)
    lines = ["| layer, choice | a rank sends, forward | backward |", "|---|---|---|"]
    lines += [f"| {choice} | {forward} | {backward} |" for choice, (forward, backward) in FORMULAS.items()]
    head = " | ".join(f"n = {n}" for n in sizes)
    lines += ["", f"| geometry | layer, choice | {head} |", "|---|---|" + "---:|" * len(sizes)]
    for preset in ("published", "native"):
        model = Model(geometry_preset(preset, 2048, 32, 64), Window(256, 4, 8, 64))
        for choice in FORMULAS:
            cells = []
            for n in sizes:
                both = sent(choice, model, n, length // n, 1, 2)
                cells.append(f"{sum(both) * n / length:,.0f}" if both else "does not divide")
            lines.append(f"| {preset} | {choice} | {' | '.join(cells)} |")
    return "\n".join(lines)
