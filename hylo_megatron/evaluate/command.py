"""Measure a Hugging Face model, alone or beside its teacher: perplexity, retrieval, RULER, questions."""

import argparse
from dataclasses import replace
from pathlib import Path

from hylo_megatron.data.formats import add_format
from hylo_megatron.errors import HyLoError
from hylo_megatron.evaluate.settings import DEFAULT_SUITES, KINDS, MEASURED, SUITES, Settings
from hylo_megatron.flags import Parser, command_line
from hylo_megatron.options import add_options, from_options


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face folder: a hybrid or any causal language model")
    add("--teacher", help="Hugging Face folder to compare with")
    add("--control", help="Hugging Face folder: the teacher after training on the student's tokens, to compare with")
    add("--out", required=True, help="folder for evaluation.html, .md, .json and the pictures")
    default = f"by default those of {', '.join(DEFAULT_SUITES)} that have a file"
    add("--suite", nargs="+", default=(), choices=SUITES, help=default)
    add("--prose", help="text file as for hylo prepare-data: prose perplexity, and haystack of the needles")
    add("--book", help="text file: perplexity of complete prose documents, in windows of --context")
    add("--code", help="text file: code perplexity")
    add("--c", help="text file: perplexity of C code")
    add("--long", help="text file: loss by position in long documents")
    add_format(add, "--prose, --book, --code, --c and --long")
    add("--choice", nargs="+", default=(), metavar="FILE", help="JSON lines of question, options and answer")
    add("--answers", nargs="+", default=(), metavar="FILE", help="JSON lines of question and answers, a list")
    add("--ruler-squad", metavar="FILE", help="questions for --suite ruler's qa_1 in SQuAD's layout; made ones")
    add("--ruler-hotpot", metavar="FILE", help="questions for --suite ruler's qa_2 in HotpotQA's layout; made ones")
    add("--skip", nargs="+", default=(), choices=SUITES, help="a suite that is not measured")
    add("--curves", nargs="+", default=[], help="training logs (JSON lines with stage, iteration, loss) to draw")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="auto: float32 on the CPU")
    add_options(parser, Settings)
    return parser.parse_args()


@command_line
def main() -> None:
    args = parse()
    if not any(getattr(args, kind) for kind in MEASURED):
        raise HyLoError(f"nothing to measure: give --{', --'.join(MEASURED[:-1])} or --{MEASURED[-1]}")

    # imported after parsing, because torch and transformers take seconds to import
    from hylo_megatron.engine.kernel_cache import prepare_kernels
    from hylo_megatron.evaluate.runner import evaluate

    prepare_kernels()

    chosen = {"suites": tuple(args.suite), "skip": tuple(args.skip), "dtype": args.dtype, "form": args.form}
    settings = replace(from_options(Settings, args), **chosen)
    report = evaluate(
        args.model,
        teacher_dir=args.teacher,
        control_dir=args.control,
        out_dir=args.out,
        curves=args.curves,
        settings=settings,
        **{kind: getattr(args, kind) for kind in KINDS},
    )
    print((Path(args.out) / report["files"]["markdown"]).read_text(encoding="utf-8"))
