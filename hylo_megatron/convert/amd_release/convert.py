"""Convert a HyLo release of AMD's to a Hugging Face folder of a hybrid, as ``hylo export`` writes it."""

import time
from pathlib import Path

import torch
from torch import Tensor

from hylo_megatron.checkpoint.folder import whole_folder
from hylo_megatron.config import Architecture
from hylo_megatron.config.shapes import element_count, hf_shapes
from hylo_megatron.convert.amd_release.config import FLA_NORM_EPS, Release, Unsaid, described, read_release
from hylo_megatron.convert.amd_release.tables import EMBEDDING, source_shapes, takes
from hylo_megatron.convert.hf_folder import HFWeights
from hylo_megatron.convert.megatron_to_hf import write_hybrid_config, write_weights
from hylo_megatron.convert.tokenizer_files import check_tokenizer, copy_companions
from hylo_megatron.errors import HyLoError
from hylo_megatron.flags import Parser, command_line
from hylo_megatron.mixers import FP32_SUFFIXES
from hylo_megatron.progress import peak_memory_gib

SHARD_BYTES = 2**30


class ReleasedWeights(HFWeights):
    """The tensors of a release under their own names. Call ``check`` before reading."""

    described_by, let_pass = "hybrid_config.json", ""
    unmapped = "; its name belongs into hylo_megatron/convert/amd_release/tables.py, if the model computes with it"

    def __init__(self, folder: Path):
        self.folder, self._files, self.names = folder, {}, {}
        self.where = self._index()

    def check(self, release: Release) -> None:
        """Raise ``HyLoError`` unless the tensors are those of the table, with their shapes."""
        self.expected = source_shapes(release)
        self._check(release.arch.tie_word_embeddings)


def converted(release: Release, weights: ReleasedWeights, dtype: torch.dtype | None):
    """Yield ``(our key, tensor)``; decay parameters are fp32, whatever ``dtype`` is."""
    expected = hf_shapes(release.arch)
    for take in takes(release):
        tensor: Tensor = take(weights[take.source])
        if tuple(tensor.shape) != expected[take.target]:
            raise HyLoError(f"{take.target} comes out as {list(tensor.shape)}, not {list(expected[take.target])}")
        wanted = torch.float32 if take.target.endswith(FP32_SUFFIXES) else dtype
        yield take.target, tensor if wanted is None else tensor.to(wanted)


def convert(folder: str | Path, out: str | Path, dtype: torch.dtype | None = None,
            unsaid: Unsaid = Unsaid()) -> Architecture:  # fmt: skip  # noqa: B008
    """Write folder ``out``, which gets its name when it is complete. ``dtype=None`` keeps what the release has."""
    folder, out = Path(folder), Path(out)
    described(folder)
    weights = ReleasedWeights(folder)
    release = read_release(folder, weights.where, unsaid)
    check_tokenizer(folder, release.arch.vocab_size)
    weights.check(release)
    stored = dtype or weights.dtype(EMBEDDING)
    total = stored.itemsize * element_count(release.arch)
    with whole_folder(out, total) as scratch:
        copy_companions(folder, scratch, with_config=False)
        write_weights(scratch, converted(release, weights, dtype), total, "convert", SHARD_BYTES)
        write_hybrid_config(release.arch, scratch, stored)
    return release.arch


def assumptions(arch: Architecture, unsaid: Unsaid) -> list[str]:
    """Return what was assumed because no file says it, with the option that changes it."""
    found = []
    if "mla" in arch.plan:
        pairs = "neighbours (--rope-pairs half if not)" if unsaid.interleaved else "half a head apart"
        found.append(f"rotary pairs are {pairs}")
    if "gdn" in arch.plan and arch.geometry.gdn.norm_eps is not None:
        found.append(f"GDN's output norm has eps {arch.geometry.gdn.norm_eps:g}, the rest {arch.rms_norm_eps:g}"
                     f" (--gdn-norm-eps {arch.rms_norm_eps:g} if not)")  # fmt: skip
    return found


@command_line
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--release", required=True, help="folder with hybrid_config.json, config.json, *.safetensors")
    parser.add_argument("--out", required=True, help="Hugging Face folder to write")
    parser.add_argument("--dtype", choices=("keep", "bfloat16", "float16", "float32"), default="keep")
    parser.add_argument("--max-position-embeddings", type=int, metavar="N", help="trained length, if the folder's name"
                        " does not end in 8K-SFT or 64K-SFT")  # fmt: skip
    parser.add_argument("--rope-pairs", choices=("interleaved", "half"), default="interleaved")
    parser.add_argument("--gdn-norm-eps", type=float, default=FLA_NORM_EPS, help="default %(default)g")
    parser.add_argument("--ignore-field", action="append", default=[], metavar="NAME",
                        help="unknown field of hybrid_config.json that changes nothing; repeatable")  # fmt: skip
    options = parser.parse_args(argv)
    start = time.time()
    unsaid = Unsaid(options.max_position_embeddings, options.rope_pairs == "interleaved", options.gdn_norm_eps,
                    tuple(options.ignore_field))  # fmt: skip
    dtype = None if options.dtype == "keep" else getattr(torch, options.dtype)
    arch = convert(options.release, options.out, dtype, unsaid)
    for line in assumptions(arch, unsaid):
        print(f"assumed: {line}")
    seconds, memory = time.time() - start, peak_memory_gib()
    print(f"{arch.plan.name} -> {options.out}  {seconds:.1f} s, peak memory {memory:.2f} GiB")
