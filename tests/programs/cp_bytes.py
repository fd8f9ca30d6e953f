"""What a layer sends from rank to rank under context parallelism: formulas, the table of the docs, and a count.

``python cp_bytes.py`` writes the table into docs/parallelism.md. Under torchrun: runs each mixer once, forward and
backward, counts what it hands to torch.distributed, and prints a JSON line for each beside the formula's numbers.
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

from helpers.paths import DOCS

from hylo_megatron.config import GDNGeometry, Geometry, Mamba2Geometry, geometry_preset

TABLE = DOCS / "parallelism.md"
STATE = 4  # bytes: states, and the ring's gradients, travel in fp32
FORMULAS = {
    "MLA, all-gather": ("(n-1) T (R+P) e", "(n-1) T (R+P) e"),
    "MLA, ring": ("(n-1) T (R+P) e", "(n-1) T (R+P) e + 4 n T (R+P)"),
    "GDN, all-to-all": ("(n-1)/n T (C+Y) e", "(n-1)/n T (C+Y) e"),
    "GDN, states": ("(n-1) 2B (4 H K (K+V) + (W-1) N e)", "(n-1) 2B (4 H K V + (W-1) N e)"),
    "Mamba-2, all-to-all": ("(n-1)/n T (C+Y) e", "(n-1)/n T (C+Y) e"),
    "Mamba-2, states": ("(n-1) 2B (4 H (K V + 1) + (W-1) N e)", "(n-1) 2B (4 H K V + (W-1) N e)"),
}


@dataclass(frozen=True)
class Linear:
    """``channels`` of the projection, ``convolved`` of them, ``outputs`` of the mixer; ``transfer`` a head."""

    heads: int
    divides: int  # heads, or groups, that an all-to-all deals out
    channels: int
    convolved: int
    outputs: int
    state: int
    transfer: int
    taps: int


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


def sent(choice: str, geometry: Geometry, ranks: int, tokens: int, batch: int, element: int) -> tuple[int, int] | None:
    """Bytes that a rank sends in a layer, forward and backward; ``tokens``: its own. None: heads do not divide."""
    others, (kind, way) = ranks - 1, choice.split(", ")
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
    """The formulas, and their values for a published shape: Llama-3.2-1B at 64K tokens in bf16."""
    length, sizes = 65536, (2, 4, 8)
    lines = ["| layer, choice | a rank sends, forward | backward |", "|---|---|---|"]
    lines += [f"| {choice} | {forward} | {backward} |" for choice, (forward, backward) in FORMULAS.items()]
    head = " | ".join(f"n = {n}" for n in sizes)
    lines += ["", f"| geometry | layer, choice | {head} |", "|---|---|" + "---:|" * len(sizes)]
    for preset in ("published", "native"):
        geometry = geometry_preset(preset, 2048, 32, 64)
        for choice in FORMULAS:
            cells = []
            for n in sizes:
                both = sent(choice, geometry, n, length // n, 1, 2)
                cells.append(f"{sum(both) * n / length:,.0f}" if both else "does not divide")
            lines.append(f"| {preset} | {choice} | {' | '.join(cells)} |")
    return "\n".join(lines)


def in_docs(text: str, new: str | None = None) -> str:
    """The table that stands in the docs; or, with ``new``, the docs with that one."""
    pattern = re.compile(r"(?<=<!-- cp-bytes:begin -->\n).*?(?=\n<!-- cp-bytes:end -->)", re.S)
    return pattern.search(text)[0] if new is None else pattern.sub(lambda _: new, text)


# ---- the count, under torchrun ----


def counter():
    """A context that adds up what this process hands to collectives, as ``.bytes``."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    size = torch.distributed.get_world_size()

    def own(x) -> float:
        return x.numel() * x.element_size()

    # bytes that leave this rank, of the operation's arguments
    outgoing: dict[str, Callable] = {
        "_allgather_base_": lambda out, x, *_: (size - 1) * own(x),
        "_reduce_scatter_base_": lambda out, x, *_: (size - 1) * own(x) // size,
        "alltoall_base_": lambda out, x, *_: (size - 1) * own(x) // size,
        "send": lambda tensors, *_: sum(map(own, tensors)),
        "recv_": lambda *_: 0,
    }

    class Counter(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "c10d":
                self.bytes += outgoing[func._opname](*args)
            return func(*args, **(kwargs or {}))

    return Counter()


def make(choice: str, geometry: Geometry, dtype, groups):
    from helpers import tiny
    from megatron.core.transformer.spec_utils import build_module

    from hylo_megatron.layers import specs
    from hylo_megatron.layers.load import layout_config
    from hylo_megatron.mixers import MIXERS

    def layer(kind: str, linear_cp: str = "auto"):
        return MIXERS[kind].part("megatron_module").layer_spec(specs.backend("local"), arch, linear_cp).submodules

    kind, way = choice.split(", ")
    arch = tiny.hybrid("mamba2" if kind == "Mamba-2" else "gdn", geometry=geometry)
    common = dict(config=layout_config(arch, dtype), layer_number=1, pg_collection=groups)
    if kind == "MLA":
        comm = {"all-gather": "all_gather", "ring": "p2p"}[way]
        return build_module(layer("mla").self_attention, **common, cp_comm_type=comm)
    linear_cp = {"all-to-all": "a2a", "states": "states"}[way]
    if kind == "GDN":
        return build_module(layer("gdn", linear_cp).self_attention, **common)
    return build_module(layer("mamba2", linear_cp).mixer, **common, d_model=arch.hidden_size)


def main() -> None:
    import torch
    import torch.distributed as dist
    from helpers import tiny
    from helpers import train as train_helpers  # noqa: F401  starts the engine
    from megatron.core.process_groups_config import ProcessGroupCollection

    from hylo_megatron.layers.load import start_process_groups

    dist.init_process_group("gloo")
    size, tokens, batch = dist.get_world_size(), 20, 2
    start_process_groups(cp=size)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    geometry = Geometry(tiny.GEOMETRY.mla, GDNGeometry(4, 8, 8, 12), Mamba2Geometry(8, 8, 12, 4))
    for choice in FORMULAS:
        for dtype in (torch.float32, torch.bfloat16):
            mixer = make(choice, geometry, dtype, groups)
            hidden = torch.randn(tokens, batch, tiny.HIDDEN, dtype=dtype).requires_grad_()
            with counter() as forward:
                out, _ = mixer(hidden, None)
            with counter() as backward:
                out.sum().backward()
            want = sent(choice, geometry, size, tokens * batch, batch, dtype.itemsize)
            line = {"choice": choice, "dtype": str(dtype), "sent": [forward.bytes, backward.bytes], "formula": want}
            if dist.get_rank() == 0:
                print(json.dumps(line), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" in os.environ:
        main()
    else:
        TABLE.write_text(in_docs(TABLE.read_text(), table()))
