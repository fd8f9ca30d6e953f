"""Fit the base of ``log_scale`` (config/positions.py) on long documents, after training: the base of the lowest loss.

No weight changes. Every base is a pass over the same documents; ``--write`` puts the best one into config.json.
"""

import argparse
from pathlib import Path

from hylo_megatron.config import positions
from hylo_megatron.data.formats import add_format
from hylo_megatron.errors import HyLoError
from hylo_megatron.evaluate.models import DTYPES, load, resolve_device, resolve_dtype
from hylo_megatron.evaluate.perplexity import encode_long_documents, score
from hylo_megatron.files import write_json
from hylo_megatron.flags import Parser, command_line, count, short, size
from hylo_megatron.json_file import read_json

BASES = "300,500,700,900"  # about those of HypeNet (arXiv 2601.22156)


def losses_by_base(
    model, documents: list[list[int]], scales: list[dict | None], file: Path, prefill: int | None = None
) -> list[list[dict]]:
    """Return the loss by position (rows of ``score``) with each of ``scales``. The model keeps the scale it had."""
    kept, found = model.config.log_scale, []
    try:
        for scale in scales:
            model.config.log_scale = scale
            found.append(score(model, documents, file, prefill=prefill)["by_position"])
    finally:
        model.config.log_scale = kept
    return found


def mean_loss(by_position: list[dict], after: int) -> float:
    """Return the mean loss of the tokens in the buckets that begin at position ``after`` or later."""
    rows = [row for row in by_position if row["from"] >= after]
    if not rows:
        last = by_position[-1]["from"]
        raise HyLoError(f"--after {after}: the last positions are reported from {last} on; give {last} or less")
    return sum(row["tokens"] * row["loss"] for row in rows) / sum(row["tokens"] for row in rows)


def table(scales: list[dict | None], found: list[list[dict]], means: list[float], after: int) -> str:
    """Return a line for each bucket of positions, and one for the mean, with a column for each base."""
    heads = ["off" if scale is None else f"{scale['base']:g}" for scale in scales]
    lines = [f"{'position':>16}" + "".join(f"{head:>9}" for head in heads)]
    for rows in zip(*found, strict=True):
        place = f"{rows[0]['from']}-{rows[0]['to']}"
        lines.append(f"{place:>16}" + "".join(f"{row['loss']:9.4f}" for row in rows))
    lines.append(f"{f'from {after} on':>16}" + "".join(f"{mean:9.4f}" for mean in means))
    return "\n".join(lines)


def _flags() -> Parser:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="exported folder of a hybrid with MLA layers")
    add("--text", required=True, help="text file as for hylo prepare-data; documents of --length tokens are read")
    add_format(add, "the file of --text")
    add("--length", type=size, default=32768, help="tokens of a document")
    add("--documents", type=size, default=4)
    add("--bases", default=BASES, help="bases to try, beside no scale at all")
    add("--from", dest="start", type=count, default=0, help="the LENGTH of --log-scale BASE,LENGTH")
    add("--after", type=count, help="choose by the loss from this position on (default: half of --length)")
    add("--prefill", type=size, help="tokens that one forward pass reads (default: whole documents)")
    add("--device", default="auto")
    add("--dtype", default="auto", choices=("auto", *DTYPES))
    add("--write", action="store_true", help="write the best scale into the folder's config.json")
    return parser


@command_line
def main(argv: list[str] | None = None) -> None:
    parser = _flags()
    options = parser.parse_args(argv)
    folder, device = Path(options.model), resolve_device(options.device)
    scales = [None, *(_scale(parser, base, options.start) for base in options.bases.split(","))]
    loaded = load(folder, device, resolve_dtype(options.dtype, device))
    if loaded.model.config.model_type != "hylo" or "mla" not in loaded.model.config.mixers:
        raise HyLoError(f"{folder}: has no MLA layers, whose queries a log scale multiplies; give another model")
    wanted = {"context": options.length, "count": options.documents, "form": options.form, "advice": "--length"}
    documents = encode_long_documents(loaded.tokenizer, options.text, **wanted)
    found = losses_by_base(loaded.model, documents, scales, Path(options.text), options.prefill)
    after = options.length // 2 if options.after is None else options.after
    means = [mean_loss(rows, after) for rows in found]
    print(table(scales, found, means, after))
    best = scales[means.index(min(means))]
    print(f"best: {'off' if best is None else '{base:g},{length}'.format(**best)} ({len(documents)} documents)")
    if options.write:
        write_json(folder / "config.json", read_json(folder / "config.json") | {"log_scale": best})


def _scale(parser: Parser, base: str, start: int) -> dict:
    try:
        return positions.log_scale(f"{float(base)},{start}")
    except (ValueError, argparse.ArgumentTypeError):
        what = "whose sum with --from is above 1, several with commas"
        parser.error(f"argument --bases: {short(base)}: expected numbers of 0 or more {what}, such as {BASES}")
