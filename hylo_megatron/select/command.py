"""Choose the layers that keep attention (MLA): score each layer, and write the plan that a budget allows.

Writes OUT/plan.json, which --mla-layers of hylo upcycle takes, and OUT/scores.png. A run that was interrupted goes on
with the same command. Several GPUs: torchrun --nproc-per-node N -m hylo_megatron.select.command FLAGS.
"""

import argparse
import sys
import time
from pathlib import Path

from hylo_megatron.config.geometry import GEOMETRY_HELP
from hylo_megatron.config.positions import window, window_rows
from hylo_megatron.errors import HyLoError
from hylo_megatron.flags import Parser, command_line, flag_among, given, names_of, positive, share, size
from hylo_megatron.mixers import LINEAR
from hylo_megatron.parent import die_with_parent

FIXED, MEASURED = ("uniform", "explicit"), ("window", "smart", "kl", "gates")
RETRIEVAL_WEIGHT, WINDOW = 0.5, "256+4"
SHOWN = 12  # layers of the ranking that are printed
STEPS, RATES = {"kl": 100, "gates": 300}, {"kl": 1e-3, "gates": 0.05}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--method", required=True, choices=(*FIXED, *MEASURED), help="uniform: evenly spread; explicit: --layers;"
        " window: let all layers of the base model but one see a --window; smart: restore the base model's attention"
        " in an all-linear student, layer by layer; kl: the same after a short distillation beside each; gates: train"
        " gates between attention and linear blocks")  # fmt: skip
    add("--teacher", required=True, type=Path, help="base model: Hugging Face folder, or checkpoint of hylo convert")
    add("--out", required=True, type=Path, help="folder for plan, picture and measurements")
    _add_budget(parser)
    add("--geometry", default="native", metavar="PRESET[:RANK+ROPE]", help=f"of the MLA layers: {GEOMETRY_HELP}")
    add("--linear", choices=LINEAR, help=f"mixer of the other layers (default: the student's, else {LINEAR[0]})")
    add("--layers", help="--method explicit: numbers such as 4,14,24")
    measuring, training = _add_measured(parser), _add_training(parser)
    options = parser.parse_args(argv)
    found = given(parser, sys.argv[1:] if argv is None else argv)
    if options.method in FIXED and (flag := flag_among(parser, found & (measuring | training))):
        raise HyLoError(f"--method {options.method} measures nothing: leave out {flag}")
    if options.method not in STEPS and (flag := flag_among(parser, found & training)):
        raise HyLoError(f"--method {options.method} trains nothing: leave out {flag}")
    if "retrieval_samples" in found and not options.retrieval:
        raise HyLoError(f"--retrieval-samples {options.retrieval_samples}: needs --retrieval")
    _check(options)
    return options


def _add_budget(parser: Parser) -> None:
    group = parser.add_argument_group("budget, one of")
    budget = group.add_mutually_exclusive_group()
    budget.add_argument("--mla", type=size, metavar="N", help="MLA layers")
    budget.add_argument("--cache-share", type=positive, metavar="S", help="share of the base model's KV cache")
    budget.add_argument("--cache-bytes", type=size, metavar="N", help="bytes of the KV cache for a token, in bf16")


def _add_measured(parser: Parser) -> frozenset[str]:
    """Add the flags, and return their names in parsed arguments."""
    group = parser.add_argument_group("methods that measure")
    add = group.add_argument
    add("--student", type=Path, help="all-linear student (hylo upcycle --mla-layers none, with or without ILD):"
        " Hugging Face folder or checkpoint")  # fmt: skip
    add("--window", type=window, metavar="SIZE[+SINKS]", help="--method window: tokens that a layer sees, the last and"
        f" the first ones (default: {WINDOW})")  # fmt: skip
    add("--text", type=Path, metavar="FILE", help="held-out text as for hylo prepare-data, or prefix of its tokens")
    add("--tokens", type=size, default=98304, help="tokens of --text that are measured")
    add("--length", type=size, default=2048, help="tokens of a row of --text")
    add("--retrieval", type=Path, metavar="PREFIX", help="samples of hylo make-retrieval: the loss of answers counts")
    add("--retrieval-samples", type=size, default=32, metavar="N", help="samples of --retrieval that are measured")
    weight = f"score = (1 - W) of divergence + W of answers (default: {RETRIEVAL_WEIGHT} with --retrieval)"
    add("--retrieval-weight", type=share, metavar="W", help=weight)
    add("--greedy", action="store_true", help="restore the best layer, then rank the others again, up to the budget")
    add("--batch-size", type=size, help="rows of a forward pass; what suits the device")
    add("--device", default="auto")
    add("--dtype", default="auto", help="bfloat16 or float32; auto: bfloat16 on a GPU, float32 on a CPU")
    return names_of(group)


def _add_training(parser: Parser) -> frozenset[str]:
    """Add the flags, and return their names in parsed arguments."""
    group = parser.add_argument_group("methods that train, kl and gates")
    add = group.add_argument
    add("--steps", type=size, help=f"of each training (default: {STEPS['kl']} for kl, {STEPS['gates']} for gates)")
    add("--lr", type=positive, help=f"peak learning rate (default: {RATES['kl']} for kl, {RATES['gates']} for gates)")
    add("--train-batch", type=size, default=8, metavar="ROWS", help="rows of a step; of --retrieval too, for gates")
    add("--train-tokens", type=size, default=1638400, help="tokens of --text, after those measured, to train on")
    return names_of(group)


def _check(options: argparse.Namespace) -> None:
    method = options.method
    budget = (options.mla, options.cache_share, options.cache_bytes)
    if method == "explicit" and (options.layers is None or any(value is not None for value in budget)):
        raise HyLoError("--method explicit: give --layers and no budget")
    if method != "explicit" and (options.layers is not None or all(value is None for value in budget)):
        raise HyLoError(f"--method {method}: give --mla, --cache-share or --cache-bytes, and no --layers")
    if method in FIXED:
        options.training = None
        return
    _check_training(options)
    _check_window(options)
    for name in ("text",) if method == "window" else ("student", "text"):
        if getattr(options, name) is None:
            raise HyLoError(f"--method {method}: needs --{name}")
    if options.retrieval_weight is None:
        options.retrieval_weight = RETRIEVAL_WEIGHT if options.retrieval else 0.0
    elif options.retrieval_weight and not options.retrieval:
        raise HyLoError(f"--retrieval-weight {options.retrieval_weight}: needs --retrieval")


def _check_window(options: argparse.Namespace) -> None:
    """Set ``options.window`` for the method of this name. Raises ``HyLoError`` for flags that contradict it."""
    if options.method != "window":
        if options.window is not None:
            raise HyLoError(f"--method {options.method}: leave out --window, which belongs to --method window")
        return
    if options.student:
        raise HyLoError("--method window measures the base model alone: leave out --student")
    options.window = window(WINDOW) if options.window is None else options.window
    if options.window == {} or "mla" in options.window:
        raise HyLoError("--window: --method window needs SIZE[+SINKS], such as 256+4, without :all")
    if options.length <= window_rows(options.window):
        raise HyLoError(
            f"--length {options.length}: a window of {window_rows(options.window)} tokens sees whole rows; give longer"
            " rows or a smaller --window"
        )


def _check_training(options: argparse.Namespace) -> None:
    """Set ``options.training``. Raises ``HyLoError`` for flags that contradict one another or the method."""
    from hylo_megatron.select.training import Training

    method, options.training = options.method, None
    if method in STEPS:
        steps, lr = options.steps or STEPS[method], options.lr or RATES[method]
        options.training = Training(steps=steps, batch=options.train_batch, lr=lr)
        if options.train_tokens < options.train_batch * options.length:
            raise HyLoError(
                f"--train-tokens {options.train_tokens}: expected at least --train-batch {options.train_batch} rows of"
                f" {options.length} tokens"
            )
    if method == "gates" and options.greedy:
        raise HyLoError("--method gates ranks all layers in one training: leave out --greedy")


def ranked(plan: dict) -> str:
    """Return the first layers of the ranking with their scores; those of a greedy order with the round's."""
    scores = plan["scores"]
    lines = []
    for place, layer in enumerate(plan["order"][:SHOWN] if scores else ()):
        found = plan["rounds"][min(place, len(plan["rounds"]) - 1)] if plan["rounds"] else scores
        chosen = "  MLA" if layer in plan["mla_layers"] else ""
        lines.append(f"layer {layer:3d}  score {found[layer]:7.4f}{chosen}\n")
    return "".join(lines)


@command_line
def main(argv: list[str] | None = None) -> None:
    """Run ``hylo select-layers``."""
    die_with_parent()
    options = parse(argv)
    from hylo_megatron.select.ranks import ranks
    from hylo_megatron.select.run import select

    began = time.monotonic()
    with ranks() as all_ranks:
        plan = select(options, all_ranks)
        if all_ranks.first:
            print(ranked(plan), end="")
            numbers = ",".join(map(str, plan["mla_layers"]))
            print(f"{plan['plan']} with MLA at {numbers}: {100 * plan['cache_share']:.1f} % of the base model's cache")
            print(f"{options.out / 'plan.json'}  {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()
