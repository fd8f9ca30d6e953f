"""Triton's tuner times the few candidates of ``tuned.py`` where the kernel, its candidates and the card are known.

Triton keeps tuning results in files that are named by the list of candidates. A result of few candidates is therefore
never read as a result of all of them. A stored result of all is read before few are timed, so older cache folders
stay good.
"""

import contextlib
import os

from hylo_megatron.engine.patch import around, entries
from hylo_megatron.engine.tuned import KNOWN

SWITCH = "HYLO_TUNE_ALL"  # in the environment: 1 lets Triton time every candidate
WIDTHS = ("K", "BD")  # what fla's kernels call the width of a head: of keys, and of what a norm reads, rounded up


class NotStored(Exception):
    """No file has the result."""


class Few(list):
    """The candidates to time. ``everyone`` has those that the library offers."""

    def __init__(self, few: list, everyone: list):
        super().__init__(few)
        self.everyone = everyone


def wanted() -> bool:
    return os.environ.get(SWITCH) != "1"


def text(candidate) -> str:
    """Return a candidate as the table of ``tuned.py`` has it."""
    parts = [f"{name}={value}" for name, value in sorted(candidate.kwargs.items())]
    rare = {"ctas": (candidate.num_ctas, 1), "maxnreg": (candidate.maxnreg, None), "ir": (candidate.ir_override, None)}
    parts += [f"w{candidate.num_warps}", f"s{candidate.num_stages}"]
    return " ".join(parts + [f"{name}={value}" for name, (value, usual) in rare.items() if value != usual])


def name_of(tuner) -> str:
    return f"{tuner.base_fn.__module__}.{tuner.base_fn.__name__}"


def known(tuner, candidates: list, arguments: dict) -> list:
    """Return the candidates worth timing on this card for a call's ``arguments``.

    The list is empty where ``candidates`` are not those of the table, or the call has wider heads than were timed.
    """
    from triton.runtime.driver import driver

    target = driver.active.get_current_target()
    row = KNOWN.get(f"{target.backend} {target.arch}", {}).get(name_of(tuner))
    if row is None:  # any kernel of any library: its arguments may be called otherwise
        return []
    offered, widest, *best = row
    if max(arguments.get(name, 0) for name in WIDTHS) > widest:
        return []
    few = [each for each in candidates if text(each) in best]
    return few if (len(candidates), len(few)) == (offered, len(best)) else []


@around
def few_candidates(prune, run, self, kwargs):
    """Return the known candidates out of what Triton's ``prune_configs`` returns.

    A tuner that keeps no results on the disk times all: it would not reach ``whole_result_first`` when the few fail.
    """
    candidates = prune(self, kwargs)
    few = known(self, candidates, {**self.nargs, **kwargs}) if self.cache_results else []
    return Few(few, candidates) if few else candidates


def _not_stored():
    raise NotStored


@around
def whole_result_first(check, run, self, tuning_key, configs, bench_fn):
    """Let Triton read its result for all candidates or for the few, or time the few, and all where none of them runs.

    Return whether a file had the result.
    """
    if not isinstance(configs, Few):
        return check(self, tuning_key, configs, bench_fn)
    with contextlib.suppress(NotStored):
        return check(self, tuning_key, configs.everyone, _not_stored)
    stored = check(self, tuning_key, configs, bench_fn)
    if any(times[0] != float("inf") for times in self.configs_timings.values()):
        return stored
    configs[:] = configs.everyone  # none fits the card at this shape; bench_fn times this list
    return check(self, tuning_key, configs.everyone, bench_fn)


PATCHES = entries(
    "tuning", "triton",
    ("triton.runtime.autotuner:Autotuner.prune_configs", few_candidates, "(self, kwargs)",
     "the tuner compiles and times dozens of candidates of a kernel, of which few are ever the fastest"
     " (triton/runtime/autotuner.py:260)"),
    ("triton.runtime.autotuner:Autotuner.check_disk_cache", whole_result_first,
     "(self, tuning_key, configs, bench_fn)",
     "a stored result of all candidates is better than a new one of few; where no known candidate runs, all are timed"
     " (triton/runtime/autotuner.py:170)"),
    needed=wanted,
)  # fmt: skip
