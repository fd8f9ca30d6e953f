"""Hugging Face folder -> Megatron distributed checkpoint that loads at any parallel layout."""

import argparse
import functools
import time
from pathlib import Path

import torch

from hylo_megatron.config import Architecture, plan_name
from hylo_megatron.config.geometry import rotary_width
from hylo_megatron.convert.checkpoint import LazyTensor, write_checkpoint
from hylo_megatron.convert.hf_folder import HFWeights, read_architecture
from hylo_megatron.convert.progress import ByteProgress, peak_memory_gib
from hylo_megatron.convert.tables import Mapping, mappings
from hylo_megatron.convert.tokenizer_files import check_tokenizer, copy_companions
from hylo_megatron.errors import command_line


def _lazy(mapping: Mapping, index: int, weights, shape, dtype) -> LazyTensor:
    def load():
        return mapping.to_megatron([weights[key] for key in mapping.hf])[index]

    return LazyTensor(shape, dtype, load)


def megatron_tensors(arch: Architecture, weights) -> dict[str, LazyTensor]:
    """Every Megatron tensor of ``arch``, each made from ``weights[hf key]`` when it is written.

    ``weights`` has ``expected`` shapes, ``dtype(key)`` and ``[key]``, such as ``HFWeights``.
    """
    tensors = {}
    for mapping in mappings(arch):
        meta = [torch.empty(weights.expected[key], device="meta") for key in mapping.hf]
        dtype = functools.reduce(torch.promote_types, map(weights.dtype, mapping.hf))
        for index, (key, shape) in enumerate(zip(mapping.megatron, mapping.to_megatron(meta), strict=True)):
            tensors[key] = _lazy(mapping, index, weights, tuple(shape.shape), dtype)
    return tensors


def convert(hf: str | Path, out: str | Path) -> Architecture:
    """Converts folder ``hf`` into checkpoint ``out``. Raises ``HyLoError`` when they do not fit, before writing."""
    arch = read_architecture(hf)
    if not arch.is_hybrid:
        rotary_width(arch.head_dim)  # else the first to refuse it would be upcycling
    check_tokenizer(hf, arch.vocab_size)
    weights = HFWeights(hf, arch)
    tensors = megatron_tensors(arch, weights)
    total = sum(torch.empty(t.shape, dtype=t.dtype, device="meta").nbytes for t in tensors.values())
    progress = ByteProgress(total, "convert")
    write_checkpoint(out, arch, tensors, functools.partial(copy_companions, Path(hf)), progress)
    progress.close()
    return arch


@command_line
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hf", required=True, help="folder with config.json, *.safetensors and the tokenizer")
    parser.add_argument("--out", required=True, help="Megatron checkpoint folder to write")
    options = parser.parse_args(argv)
    start = time.time()
    arch = convert(options.hf, options.out)
    print(
        f"{arch.model_type} {plan_name(arch.plan)} -> {options.out}  "
        f"{time.time() - start:.1f} s, peak memory {peak_memory_gib():.2f} GiB"
    )
