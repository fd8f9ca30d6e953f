"""Training runs that should be refused, in one process: ``python planted_runs.py RUNS.json OUT.json``.

RUNS.json holds command lines of ``hylo_megatron.train``, and arguments of ``planted.plant`` as objects. OUT.json gets
how each run ended, and what stderr got.
"""

import contextlib
import io
import json
import os
import sys
import traceback
from pathlib import Path

import parallel_runs
import planted

import hylo_megatron.distill  # noqa: F401  the engine, before megatron


def run(argv: list[str]) -> list:
    from hylo_megatron.train import main as train

    sys.argv = ["train", *argv]
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            train()
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            code = traceback.format_exc()
    return [code, said.getvalue()]


def main(runs: Path, out: Path) -> None:
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    untouched, ends = parallel_runs.hooked(), []
    for argv in json.loads(runs.read_text()):
        if isinstance(argv, dict):
            planted.plant(Path(argv["source"]), Path(argv["target"]), argv["kind"], Path(argv["marker"]))
            continue
        parallel_runs.restore(untouched)
        parallel_runs.forget_run()
        ends.append(run(argv))
    out.write_text(json.dumps(ends))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
