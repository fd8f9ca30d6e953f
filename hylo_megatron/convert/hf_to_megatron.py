"""Convert a Hugging Face folder to a Megatron checkpoint that can be loaded in any parallel layout."""

import functools
import math
import time
from pathlib import Path

import torch

from hylo_megatron.checkpoint.folder import LazyTensor, check_empty, write_checkpoint
from hylo_megatron.config import Architecture, geometry_preset
from hylo_megatron.convert.hf_config import read_architecture
from hylo_megatron.convert.hf_folder import HFWeights
from hylo_megatron.convert.self_check import check_frequencies, self_check, transformers_model
from hylo_megatron.convert.tables import mappings
from hylo_megatron.convert.tokenizer_files import check_tokenizer, copy_companions
from hylo_megatron.flags import Parser, command_line
from hylo_megatron.mixers.mapping import Mapping
from hylo_megatron.progress import byte_progress, peak_memory_gib


def _lazy(mapping: Mapping, index: int, weights, shape, dtype) -> LazyTensor:
    def load():
        return mapping.to_megatron([weights[key] for key in mapping.hf])[index]

    return LazyTensor(shape, dtype, load)


def megatron_tensors(arch: Architecture, weights) -> dict[str, LazyTensor]:
    """Return every Megatron tensor of ``arch``, each computed from ``weights[hf key]`` when it is written.

    ``weights`` has ``expected`` shapes, ``dtype(key)`` and ``[key]``, as ``HFWeights`` does.
    """
    tensors = {}
    for mapping in mappings(arch):
        meta = [torch.empty(weights.expected[key], device="meta") for key in mapping.hf]
        dtype = functools.reduce(torch.promote_types, map(weights.dtype, mapping.hf))
        for index, (key, shape) in enumerate(zip(mapping.megatron, mapping.to_megatron(meta), strict=True)):
            tensors[key] = _lazy(mapping, index, weights, tuple(shape.shape), dtype)
    return tensors


def convert(
    hf: str | Path, out: str | Path, *, allow_nan: bool = False, check: bool = True, log=print
) -> Architecture:
    """Convert folder ``hf`` to checkpoint ``out``. Raises ``HyLoError`` before writing if the folder does not fit.

    ``check``: compare the logits with transformers' afterwards; ``out`` gets its name only if the logits agree.
    """
    hf, out = Path(hf), Path(out)
    check_empty(out)
    arch, model = read_architecture(hf), None
    if not arch.is_hybrid:
        # refuses odd head dimensions
        geometry_preset("native", arch.hidden_size, arch.num_attention_heads, arch.head_dim)
        model = transformers_model(hf)
        check_frequencies(arch, model.rotary_emb, hf / "config.json")
    check_tokenizer(hf, arch.vocab_size)
    weights = HFWeights(hf, arch, allow_nan)
    tensors = megatron_tensors(arch, weights)
    total = sum(torch.empty(t.shape, dtype=t.dtype, device="meta").nbytes for t in tensors.values())
    differences = []

    def verify(written: Path) -> None:
        if model and check:
            differences.append(self_check(weights, arch, written, model))

    with byte_progress(total, "convert") as advance:
        write_checkpoint(out, arch, tensors, functools.partial(copy_companions, hf), advance, verify)
    for difference in differences:
        log(_said(difference))
    return arch


def _said(difference: float) -> str:
    if math.isnan(difference):
        return "self-check: the logits of this model are not finite numbers in transformers; nothing was compared"
    return f"self-check: logits differ from transformers' by {difference:.1e} (relative, fp32)"


@command_line
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--hf", required=True, help="folder with config.json, *.safetensors and the tokenizer")
    parser.add_argument("--out", required=True, help="Megatron checkpoint folder to write")
    parser.add_argument("--allow-nan", action="store_true", help="let NaN and Inf in weights pass")
    parser.add_argument("--no-self-check", action="store_true", help="do not compare logits with transformers'")
    options = parser.parse_args(argv)
    start = time.time()
    arch = convert(options.hf, options.out, allow_nan=options.allow_nan, check=not options.no_self_check)
    print(
        f"{arch.model_type} {arch.plan.name} -> {options.out}  "
        f"{time.time() - start:.1f} s, peak memory {peak_memory_gib():.2f} GiB"
    )
