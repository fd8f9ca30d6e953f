#!/usr/bin/env python3
"""What serving a model takes, and what fits on a GPU, beside its base Transformer; nothing is loaded:

    python tools/plan_memory.py FOLDER [--gpu-gib 141] [--tp 1]              an exported or a base model's folder
    python tools/plan_memory.py FOLDER --plan 6MLA22GDN --geometry native    the hybrid that a base model would become

Bytes as vLLM lays them out: pages of one size for all layers, a state in each (docs/serving.md compares with its log).
"""

import argparse
import json
import sys
from dataclasses import replace
from math import prod
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from hylo_megatron.config import Architecture, geometry_preset, parse_plan  # noqa: E402
from hylo_megatron.convert.shapes import hf_shapes  # noqa: E402
from hylo_megatron.errors import HyLoError, command_line  # noqa: E402
from hylo_megatron.vllm.geometry import serve  # noqa: E402
from hylo_megatron.vllm.pages import Pages, expanded_bytes, pages, row_bytes, state_bytes  # noqa: E402

LENGTHS = (2048, 32768, 1 << 20)
GIB = 1 << 30
ACTIVATIONS = GIB  # what vLLM's profile run of 16K tokens left of a 3B model


def read(folder: Path) -> Architecture:
    path = folder / "config.json"
    if not path.exists():
        raise HyLoError(f"{path} is missing: give the folder of an exported model or of its base model")
    if json.loads(path.read_text()).get("model_type") == "hylo":
        from hylo_megatron.hf import HyLoConfig

        return HyLoConfig.from_pretrained(folder).to_architecture()
    from hylo_megatron.convert.hf_folder import read_architecture

    return read_architecture(folder)


def weight_bytes(arch: Architecture, tp: int) -> int:
    """bf16; what is not cut by tensor parallelism is small beside the rest."""
    return 2 * sum(prod(shape) for shape in hf_shapes(arch).values()) // tp


def rows(arch: Architecture, known) -> list[tuple[str, str]]:
    budget = int(known.gpu_gib * GIB * known.utilization) - weight_bytes(arch, known.tp) - ACTIVATIONS
    heads, found = arch.num_attention_heads, [("weights", f"{weight_bytes(arch, known.tp) / GIB:.2f} GiB")]
    if arch.is_hybrid:
        served = serve(arch.geometry, set(arch.plan), heads, arch.mla_qk_norm, on_gpu=True)
        found += [("as served", note) for note in served.notes]
        itemsize = 4 if known.state_dtype == "float32" else 2
        layout = pages(served, arch.plan, heads, state_itemsize=itemsize, tp=known.tp)
        row = row_bytes(served, heads, tp=known.tp) * layout.layers[0]
        states = state_bytes(served, arch.linear_kind, state_itemsize=itemsize, tp=known.tp) * layout.layers[1]
        space = max(known.requests * layout.block, 64 * 1024) * expanded_bytes(served, heads, tp=known.tp)
        found += [("states of a request", f"{states / 2**20:.1f} MiB"),
                  ("work space", f"{space / GIB:.2f} GiB for {known.requests} requests at once")]  # fmt: skip
        budget -= space
    else:
        row = arch.kv_bytes_per_token() // known.tp
        layout = Pages(16, 16 * row // arch.num_layers, (arch.num_layers, 0))
    found += [("cache of a token", f"{row:,} bytes"), ("block", f"{layout.block:,} tokens"),
              ("left for caches", f"{budget / GIB:.1f} GiB")]  # fmt: skip
    for length in LENGTHS:
        requests = layout.requests(max(0, budget), length)
        each = f"{budget / (requests * length):,.0f} bytes a token with its pages" if requests else "none fits"
        found.append((f"requests of {length:,}", f"{requests:,} ({requests * length:,} tokens; {each})"))
    return found


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--plan", help="layers of the hybrid that a base model would become, such as 6MLA22GDN")
    parser.add_argument("--geometry", default="native")
    parser.add_argument("--gpu-gib", type=float, default=139.8, help="memory of the GPU (default: an H200's)")
    parser.add_argument("--utilization", type=float, default=0.9, help="vLLM's --gpu-memory-utilization")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--requests", type=int, default=64, help="vLLM's --max-num-seqs")
    parser.add_argument("--state-dtype", choices=("float32", "bfloat16"), default="float32")
    known = parser.parse_args()
    arch = read(known.folder)
    if known.plan:
        if arch.is_hybrid:
            raise HyLoError("--plan is for a base model; this folder holds a hybrid")
        geometry = geometry_preset(known.geometry, arch.hidden_size, arch.num_attention_heads, arch.head_dim)
        arch = replace(arch, plan=parse_plan(arch.num_layers, known.plan), geometry=geometry)
    models = {"hybrid": arch, "base": arch.as_teacher()} if arch.is_hybrid else {"base": arch}
    for name, model in models.items():
        print(f"{name}: {model.num_layers} layers, {sum(kind == 'mla' for kind in model.plan)} of them MLA")
        for what, value in rows(model, known):
            print(f"  {what:24} {value}")


if __name__ == "__main__":
    main()
