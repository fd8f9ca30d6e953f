"""Measure perplexity, loss by position and needles of a Hugging Face model, alone or together with its teacher."""

import argparse
from dataclasses import fields
from pathlib import Path

from hylo_megatron.errors import HyLoError
from hylo_megatron.flags import Parser, command_line, count, size


def lengths(text: str) -> tuple[int, ...]:
    try:
        return tuple(size(part) for part in text.split(","))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, several with commas as in 1024,2048") from None


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face folder: a hybrid or any causal language model")
    add("--teacher", help="Hugging Face folder to compare with")
    add("--out", required=True, help="folder for evaluation.json, evaluation.md and the pictures")
    add("--prose", help="text file as for hylo prepare-data: prose perplexity, and haystack of the needles")
    add("--book", help="text file: perplexity of complete prose documents, in windows of --context")
    add("--code", help="text file: code perplexity")
    add("--c", help="text file: perplexity of C code")
    add("--long", help="text file: loss by position in long documents")
    add("--context", type=size, default=2048, help="tokens to which documents are cut")
    add("--ppl-tokens", type=size, default=20_000, help="tokens that are scored of each file")
    add("--long-context", type=size, default=32_768, help="tokens of a long document; shorter documents are skipped")
    add("--long-documents", type=size, default=4, help="long documents to score")
    add("--needle-lengths", type=lengths, default="1024,2048", help="prompt lengths in tokens, including the answer")
    add("--needle-samples", type=size, default=4, help="prompts for each length and depth")
    add("--needle-depths", type=size, default=5, help="number of depths, from the first to the last sentence")
    add("--teacher-needle-limit", type=size, help="longest prompt, in tokens, that the teacher gets; no limit")
    add("--skip", nargs="+", default=(), choices=["perplexity", "long", "needle"], help="a part that is not measured")
    add("--curves", nargs="+", default=[], help="training logs (JSON lines with stage, iteration, loss) to draw")
    add("--batch-size", type=size, help="sequences per batch; by default as many as suit the device")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="auto: float32 on the CPU")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    add("--seed", type=count, default=0, help="random seed of the needles")
    return parser.parse_args()


@command_line
def main() -> None:
    args = parse()
    if not (args.prose or args.book or args.code or args.c or args.long):
        raise HyLoError("nothing to measure: give --prose, --book, --code, --c or --long")

    # imported after parsing, because transformers takes seconds to import
    from hylo_megatron.evaluate import Settings, evaluate

    args.skip = tuple(args.skip)
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    report = evaluate(
        args.model,
        teacher_dir=args.teacher,
        out_dir=args.out,
        prose=args.prose,
        book=args.book,
        code=args.code,
        c=args.c,
        long=args.long,
        curves=args.curves,
        settings=settings,
    )
    print((Path(args.out) / report["files"]["markdown"]).read_text(encoding="utf-8"))
