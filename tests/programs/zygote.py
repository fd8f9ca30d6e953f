"""A process that has imported all that a training imports, and forks a child for each training that a test asks for.

It reads lines of JSON, ``{"argv", "environment", "out", "err"}``, and answers each with the process number of the
child and, when the child has ended, with ``[number, exit code]``. A training of a few steps spends most of its time on
the import of torch and megatron-core, which this saves.
"""

import json
import os
import signal
import sys
import threading

import torch

from hylo_megatron import train

KILL_AT = "HYLO_TEST_KILL_AT"  # in a training's environment: the step after which it gets SIGKILL

AHEAD = "HYLO_TEST_AHEAD"  # the same: run the loop as on a GPU, where the host runs ahead of the steps

SPOIL = "HYLO_TEST_SPOIL"  # the same: an object of steps, and factors of their losses


def answer(line: object) -> None:
    """Write one whole line: ``print`` writes a line's end by itself, and another thread's line may come between."""
    os.write(1, (json.dumps(line) + "\n").encode())


def wait_for(child: int) -> None:
    _, status = os.waitpid(child, 0)
    answer([child, os.waitstatus_to_exitcode(status)])


def become(order: dict) -> None:
    """Give a child what ``python -m hylo_megatron.train`` starts with: its arguments, environment and files."""
    os.environ.clear()
    os.environ.update(order["environment"])
    os.setsid()
    for path, descriptor in ((order["out"], 1), (order["err"], 2)):
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(target, descriptor)
        os.close(target)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = [train.__file__, *order["argv"]]


def die_at(step: int) -> None:
    """Make this process kill itself, as the kernel would when memory runs out, once ``step`` is in the log."""
    from hylo_megatron.engine.step_log import StepLog

    write = StepLog.write

    def write_and_die(log, losses, iteration, *more):
        write(log, losses, iteration, *more)
        if iteration == step:
            os.kill(os.getpid(), signal.SIGKILL)

    StepLog.write = write_and_die


def run_ahead() -> None:
    from megatron.core.optimizer import optimizer

    from hylo_megatron.distill import command_line
    from hylo_megatron.engine import step_log, step_sync

    clip = optimizer.clip_grad_by_total_norm_fp32

    def clip_on_device(parameters, max_norm, total_norm, **more):
        assert isinstance(total_norm, torch.Tensor)  # a number has been read from the device
        clip(parameters, max_norm, total_norm, **more)

    optimizer.clip_grad_by_total_norm_fp32 = clip_on_device
    command_line.on_gpu = step_sync.on_gpu = lambda: True
    step_log.runs_ahead = lambda guard: not guard.spikes.settings.gates


def spoil(factors: dict[int, float]) -> None:
    """Multiply the loss of some steps, and with it the gradient, by a factor, which may be nan."""
    from hylo_megatron.distill import batches
    from hylo_megatron.distill.model import DistillModel

    begin, own, now = DistillModel.begin_step, batches.loss_function, [0]

    def begin_step(model, step, steps):
        now[0] = step + 1
        return begin(model, step, steps)

    def loss_function(*arguments):
        loss, count, logged = own(*arguments)
        factor = factors.get(now[0], 1.0)
        for name, part in logged.items():
            part[0] *= 1.0 if name == batches.LEARNT else factor
        return loss * factor, count, logged

    DistillModel.begin_step, batches.loss_function = begin_step, loss_function


def main() -> None:
    from hylo_megatron.engine.register import install, patches

    install("megatron")
    for patch in patches("writing", "training"):
        patch.place()  # imports the module that holds the name

    for line in sys.stdin:
        order = json.loads(line)
        if (child := os.fork()) == 0:
            become(order)
            if KILL_AT in os.environ:
                die_at(int(os.environ[KILL_AT]))
            if AHEAD in os.environ:
                run_ahead()
            if SPOIL in os.environ:
                spoil({int(step): float(factor) for step, factor in json.loads(os.environ[SPOIL]).items()})
            train.main()
            return
        answer(child)
        threading.Thread(target=wait_for, args=(child,), daemon=True).start()


if __name__ == "__main__":
    main()
