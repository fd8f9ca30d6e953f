"""Measure attention across context-parallel ranks against one GPU, and check that both give the same result.

    torchrun --standalone --nproc-per-node 2 tools/bench/attention_ranks.py [--lengths N ..] [--parts teacher mla gdn]

Every measurement is a line of JSON. The last line has the verdict, and the exit code is 1 where a result is wrong.
Times are in milliseconds, the median of several runs on the slowest rank. Parts:

- ``teacher``: the attention of one layer of Llama-3.1-8B (32 query heads, 8 key heads of 128), forward only. Measured
  are one GPU, all ranks, the exchange alone, and each block of a rank alone with each of torch's kernels.
- ``mla``: MLA of Llama-3.2-1B with published dimensions (32 heads of 64, latents of 160), forward and backward.
- ``gdn``: a complete Gated DeltaNet mixer of the same model, forward and backward, with all-to-all and with states. It
  compiles fla's kernels, which takes minutes on a new machine.

Without a GPU everything runs at toy sizes with gloo.
"""

import argparse
import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timing import card, timed
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

ON_GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
TOLERANCE = 2e-2 if ON_GPU else 1e-5  # ‖difference‖ / ‖result‖ between all ranks and one
SAMPLED = 64  # queries that are computed in fp32 too
ALONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """``heads`` share ``groups`` key heads. ``latent`` and ``rope``: what MLA's ranks exchange of a token."""

    heads: int
    groups: int
    width: int
    latent: int
    rope: int
    mla_heads: int
    mla_width: int


SIZES = Sizes(heads=32, groups=8, width=128, latent=128, rope=32, mla_heads=32, mla_width=64)
TOY = Sizes(heads=4, groups=2, width=16, latent=12, rope=4, mla_heads=4, mla_width=8)


class Report:
    """Prints measurements on rank 0 and remembers what was wrong."""

    def __init__(self):
        self.wrong: list[str] = []

    def line(self, **values) -> None:
        if dist.get_rank() == 0:
            print(json.dumps(values), flush=True)

    def parity(self, what: str, error: float, limit: float = TOLERANCE) -> float:
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        if not max(errors) < limit:
            self.wrong.append(f"{what}: {max(errors):.2g}, allowed {limit:.2g}")
        return max(errors)


def milliseconds(run: Callable, runs: int = 5) -> float:
    """Return the median over runs of the slowest rank's time."""
    run(), run()
    times = []
    for _ in range(runs):
        timed(dist.barrier, device())
        times.append(timed(run, device())[0])
    slowest = torch.tensor(times, dtype=torch.float64, device=device())
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return round(statistics.median(slowest.tolist()) * 1e3, 3)


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if ON_GPU else torch.device("cpu")


def random(*shape: int) -> Tensor:
    """Return the same numbers on every rank."""
    generator = torch.Generator(device()).manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, device=device(), dtype=torch.float32).to(DTYPE)


def distance(got: Tensor, want: Tensor) -> float:
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


def attention(group, mode: str | None = None):
    from megatron.core.transformer.transformer_config import TransformerConfig

    from hylo_megatron.mixers.megatron_attention import CoreAttention

    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    return CoreAttention(config, 1, pg_collection=SimpleNamespace(cp=group), cp_comm_type=mode)


def exact(parts: list[Tensor], rows: Tensor) -> Tensor:
    """Return attention at some positions ``[rows, B, H*V]`` in fp32, with all scores in memory."""
    q, k, v = (x.float().permute(1, 2, 0, 3) for x in parts)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q[:, :, rows] @ k.mT * q.shape[-1] ** -0.5
    scores.masked_fill_(torch.arange(k.shape[2], device=q.device) > rows[:, None], -torch.inf)
    return (scores.softmax(-1) @ v).permute(2, 0, 1, 3).flatten(2)


def kernels() -> dict[str, list[SDPBackend]]:
    return {"flash": [SDPBackend.FLASH_ATTENTION], "cudnn": [SDPBackend.CUDNN_ATTENTION]} if ON_GPU else {}


def teacher_blocks(parts: list[Tensor], flops: float, report: Report) -> None:
    """Measure the two kinds of block of a rank, each with every kernel, and their joining."""
    from hylo_megatron.kernels import attention as blocks
    from hylo_megatron.kernels import ops_for

    q, k, v = (x.permute(1, 2, 0, 3) for x in parts)
    length, half, scale = q.shape[2], q.shape[2] // 2, q.shape[-1] ** -0.5
    made = {
        "own": lambda: blocks.attend(q, k, v, True, scale),
        "earlier rank's": lambda: blocks.attend(q, k[:, :, :half], v[:, :, :half], False, scale),
        "later rank's": lambda: blocks.attend(q[:, :, half:], k, v, False, scale),
    }
    for block, run in made.items():
        for name, chosen in {"chosen": None, **kernels()}.items():
            try:
                with torch.no_grad(), sdpa_kernel(chosen) if chosen else nullcontext():
                    took = milliseconds(run)
            except RuntimeError as error:  # this version of torch has no such kernel
                report.line(part="teacher", what=f"{block} block, {name}", tokens=length, error=str(error)[:200])
                continue
            rate = round(flops / took / 1e9, 1)
            report.line(part="teacher", what=f"{block} block, {name}", tokens=length, ms=took, tflops=rate)
    one, other = (blocks.attend(q, k[:, :, :half], v[:, :, :half], False, scale) for _ in range(2))
    took = milliseconds(lambda: ops_for(q).join_attention(*one, *other))
    report.line(part="teacher", what="joining two blocks of all queries", tokens=length, ms=took)


def teacher(length: int, sizes: Sizes, report: Report) -> None:
    from hylo_megatron.parallel.zigzag import zigzag_positions

    ranks, rank = dist.get_world_size(), dist.get_rank()
    here = zigzag_positions(length // ranks, ranks, rank).to(device())
    whole = [random(length, 1, heads, sizes.width) for heads in (sizes.heads, sizes.groups, sizes.groups)]
    whole[1] = whole[1].roll(1, 0)
    mine = [x[here].contiguous() for x in whole]
    flops = 2 * length**2 * sizes.heads * sizes.width  # causal: half of 4 S² H K
    alone = attention(ALONE)
    with torch.no_grad():
        one = milliseconds(lambda: alone(*whole), 3)
        report.line(part="teacher", what="one GPU", tokens=length, ms=one, tflops=round(flops / one / 1e9, 1))
        want = alone(*whole)
        # Not the first queries: with few keys their outputs are so large that they alone would count.
        sampled = torch.linspace(length // SAMPLED, length - 1, SAMPLED, device=device()).long()
        noise = distance(want[sampled], exact(whole, sampled))
        report.line(part="teacher", what="one GPU against fp32", tokens=length, error=noise)
        for mode in ("auto", "all_gather", "p2p"):
            across = attention(dist.group.WORLD, mode)
            took = milliseconds(lambda across=across: across(*mine))
            got = across(*mine)
            error = report.parity(f"teacher, {length} tokens, {mode}", distance(got, want[here]))
            # of the positions that this rank holds, those that were computed in fp32
            both = torch.isin(here, sampled)
            limit = max(2 * noise, TOLERANCE / 10)
            found = distance(got[both], exact(whole, here[both])) if both.any() else 0.0
            fp32 = report.parity(f"teacher against fp32, {length} tokens, {mode}", found, limit)
            report.line(part="teacher", what=f"{ranks} ranks, {mode}", tokens=length, ms=took,
                        speedup=round(one / took, 3), error=error, error_fp32=fp32)  # fmt: skip
        del want
        held = torch.cat(mine[1:], -1).flatten(2)
        room = held.new_empty(ranks, *held.shape)
        took = milliseconds(lambda: dist.all_gather_into_tensor(room.flatten(0, 1), held))
        sent = held.numel() * held.element_size() * (ranks - 1)
        report.line(part="teacher", what="exchange alone", tokens=length, ms=took, gb_s=round(sent / took / 1e6, 1))
        teacher_blocks(mine, flops / ranks**2, report)


def mla(length: int, sizes: Sizes, report: Report) -> None:
    from hylo_megatron.parallel.attention import Shared, attention_across_ranks
    from hylo_megatron.parallel.zigzag import zigzag_positions

    ranks, rank = dist.get_world_size(), dist.get_rank()
    heads, width, nope = sizes.mla_heads, sizes.mla_width, sizes.mla_width - sizes.rope
    here = zigzag_positions(length // ranks, ranks, rank).to(device())
    whole = [random(length, 1, heads, width), random(length, 1, sizes.latent + sizes.rope),
             random(heads * (nope + width), sizes.latent) / sizes.latent**0.5]  # fmt: skip
    d_out, scale = random(length, 1, heads, width).roll(1, 0), width**-0.5
    flops = 7 * length**2 * heads * width  # forward 2, backward 5 of S² H K

    def expand_with(weight: Tensor):
        def expand(latents: Tensor, source: int, keys: slice) -> tuple[Tensor, Tensor]:
            latent, rope = latents.split([sizes.latent, sizes.rope], -1)
            k_nope, v = F.linear(latent, weight).unflatten(-1, (heads, -1)).split([nope, width], -1)
            k = torch.cat([k_nope, rope.unsqueeze(2).expand(-1, -1, heads, -1)], -1)
            return k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3)

        return expand

    def one() -> list[Tensor]:
        q, latents, weight = leaves = [x.detach().requires_grad_() for x in whole]
        k, v = expand_with(weight)(latents, 0, slice(None))
        out = F.scaled_dot_product_attention(q.permute(1, 2, 0, 3), k, v, is_causal=True, scale=scale)
        return [out.detach().permute(2, 0, 1, 3), *torch.autograd.grad(out.permute(2, 0, 1, 3), leaves, d_out)]

    def across(mode: str) -> list[Tensor]:
        q, latents, weight = leaves = [x.detach().requires_grad_() for x in (whole[0][here], whole[1][here], whole[2])]
        shared = Shared(group=dist.group.WORLD, scale=scale, expand=expand_with(weight), parameters=(weight,),
                        values=2 * heads * width, mode=mode)  # fmt: skip
        out = attention_across_ranks(q.permute(1, 2, 0, 3), latents, shared).permute(2, 0, 1, 3)
        d_q, d_latents, d_weight = torch.autograd.grad(out, leaves, d_out[here])
        dist.all_reduce(d_weight)
        return [out.detach(), d_q, d_latents, d_weight]

    alone, want = milliseconds(one, 3), one()
    report.line(part="mla", what="one GPU", tokens=length, ms=alone, tflops=round(flops / alone / 1e9, 1))
    want = [*(x[here] for x in want[:3]), want[3]]
    for mode in ("auto", "p2p"):
        took, got = milliseconds(lambda mode=mode: across(mode)), across(mode)
        names = ("output", "d_query", "d_latents", "d_weight")
        errors = {
            name: report.parity(f"mla, {length} tokens, {mode}, {name}", distance(a, b))
            for name, a, b in zip(names, got, want, strict=True)
        }
        report.line(part="mla", what=f"{ranks} ranks, {mode}", tokens=length, ms=took,
                    speedup=round(alone / took, 3), errors=errors)  # fmt: skip


def gdn(length: int, sizes: Sizes, report: Report) -> None:
    """Measure a Gated DeltaNet mixer with all-to-all and with states.

    Both results differ by the rounding of bf16. ``tests/programs/parallel_gpu.py`` compares them in fp32.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.spec_utils import build_module

    from hylo_megatron.config import Architecture, geometry_preset
    from hylo_megatron.layers import specs
    from hylo_megatron.layers.load import layout_config, start_process_groups
    from hylo_megatron.mixers import MIXERS
    from hylo_megatron.parallel.zigzag import zigzag_positions

    ranks, rank = dist.get_world_size(), dist.get_rank()
    width, heads, head = (2048, 32, 64) if ON_GPU else (64, 4, 16)
    geometry = geometry_preset("published" if ON_GPU else "native", width, heads, head)
    arch = Architecture(
        model_type="llama", plan=("gdn",), hidden_size=width, intermediate_size=width, num_attention_heads=heads,
        num_key_value_heads=heads // 4, head_dim=head, vocab_size=64, rms_norm_eps=1e-5, geometry=geometry,
        max_position_embeddings=length, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        tie_word_embeddings=True,
    )  # fmt: skip
    start_process_groups(cp=ranks)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    x, d_out = random(length, 1, width), random(length, 1, width).roll(1, 0)
    here = zigzag_positions(length // ranks, ranks, rank).to(device())
    one = want = first = None
    ways = ["one GPU", "states"] + ["a2a"] * (geometry.gdn.num_key_heads % ranks == 0)
    for way in ways:
        linear_cp = "auto" if way == "one GPU" else way
        layer = MIXERS["gdn"].part("megatron_module").layer_spec(specs.backend("local"), arch, linear_cp)
        own = copy.copy(groups)
        own.cp = ALONE if way == "one GPU" else groups.cp
        mixer = build_module(layer.submodules.self_attention, config=layout_config(arch, DTYPE), layer_number=1,
                             pg_collection=own).to(device())  # fmt: skip
        first = first or mixer
        mixer.load_state_dict(first.state_dict())
        rows = slice(None) if way == "one GPU" else here

        def run(mixer=mixer, rows=rows) -> tuple[Tensor, Tensor]:
            leaf = x[rows].detach().requires_grad_()
            out, _ = mixer(leaf, None)
            out.backward(d_out[rows])
            return out.detach(), leaf.grad

        took, got = milliseconds(run), run()
        if one is None:
            one, want = took, [part[here] for part in got]
            report.line(part="gdn", what=way, tokens=length, ms=took)
            continue
        errors = [
            report.parity(f"gdn, {length} tokens, {way}", distance(*pair), 5e-2)
            for pair in zip(got, want, strict=True)
        ]
        report.line(part="gdn", what=f"{ranks} ranks, {way}", tokens=length, ms=took, speedup=round(one / took, 3),
                    errors=errors)  # fmt: skip


PARTS = {"teacher": teacher, "mla": mla, "gdn": gdn}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[65536, 131072] if ON_GPU else [64])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["teacher", "mla"])
    known = parser.parse_args()
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # as in training
    started = time.time()
    from hylo_megatron.engine.register import install

    install("megatron")
    if ON_GPU:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if ON_GPU else "gloo")
    report = Report()
    report.line(
        card=card(device()), ranks=dist.get_world_size(), torch=torch.__version__, cudnn=torch.backends.cudnn.version()
    )
    for length in known.lengths:
        for part in known.parts:
            PARTS[part](length, SIZES if ON_GPU else TOY, report)
            if ON_GPU:
                torch.cuda.empty_cache()
    report.line(
        verdict="wrong" if report.wrong else "right", wrong=report.wrong, seconds=round(time.time() - started, 1)
    )
    dist.destroy_process_group()
    sys.exit(bool(report.wrong))


if __name__ == "__main__":
    main()
