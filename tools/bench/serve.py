#!/usr/bin/env python3
"""Measure a base Transformer and its hybrid in vLLM, one after the other on one GPU, with random weights.

    python tools/bench/serve.py --out DIR [--shape llama3b] [--plan 6MLA22GDN] [--lengths 8192 65536 1048576]
    python tools/bench/serve.py --out DIR --shape smollm2 --plan 6MLA24GDN --window 256+4 --models hybrid hybrid-torch

Measures the time to the first token and per further token at each length, the throughput of concurrent requests, and
the cache bytes per token as vLLM allocates them (memory of the caches divided by the tokens that fit). The floor of a
prompt is its matrix products at the rate of a large product; the floor of a token is its weights and cache at the rate
of a large copy. Both rates are measured too. ``hybrid-torch`` is the hybrid whose windows torch code decodes, where
``hybrid`` uses the Triton kernel. Writes DIR/serve.json and a plot.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from hylo_megatron.config import Architecture, Plan
from hylo_megatron.config.positions import Window, window
from hylo_megatron.config.student import student_architecture
from hylo_megatron.errors import HyLoError
from hylo_megatron.flags import command_line
from hylo_megatron.mixers.window import cached_values
from hylo_megatron.planner.pages import state_bytes
from hylo_megatron.recipes.shapes import SHAPES
from hylo_megatron.serve.geometry import serve

WORKER = Path(__file__).with_name("serve_one.py")
TINY = replace(
    SHAPES["smollm2"], plan=Plan.transformer(4), vocab_size=512, hidden_size=128, intermediate_size=256,
    num_attention_heads=2, num_key_value_heads=1,
)  # fmt: skip
PAIRS = [(length, requests) for length in (2048, 32768) for requests in (1, 16, 64)]
ROOM = 128  # room for decoded tokens
DECODES = {"hybrid-torch": {"HYLO_SERVE_WINDOW": "torch"}}  # of models that differ in the environment only


def architectures(shape: str, plan: str, longest: int, window: Window | None = None) -> dict[str, Architecture]:
    base = replace(TINY if shape == "tiny" else SHAPES[shape], max_position_embeddings=longest)
    hybrid = student_architecture(base, Plan.parse(base.num_layers, plan), "native", window=window)
    return {"hybrid": hybrid, "hybrid-torch": hybrid, "base": base}


def write_config(folder: Path, arch: Architecture) -> None:
    from random_model import transformers_config

    from hylo_megatron.hf import HyLoConfig

    config = HyLoConfig.from_architecture(arch) if arch.is_hybrid else transformers_config(arch)
    config.dtype = "bfloat16"
    config.save_pretrained(folder)


def rates() -> dict:
    """Measure FLOP/s of a large bf16 product and bytes/s of a large copy (read and write) on this GPU."""
    from timing import card, copy_rate, this_device

    from hylo_megatron.engine.product_rate import measured_rate

    device = this_device()
    if device.type != "cuda":
        raise HyLoError(
            "tools/bench/serve.py measures on a GPU, and there is none: give --rates 1e12 1e10 to run without"
        )
    copied, multiplied = copy_rate(device), measured_rate(device)  # the second frees the memory, which vLLM needs
    return {"flops": multiplied, "bytes": copied, "gpu": card(device)}


def floors(arch: Architecture, length: int, rate: dict) -> dict:
    """Return the least seconds for the products of a prompt of ``length``, and for the bytes of one more token."""
    from math import prod

    from hylo_megatron.config.shapes import hf_shapes

    shapes = hf_shapes(arch)
    weights = sum(prod(shape) for name, shape in shapes.items() if ".layers." in name and len(shape) == 2)
    head = arch.vocab_size * arch.hidden_size
    widths = {"attention": (arch.head_dim, arch.head_dim)}
    if arch.geometry:
        mla = arch.geometry.mla
        widths["mla"] = mla.qk_nope_head_dim + mla.qk_rope_head_dim, mla.v_head_dim
    scores = sum(arch.num_attention_heads * sum(widths[kind]) for kind in arch.plan if kind in widths)
    attention = length * (length + 1) * scores  # two FLOPs, and half of the square
    cached = length * arch.kv_bytes_per_token() + states(arch)
    return {
        "first_token": (2 * weights * length + attention + 2 * head) / rate["flops"],
        "attention_only": attention / rate["flops"],
        "per_token": (2 * (weights + head) + cached) / rate["bytes"],
    }


def states(arch: Architecture) -> int:
    """Return the bytes that a token moves of a request's recurrent states, in fp32, and of its windows, in bf16.

    States are read and written. Windows are read.
    """
    if not arch.is_hybrid:
        return 0
    served = serve(arch.geometry, set(arch.plan), arch.num_attention_heads, arch.mla_qk_norm, on_gpu=True)
    linear = sum(kind not in ("mla", "attention") for kind in arch.plan)
    # twice the bytes of states, and two bytes for each value of a window
    return linear * 2 * (state_bytes(served, arch.linear_kind, state_itemsize=4) + cached_values(arch))


def measure(folder: Path, spec: dict, limit: float) -> tuple[list[dict], str]:
    """Return the measurements, and why they ended early if they did."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "measured.jsonl").unlink(missing_ok=True)
    (folder / "spec.json").write_text(json.dumps(spec))
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0",
           **os.environ, **DECODES.get(folder.name, {})}  # fmt: skip
    with (folder / "log.txt").open("w") as log:
        try:
            code = subprocess.run([sys.executable, str(WORKER), str(folder)], stdout=log, stderr=log, env=env,
                                  timeout=limit).returncode  # fmt: skip
            failed = f"{folder.name} ended with {code}: {folder / 'log.txt'} says why" if code else ""
        except subprocess.TimeoutExpired:
            failed = f"{folder.name} was stopped after {limit:.0f} s (--limit)"
    lines = folder / "measured.jsonl"
    return [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else [], failed


def table(result: dict) -> str:
    lines = []
    for name, found in result["models"].items():
        for line in found:
            if line["what"] == "engine":
                sizes = ", ".join(f"{n}: {x:,.0f}" for n, x in line["bytes_per_token"].items())
                lines.append(f"{name}: loaded in {line['load_seconds']:.0f} s; cache bytes a token at {sizes}")
            elif line["what"] == "latency":
                low = line["floor"]
                lines.append(
                    f"{name} {line['length']:>9,}: first token {line['first_token']:.3f} s (floor"
                    f" {low['first_token']:.3f}), a token {1e3 * line['per_token']:.2f} ms"
                    f" (floor {1e3 * low['per_token']:.2f})"
                )
            elif line["what"] == "too long":
                lines.append(f"{name} {line['length']:>9,}: does not fit, {line['fits']:,} do")
            elif line["what"] == "profile":
                top = ", ".join(f"{ms:.3f} {key[:40]}" for key, (_, ms) in list(line["kernels"].items())[:6])
                lines.append(
                    f"{name}: a {line['of']}'s time {line['step_ms']:.2f} ms, kernels {line['kernels_ms']:.2f}: {top}"
                )
            else:
                lines.append(
                    f"{name} {line['requests']} x {line['length']:,}: {line['tokens_per_s']:,.0f} tokens/s,"
                    f" {line['decoded_per_s']:,.0f} decoded tokens/s after the last prompt"
                )
    return "\n".join(lines)


def plot(result: dict, path: Path) -> None:
    """Plot times over lengths, if matplotlib is installed."""
    from hylo_megatron.evaluate.plots import new_figure  # imports torch and transformers, which parsing does not need

    try:
        figure = new_figure(9, 3.5)
    except HyLoError as missing:
        return print(f"no {path.name}: {missing}")
    axes = figure.subplots(1, 2)
    for name, found in result["models"].items():
        points = [line for line in found if line["what"] == "latency"]
        for axis, key, scale in ((axes[0], "first_token", 1), (axes[1], "per_token", 1e3)):
            lengths = [line["length"] for line in points]
            (drawn,) = axis.loglog(lengths, [scale * line[key] for line in points], "o-", label=name)
            axis.loglog(lengths, [scale * line["floor"][key] for line in points], ":", color=drawn.get_color())
    for axis, title in zip(axes, ("time to first token, s", "time per output token, ms"), strict=True):
        axis.set(title=title, xlabel="tokens in the prompt (dotted: floor)")
        axis.legend()
    figure.savefig(path, dpi=120)


def pair(text: str) -> tuple[int, int]:
    """Parse ``LENGTHxREQUESTS``. If this raises, argparse prints "invalid pair value"."""
    length, requests = (int(number) for number in text.split("x"))
    return length, requests


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=(*SHAPES, "tiny"), default="llama3b")
    parser.add_argument("--plan", default="6MLA22GDN")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 65536, 262144, 1048576, 2097152])
    parser.add_argument("--concurrent", type=pair, nargs="*", default=PAIRS, help="LENGTHxREQUESTS")
    parser.add_argument("--window", type=window, help="windows beside the hybrid's linear layers, SIZE[+SINKS]")
    parser.add_argument("--models", nargs="+", choices=("hybrid", *DECODES, "base"), default=["hybrid", "base"])
    parser.add_argument("--engine", type=json.loads, default={}, help="further arguments of vllm.LLM, as JSON")
    parser.add_argument(
        "--profile", action="store_true", help="profile the kernels of a prompt and of a token at the first length"
    )
    parser.add_argument("--limit", type=float, default=3600, help="time limit of each model, in seconds")
    parser.add_argument("--rates", type=float, nargs=2, help="FLOP/s and bytes/s, in place of measured ones")
    known = parser.parse_args()
    rate = dict(zip(("flops", "bytes"), known.rates, strict=True)) if known.rates else rates()
    if set(DECODES) & set(known.models) and not known.window:
        parser.error("--models hybrid-torch: expected --window with it, because the two differ in windows only")
    models = architectures(known.shape, known.plan, max(known.lengths) + ROOM, known.window or None)
    engine = {"gpu_memory_utilization": 0.9, "max_num_batched_tokens": 16384, **known.engine}
    spec = dict(lengths=known.lengths, concurrent=known.concurrent, engine=engine, profile=known.profile)
    result = {"shape": known.shape, "plan": known.plan, "window": known.window or None, "rates": rate}
    result |= {"engine": engine, "models": {}}
    failures = []
    for name in known.models:
        write_config(known.out / name, models[name])
        found, failed = measure(known.out / name, spec, known.limit)
        failures += [failed] if failed else []
        for line in found:
            if line["what"] == "latency":
                line["floor"] = floors(models[name], line["length"], rate)
        result["models"][name] = found
        (known.out / "serve.json").write_text(json.dumps(result, indent=1))
    print(
        f"products at {rate['flops'] / 1e12:.0f} TFLOP/s, copies at {rate['bytes'] / 1e12:.2f} TB/s\n{table(result)}"
    )
    plot(result, known.out / "serve.png")
    if failures:
        raise HyLoError("; ".join(failures))


if __name__ == "__main__":
    main()
