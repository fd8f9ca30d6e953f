"""What megatron has allocated after training: ``python memory_runs.py RUNS.json``.

RUNS.json: ``{number of processes: [command lines of hylo_megatron.train]}``; the runs of a number follow one another
in processes forked from this one, which has imported everything. Each rank writes bytes to SAVE/memory-RANK.json.
"""

import contextlib
import json
import multiprocessing
import os
import sys
from pathlib import Path

from helpers import train as helpers
from megatron.training import training
from megatron.training.global_vars import get_args
from programs import layout_runs

from hylo_megatron import parent
from hylo_megatron.engine import checkpoint_writer
from hylo_megatron.engine.register import install, uninstall
from hylo_megatron.train import main as train


def storages(tensors) -> int:
    """Bytes, what shares a storage counted once."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(found.values())


def measured(wrapped, optimizer) -> dict:
    """Bytes of one rank; ``buffers`` are gradients with their padding."""
    module = wrapped.module
    while not hasattr(module, "student"):
        module = module.module
    mains, states = [], []
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        mains += [p for group in part.shard_fp32_from_float16_groups for p in group]
        states += [t for state in part.optimizer.state.values() for t in state.values() if t.dim()]
    return {
        "parameters": sum(p.nbytes for p in module.student.parameters()),
        "teacher": storages(module.teacher.parameters()),
        "gradients": sum(p.main_grad.nbytes for buffer in wrapped.buffers for p in buffer.params),
        "buffers": sum(buffer.grad_data.nbytes for buffer in wrapped.buffers),
        "optimizer": sum(t.nbytes for t in mains + states),
    }  # fmt: skip


def record() -> None:
    engine = training.train
    training.save_checkpoint = checkpoint_writer.start_results_queue = lambda *args, **kwargs: None  # to save time

    def train_and_record(forward_step, model, optimizer, *rest, **kwargs):
        result = engine(forward_step, model, optimizer, *rest, **kwargs)
        args = get_args()
        (Path(args.save) / f"memory-{args.rank}.json").write_text(json.dumps(measured(model[0], optimizer)))
        return result

    training.train = train_and_record


def run_all(lines: list[list[str]], rank: int, processes: int, place: dict[str, str]) -> None:
    place = place | {parent.PARENT: str(os.getppid())}  # none outlives a parent that the test has given up
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes)) | place
    for number, argv in enumerate(lines):
        os.environ[parent.STORE] = f"run {number}"
        uninstall("training")
        layout_runs.forget_run()
        sys.argv = [sys.argv[0], *argv]
        with contextlib.suppress(SystemExit):
            train()


def main(runs: Path) -> None:
    install("megatron")
    record()
    fork = multiprocessing.get_context("fork")
    started, stores = [], []
    for processes, lines in json.loads(runs.read_text()).items():
        stores.append(helpers.meeting_store())
        place = helpers.meeting_place(stores[-1])
        for rank in range(int(processes)):
            started.append(fork.Process(target=run_all, args=(lines, rank, int(processes), place)))
            started[-1].start()
    for process in started:
        process.join()
    sys.exit(max(abs(process.exitcode) for process in started))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
