"""Print what Triton's tuner measured on a card, as rows for ``hylo_megatron/engine/tuned.py``.

    HYLO_TUNE_ALL=1 HYLO_KERNEL_CACHE=/cache bash my_training.sh
    python tools/bench/tuned_table.py /cache/triton  # folders of one kind of card

A row's two or three candidates are within 3 % or 2 µs of the best one at every shape, where three can be. The remark
says by how much the row is slower than the best at worst, and then the same of the table's row. Add the module's name,
and put the widest head of your shapes in place of the 0.
"""

import json
import sys
from collections import defaultdict
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

from hylo_megatron.engine.few_candidates import text
from hylo_megatron.engine.tuned import KNOWN

FINE, UNSEEN = 0.03, 0.002  # the share of the best time, and the milliseconds, by which a candidate may be slower


def timings(folders: list[Path]) -> dict[str, list[dict[str, float]]]:
    """Return, for each kernel and shape at which all candidates were timed, each candidate's milliseconds."""
    found = defaultdict(list)
    for path in (path for folder in folders for path in folder.rglob("*.autotune.json")):
        stored = json.loads(path.read_text())
        times = {text(SimpleNamespace(**each)): time[0] for each, time in stored["configs_timings"]}
        found[path.name.removesuffix(".autotune.json")].append(times)
    return {name: [each for each in times if len(each) == max(map(len, times))] for name, times in found.items()}


def losses(chosen: tuple[str, ...], shapes: list[dict[str, float]]) -> list[float]:
    """Return by what share the best of ``chosen`` is slower than the best of all, at each shape."""
    pairs = [(min(times.get(each, float("inf")) for each in chosen), min(times.values())) for times in shapes]
    return [time / best - 1 if time - best > UNSEEN else min(time / best - 1, FINE) for time, best in pairs]


def row(shapes: list[dict[str, float]]) -> tuple[str, ...]:
    """Return two or three candidates: a smaller worst loss beyond ``FINE`` first, then fewer, then the mean."""
    alone = {each: sum(losses((each,), shapes)) for each in sorted({each for times in shapes for each in times})}

    def rank(chosen: tuple[str, ...]) -> tuple[float, ...]:
        found = losses(chosen, shapes)
        return max(FINE, *found), len(chosen), sum(found), sum(alone[each] for each in chosen)

    return min([*combinations(alone, 2), *combinations(alone, 3)] or [tuple(alone)], key=rank)


def main() -> None:
    today = {name.rpartition(".")[2]: tuple(best) for card in KNOWN.values() for name, (_, _, *best) in card.items()}
    found = timings([Path(folder) for folder in sys.argv[1:]]) or sys.exit(f"no *.autotune.json found\n{__doc__}")
    for name, shapes in sorted(found.items()):
        chosen = row(shapes)
        worst = " and ".join(f"{max(losses(each, shapes)):.1%}" for each in (chosen, today.get(name)) if each)
        print(f'"{name}": {(len(shapes[0]), 0, *chosen)},  # {len(shapes)} timed, {worst} slower')


if __name__ == "__main__":
    main()
