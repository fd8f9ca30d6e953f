"""Convert a Megatron checkpoint of any parallel layout to a Hugging Face folder."""

import json
import math
import os
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from hylo_megatron.checkpoint.folder import FINITE, CheckpointReader, whole_folder
from hylo_megatron.config import Architecture, positions
from hylo_megatron.config.shapes import hf_shapes
from hylo_megatron.convert.card_records import UNKNOWN, Origin, origin_of
from hylo_megatron.convert.hf_config import read_architecture
from hylo_megatron.convert.hf_folder import save_tensors
from hylo_megatron.convert.model_card import figures, write_card
from hylo_megatron.convert.tables import mappings
from hylo_megatron.convert.tokenizer_files import check_tokenizer, copy_companions
from hylo_megatron.errors import HyLoError
from hylo_megatron.flags import Parser, command_line
from hylo_megatron.json_file import read_json
from hylo_megatron.mixers import FP32_SUFFIXES
from hylo_megatron.progress import byte_progress, peak_memory_gib

SHARD_BYTES = 4 * 2**30


def _unpadded(name: str, tensor: Tensor, arch: Architecture) -> Tensor:
    """Remove the rows by which megatron-core pads the vocabulary to a multiple of the tensor-parallel size."""
    vocab = name in ("embedding.word_embeddings.weight", "output_layer.weight")
    return tensor[: arch.vocab_size] if vocab and tensor.shape[0] > arch.vocab_size else tensor


def hf_tensors(arch: Architecture, reader: CheckpointReader, dtype: torch.dtype | None):
    """Yield ``(Hugging Face key, tensor)`` in the table's order. Decay parameters stay fp32, whatever ``dtype``."""
    expected = hf_shapes(arch)
    for mapping in mappings(arch):
        megatron = [_unpadded(key, reader[key], arch) for key in mapping.megatron]
        for key, tensor in zip(mapping.hf, mapping.to_hf(megatron), strict=True):
            if tuple(tensor.shape) != expected[key]:
                raise HyLoError(f"{reader.path}: {key} has shape {list(tensor.shape)}, expected {list(expected[key])}")
            yield key, tensor if dtype is None or key.endswith(FP32_SUFFIXES) else _cast(key, tensor, dtype)


def _cast(key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``tensor`` as ``dtype``. Raises ``HyLoError`` if a finite value becomes Inf."""
    cast = tensor.to(dtype)
    if tensor.dtype != dtype and cast.isinf().sum() > tensor.isinf().sum():
        name = str(dtype).removeprefix("torch.")
        raise HyLoError(
            f"{key} has values up to {tensor.abs().max().item():.3g}, --dtype {name} holds up to"
            f" {torch.finfo(dtype).max:.3g}; use --dtype bfloat16 or keep"
        )
    return cast


class ShardWriter:
    """Writes safetensors files of at most ``limit`` bytes (or one tensor), kept in memory until then, and an index."""

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        self.shards, self.pending, self.size = [], {}, 0

    def add(self, key: str, tensor: Tensor) -> None:
        if self.pending and self.size + tensor.nbytes > self.limit:
            self.flush()
        self.pending[key] = tensor.contiguous().clone()
        self.size += tensor.nbytes

    def flush(self) -> None:
        path = self.folder / f"shard{len(self.shards)}"
        save_tensors(self.pending, path)
        self.shards.append((path, list(self.pending), self.size))
        self.pending, self.size = {}, 0

    def finish(self) -> None:
        self.flush()
        if len(self.shards) == 1:
            os.replace(self.shards[0][0], self.folder / "model.safetensors")
            return
        weight_map = {}
        for number, (path, keys, _) in enumerate(self.shards, 1):
            name = f"model-{number:05d}-of-{len(self.shards):05d}.safetensors"
            os.replace(path, self.folder / name)
            weight_map |= dict.fromkeys(keys, name)
        index = {"metadata": {"total_size": sum(size for *_, size in self.shards)}, "weight_map": weight_map}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def write_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]], total: int, what: str, limit: int) -> None:
    """Write ``tensors``, of ``total`` bytes, as shards of at most ``limit`` bytes, and show the progress."""
    writer = ShardWriter(folder, limit)
    with byte_progress(total, what) as advance:
        for key, tensor in tensors:
            writer.add(key, tensor)
            advance(tensor.nbytes)
    writer.finish()


def _write_config(arch: Architecture, checkpoint: Path, folder: Path, dtype: torch.dtype) -> None:
    source = checkpoint / "hf" / "config.json"
    config, base = read_json(source, advice="expected the base model's"), read_architecture(source.parent)
    config["dtype"] = str(dtype).removeprefix("torch.")
    rotary = {"rope_parameters": arch.rope_parameters, "max_position_embeddings": arch.max_position_embeddings}
    if any(getattr(base, name) != value for name, value in rotary.items()):  # changed by --hylo-rope
        config = {key: config[key] for key in config if key not in ("rope_theta", "rope_scaling")} | rotary
    for name, value in vars(replace(base, extra=arch.extra, **rotary)).items():
        if value != getattr(arch, name):
            raise HyLoError(
                f"{source}: {name} is {value}, {checkpoint / 'hylo.json'} has {getattr(arch, name)}; export from a"
                " checkpoint whose hf folder is its own base model's"
            )
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def write_hybrid_config(arch: Architecture, folder: Path, dtype: torch.dtype, origin: Origin = UNKNOWN,
                        with_code: bool = False) -> None:  # fmt: skip
    """Write ``config.json``, the code that it names (all of it or a loader), and the model card."""
    from hylo_megatron.hf import HyLoConfig, code_beside

    config = HyLoConfig.from_architecture(arch, dtype=dtype)
    config.auto_map = code_beside.auto_map(code_beside.WITH_CODE if with_code else code_beside.WITH_LOADER)
    config.save_pretrained(folder)
    write_card(folder, arch, origin, with_code)


def convert(checkpoint: str | Path, out: str | Path, dtype: torch.dtype | None = None,
            allow_nan: bool = False, settings: dict | None = None, with_code: bool = False,
            **known) -> Architecture:  # fmt: skip
    """Write ``out``, which gets its name only when it is complete. ``dtype=None`` keeps the checkpoint's dtypes.

    ``settings``: fields of ``config/positions.py`` that the exported model has in place of the checkpoint's.
    ``known``: fields of the model card's ``Origin`` that the records beside the checkpoint do not have.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    finite = None if allow_nan else f"{FINITE}, or let it pass with --allow-nan"
    arch, reader = Architecture.load(checkpoint), CheckpointReader(checkpoint, finite)
    arch = positions.changed(arch, settings or {}, str(checkpoint))
    check_tokenizer(checkpoint / "hf", arch.vocab_size)
    if with_code and not arch.is_hybrid:
        raise HyLoError(f"{checkpoint}: --with-code is for hybrids, this is a Transformer that transformers knows")
    known = {name: value for name, value in known.items() if value}
    if known and not arch.is_hybrid:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in known)
        raise HyLoError(
            f"{checkpoint}: {flags}: for the model card of a hybrid, a Transformer gets none: leave it out"
        )
    origin = replace(origin_of(checkpoint, reader.iteration), **known)
    if origin.evaluation:
        figures(origin.evaluation, arch)  # refuses a wrong file before the weights are written
    keys = [key for mapping in mappings(arch) for key in mapping.megatron]
    total = sum(math.prod(reader.shape(key)) * (dtype or reader.dtype(key)).itemsize for key in keys)
    with whole_folder(out, total) as scratch:
        copy_companions(checkpoint / "hf", scratch, with_config=False)
        write_weights(scratch, hf_tensors(arch, reader, dtype), total, "export", SHARD_BYTES)
        stored = dtype or reader.dtype("embedding.word_embeddings.weight")
        if arch.is_hybrid:
            write_hybrid_config(arch, scratch, stored, origin, with_code)
        else:
            _write_config(arch, checkpoint, scratch, stored)
    return arch


@command_line
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--ckpt", required=True, help="Megatron checkpoint folder (its latest iteration is read)")
    parser.add_argument("--out", required=True, help="Hugging Face folder to write")
    parser.add_argument("--dtype", choices=("keep", "bfloat16", "float16", "float32"), default="keep")
    parser.add_argument("--allow-nan", action="store_true", help="let NaN and Inf in weights pass")
    positions.add_log_scale(parser.add_argument, default="as the checkpoint has it")
    parser.add_argument("--with-code", action="store_true", help="put the model's code into the folder: it then loads"
                        " with trust_remote_code=True where this package is not installed")  # fmt: skip
    card = parser.add_argument_group("model card (README.md in the folder)", "a run's own records are found")
    card.add_argument("--evaluation", type=Path, help="evaluation.json of hylo evaluate, for the figures")
    card.add_argument("--base-model", metavar="NAME", help="the base model's name on the Hugging Face Hub")
    card.add_argument("--licence", metavar="ID", help="licence of the weights as the Hub names it, e.g. apache-2.0")
    options = parser.parse_args(argv)
    start = time.time()
    dtype = None if options.dtype == "keep" else getattr(torch, options.dtype)
    known = {name: getattr(options, name) for name in ("evaluation", "base_model", "licence")}
    settings = positions.given(options)
    arch = convert(options.ckpt, options.out, dtype, options.allow_nan, settings, options.with_code, **known)
    seconds, memory = time.time() - start, peak_memory_gib()
    print(f"{arch.plan.name} -> {options.out}  {seconds:.1f} s, peak memory {memory:.2f} GiB")
