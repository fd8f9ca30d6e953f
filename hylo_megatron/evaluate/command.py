"""Measure a Hugging Face model, alone or beside its teacher: perplexity, retrieval, RULER, questions."""

import argparse
from dataclasses import fields
from pathlib import Path

from hylo_megatron.errors import HyLoError
from hylo_megatron.evaluate.settings import DEFAULT_SUITES, KINDS, MEASURED, SUITES, Settings
from hylo_megatron.flags import Parser, command_line, count, positive, size


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
    add("--teacher-yarn", type=positive, metavar="FACTOR", help="measure the teacher also with YaRN of this factor")
    add("--control", help="Hugging Face folder: the teacher after training on the student's tokens, to compare with")
    add("--out", required=True, help="folder for evaluation.html, .md, .json and the pictures")
    default = f"by default those of {', '.join(DEFAULT_SUITES)} that have a file"
    add("--suite", nargs="+", default=(), choices=SUITES, help=default)
    add("--prose", help="text file as for hylo prepare-data: prose perplexity, and haystack of the needles")
    add("--book", help="text file: perplexity of complete prose documents, in windows of --context")
    add("--code", help="text file: code perplexity")
    add("--c", help="text file: perplexity of C code")
    add("--long", help="text file: loss by position in long documents")
    add("--choice", nargs="+", default=(), metavar="FILE", help="JSON lines of question, options and answer")
    add("--answers", nargs="+", default=(), metavar="FILE", help="JSON lines of question and answers, a list")
    add("--questions", type=size, help="questions drawn from each file; all")
    shots = "answered examples, from the same file, before a question to be answered"
    add("--shots", type=count, default=3, help=shots)
    add("--context", type=size, default=2048, help="tokens to which documents are cut")
    add("--ppl-tokens", type=size, default=20_000, help="tokens that are scored of each file")
    add("--long-context", type=size, default=32_768, help="tokens of a long document; shorter documents are skipped")
    add("--long-documents", type=size, default=4, help="long documents to score")
    add("--long-join", action="store_true", help="join documents shorter than --long-context, as parts of one work")
    add("--needle-lengths", type=lengths, default="1024,2048", help="prompt lengths in tokens, including the answer")
    add("--needle-samples", type=size, default=4, help="prompts for each length and depth")
    add("--needle-depths", type=size, default=5, help="number of depths, from the first to the last sentence")
    add("--teacher-needle-limit", type=size, help="longest prompt, in tokens, that the teacher gets; no limit")
    add("--ruler-lengths", type=lengths, default="4096", help="RULER's prompt lengths in tokens, including the answer")
    add("--ruler-samples", type=size, default=20, help="prompts for each RULER task and length")
    add("--ruler-squad", metavar="FILE", help="questions for --suite ruler's qa_1 in SQuAD's layout; made ones")
    add("--ruler-hotpot", metavar="FILE", help="questions for --suite ruler's qa_2 in HotpotQA's layout; made ones")
    add("--skip", nargs="+", default=(), choices=SUITES, help="a suite that is not measured")
    add("--curves", nargs="+", default=[], help="training logs (JSON lines with stage, iteration, loss) to draw")
    add("--batch-size", type=size, help="sequences per batch; by default as many as suit the device")
    add("--prefill-chunk", type=size, default=32_768, help="tokens that one forward pass reads; bounds memory")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="auto: float32 on the CPU")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    add("--seed", type=count, default=0, help="random seed of the needles")
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

    args.suites, args.skip = tuple(args.suite), tuple(args.skip)
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
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
