"""Fit the constants of the planner's speed to rows that ``scaling.py`` has measured.

    python tools/bench/fit_speed.py docs/benchmarks/scaling-*.json
    python tools/bench/fit_speed.py FILES --constants products attention nvlink      steps of several lengths

Prints the planned speed of each row beside the measured one, with the constants of ``planner/speed.py`` as they are
and with those that fit all rows best, and then the lines of ``planner/speed.py`` that change. Rows that failed, ran on
a CPU (``--cpu`` takes them), or moved tensors to the host's memory tell nothing about these constants: they are left
out.
"""

import argparse
import shlex
import tempfile
from pathlib import Path

from measured_step import job_of
from scaling import parsed as scaling_flags
from scaling import run_of
from scaling_table import planned_rate

from hylo_megatron.errors import HyLoError
from hylo_megatron.flags import Parser, command_line
from hylo_megatron.json_file import read_json
from hylo_megatron.markdown import table
from hylo_megatron.planner.fit import CHOICES, RATES, MeasuredStep, fitted_to, mean_error
from hylo_megatron.planner.speed import FITTED, Constants

PASSES = 4  # bytes that arrive behind attention make the time of a step not quite linear


def steps_of(path: Path, cpu: bool) -> dict[str, MeasuredStep]:
    """Return the rows of a table that tell about the planner's constants, by the name of step and layout."""
    found = read_json(path)
    if found["device"] == "CPU" and not cpu:
        return {}
    options = scaling_flags(shlex.split(found["command"])[1:])
    card = planned_rate(found["device"], found["product_rate"])
    with tempfile.TemporaryDirectory() as folder:
        job = job_of(options, Path(folder))
        runs = {row["layout"]: run_of(job, row, options) for row in found["rows"]}
    return {
        f"{job.name}, {row['layout']}": MeasuredStep(run=run, seconds=row["seconds"], card=card)
        for row in found["rows"]
        if (run := runs[row["layout"]])
    }


def fitted(steps: list[MeasuredStep], names: list[str]) -> Constants:
    constants = FITTED
    for _ in range(PASSES):
        constants = fitted_to(steps, constants, names)
    return constants


def row(name: str, step: MeasuredStep, found: Constants) -> list[str]:
    tokens = step.run.work.micro_batch * step.run.micro_batches * step.run.work.seq_length
    tokens *= step.run.work.processes // step.run.layout.ranks
    errors = [f"{tokens / step.planned(at):,.0f} ({step.error(at):+.0%})" for at in (FITTED, found)]
    return [name, f"{tokens / step.seconds:,.0f}", *errors]


def changed(found: Constants) -> list[str]:
    """Return the lines of ``Constants`` that differ from ``planner/speed.py``."""
    pairs = ((name, value, getattr(FITTED, name)) for name, value in vars(found).items())
    return [f"    {name}: float = {value:.3g}  # now {now:.3g}" for name, value, now in pairs if value != now]


def run(options: argparse.Namespace) -> None:
    steps: dict[str, MeasuredStep] = {}
    for path in options.files:
        steps |= steps_of(path, options.cpu)
    if not steps:
        raise HyLoError("no row of these files tells about the planner's constants; give tables of scaling.py on GPUs")
    found = fitted(list(steps.values()), options.constants)
    head = ["step", "tokens/s", "planned now", "planned with the fit"]
    print(table([head, *(row(name, step, found) for name, step in steps.items())]))
    errors = [mean_error(list(steps.values()), at) for at in (FITTED, found)]
    print(f"\n{len(steps)} steps, mean error {errors[0]:.1%} now, {errors[1]:.1%} with\n" + "\n".join(changed(found)))


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", help="JSON files of scaling.py")
    parser.add_argument("--constants", nargs="+", choices=CHOICES, default=list(RATES), help="what is fitted")
    parser.add_argument("--cpu", action="store_true", help="take rows that ran on a CPU too, to try the program")
    return parser.parse_args(argv)


@command_line
def main(argv: list[str] | None = None) -> None:
    run(parsed(argv))


if __name__ == "__main__":
    main()
