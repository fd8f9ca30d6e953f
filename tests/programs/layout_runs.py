"""Several training runs in one launch: ``python layout_runs.py RUNS.json`` under torchrun, or alone.

RUNS.json is a list of command lines of ``hylo_megatron.train``. What a run has loaded is saved again, at once, to
SAVE-loaded: reading it shows what reached the model and the optimizer.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

from hylo_megatron.engine.register import install, uninstall


def forget_run() -> None:
    from helpers import train as helpers
    from megatron.core import num_microbatches_calculator, rerun_state_machine
    from megatron.training import async_utils, checkpointing, global_vars

    global_vars.destroy_global_vars()
    num_microbatches_calculator.destroy_num_microbatches_calculator()
    rerun_state_machine.destroy_rerun_state_machine()
    async_utils._async_calls_queue = checkpointing._LOADED_ITERATION = None
    helpers.close_groups()


def save_what_was_loaded() -> None:
    """Through the engine's own function, underneath our hooks."""
    from megatron.training import checkpointing, training
    from megatron.training.global_vars import get_args

    load, save = training.load_checkpoint, checkpointing.save_checkpoint

    def load_and_save(model, optimizer, scheduler, **kwargs):
        iteration, operations = load(model, optimizer, scheduler, **kwargs)
        args = get_args()
        if iteration:
            folder, was_async = args.save, args.async_save
            args.save, args.async_save = f"{folder}-loaded", False
            save(iteration, model, optimizer, scheduler, operations)
            args.save, args.async_save = folder, was_async
        return iteration, operations

    training.load_checkpoint = load_and_save


def main(runs: Path) -> None:
    install("megatron")
    from hylo_megatron.train import main as train

    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    for argv in json.loads(runs.read_text()):
        uninstall("training")  # of the run before
        forget_run()
        save_what_was_loaded()
        sys.argv = [sys.argv[0], *argv]
        with contextlib.suppress(SystemExit):  # the engine's way out of --exit-interval
            train()
        print("done", argv[argv.index("--save") + 1], flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
