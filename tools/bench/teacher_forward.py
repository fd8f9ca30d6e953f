"""Compare ways to run a frozen teacher: torch's layers, FP8, and TransformerEngine's layers where that is installed.

    python tools/bench/teacher_forward.py --teacher CKPT --text TEXT.txt --length 8192     real weights: divergence too
    python tools/bench/teacher_forward.py --shape llama8b --length 65536                   random weights: time, memory

Prints for each way the median seconds of a forward pass, tokens/s and the peak of torch's allocator. With a text also
what the way changes: the mean KL divergence from torch's layers in nats a token, the share of tokens with another
most likely next token, and the cross-entropy. CKPT is a folder of ``hylo convert``. On a CPU times mean nothing.
"""

import argparse
import json
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import timed

from hylo_megatron.config import Architecture
from hylo_megatron.engine.register import install
from hylo_megatron.errors import HyLoError
from hylo_megatron.flags import Parser, command_line, size
from hylo_megatron.packages import has
from hylo_megatron.recipes.proxy import toy_shape
from hylo_megatron.recipes.shapes import SHAPES, shape

WAYS = ("local", "fp8", "te")
CHUNK, TIMES = 1024, 5
TINY = "tiny"  # a shape for a CPU


@dataclass(frozen=True, kw_only=True)
class Found:
    """Figures of one way. ``final``: the last hidden states, on the host."""

    seconds: float
    memory_gib: float
    final: torch.Tensor


def architecture(options) -> Architecture:
    if options.teacher:
        return Architecture.load(options.teacher)
    found = toy_shape(shape("llama1b")) if options.shape == TINY else shape(options.shape)
    return replace(found, max_position_embeddings=max(options.length, found.max_position_embeddings))


def build(options, way: str):
    from hylo_megatron.layers.fp8 import check_card, to_fp8
    from hylo_megatron.layers.load import layout_config, load_model, start_process_groups
    from hylo_megatron.layers.model import build_model

    start_process_groups()  # seeds: random weights are the same for every way
    backend = "te" if way == "te" else "local"
    arch = architecture(options)
    config = layout_config(arch, torch.bfloat16)
    if options.teacher:
        model, _ = load_model(options.teacher, config, backend=backend)
    else:
        model = build_model(arch, config, backend=backend)
    model = model.to(torch.cuda.current_device()).bfloat16().eval().requires_grad_(False)
    if way == "fp8":
        check_card()
        to_fp8(model)
    return model


def head(model) -> torch.Tensor:
    tied = model.share_embeddings_and_output_weights
    return model.shared_embedding_or_output_weight() if tied else model.output_layer.weight


@torch.no_grad()
def measure(model, tokens: torch.Tensor) -> Found:
    model.post_process = False  # hidden states, not logits
    device = torch.device(torch.cuda.current_device())
    tokens = tokens.to(device)
    positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(TIMES if device.type == "cuda" else 1):
        seconds, final = timed(lambda: model(tokens, positions, None), device)
        times.append(seconds)
    memory = torch.cuda.max_memory_allocated() / 2**30
    return Found(seconds=statistics.median(times), memory_gib=memory, final=final.flatten(0, 1).cpu())


@torch.no_grad()
def compare(want: Found, got: Found, head_ND: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Return means over tokens of how the predictions of ``got`` differ from those of ``want``, and their loss."""
    sums = torch.zeros(3, dtype=torch.float64)
    for first in range(0, len(labels) - 1, CHUNK):
        rows = slice(first, min(first + CHUNK, len(labels) - 1))
        p, q = (F.linear(x.final[rows].to(head_ND), head_ND).float().log_softmax(-1) for x in (want, got))
        wrong = (p.argmax(-1) != q.argmax(-1)).sum()
        loss = F.nll_loss(q, labels[rows.start + 1 : rows.stop + 1].to(q.device), reduction="sum")
        sums += torch.stack([(p.exp() * (p - q)).sum(), wrong, loss]).double().cpu()
    return dict(zip(("kl", "other_token", "cross_entropy"), (sums / (len(labels) - 1)).tolist(), strict=True))


def text_tokens(options) -> torch.Tensor:
    if not options.text:
        rows, generator = architecture(options).vocab_size, torch.Generator().manual_seed(0)
        return torch.randint(rows, (1, options.length), generator=generator)
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(options.teacher / "hf")(options.text.read_text()).input_ids
    if len(found) < options.length:
        raise HyLoError(f"--text {options.text}: {len(found):,} tokens, expected --length {options.length:,}")
    return torch.tensor(found[: options.length])[None]


def check(options) -> None:
    if bool(options.teacher) == bool(options.shape):
        raise HyLoError("give --teacher CKPT or --shape, one of the two")
    if options.text and not options.teacher:
        raise HyLoError("--text needs the real weights of --teacher")


@command_line
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, help="Megatron checkpoint of a Transformer")
    parser.add_argument("--shape", choices=(*SHAPES, TINY), help="random weights of this shape")
    parser.add_argument("--text", type=Path, help="text that the divergence is measured on")
    parser.add_argument("--length", type=size, default=8192, help="tokens of the one sequence (default: 8192)")
    parser.add_argument("--way", action="append", choices=WAYS, help="may be repeated (default: all that work here)")
    options = parser.parse_args()
    check(options)
    install("megatron")
    tokens, first = text_tokens(options), None
    installed = [way for way in WAYS if way != "te" or has("transformer-engine")]
    for way in dict.fromkeys(("local", *(options.way or installed))):  # the others are compared with torch's layers
        model = build(options, way)
        found = measure(model, tokens)
        line = {"way": way, "seconds": found.seconds, "tokens_per_second": tokens.numel() / found.seconds,
                "memory_gib": found.memory_gib}  # fmt: skip
        first = first or found
        line["hidden_gap"] = float((found.final.float() - first.final.float()).norm() / first.final.float().norm())
        if options.text:
            line |= compare(first, found, head(model), tokens[0])
        print(json.dumps({name: round(x, 6) if isinstance(x, float) else x for name, x in line.items()}), flush=True)
        del model


if __name__ == "__main__":
    main()
