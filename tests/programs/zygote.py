"""A process that has imported all that a training imports, and forks a child for each training that a test asks for.

It reads lines of JSON from its standard input. An order ``{"argv", "environment", "out", "err", "code"}`` starts a
training. When the training has ended, the file ``code`` has its exit code. ``{"code", "signal"}`` sends a signal to
the training of that file. Orders share nothing else, so a test that fails does not disturb the tests after it. This
process has no threads, because a fork copies the locks that threads hold. It ends with its standard input, and all
trainings end with this process.

A training of a few steps spends most of its time on the import of torch and megatron-core, which this saves. Both are
imported in functions, because the processes that a training spawns import this file.
"""

import importlib
import json
import os
import select
import signal
import sys
from pathlib import Path

from hylo_megatron.files import write_text
from hylo_megatron.parent import bind_child

KILL_AT = "HYLO_TEST_KILL_AT"  # in a training's environment: the step after which it gets SIGKILL

AHEAD = "HYLO_TEST_AHEAD"  # the same: run the loop as on a GPU, where the host runs ahead of the steps

SPOIL = "HYLO_TEST_SPOIL"  # the same: an object of steps, and factors of their losses

# What megatron-core imports only in the course of a training.
LATER = ("transformers.utils.type_validators", "megatron.core.tokenizers.text.text_tokenizer")


def become(order: dict, parent: int) -> None:
    """Give a child what ``python -m hylo_megatron.train`` starts with: its arguments, environment and files."""
    bind_child(parent)
    os.environ.clear()
    os.environ.update(order["environment"])
    os.setsid()
    for path, descriptor in ((order["out"], 1), (order["err"], 2)):
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(target, descriptor)
        os.close(target)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = [sys.modules["hylo_megatron.train"].__file__, *order["argv"]]


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
    import torch
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


class Trainings:
    """The trainings that run: the file for the exit code of each process, by the file descriptor of the process."""

    def __init__(self):
        self.running: dict[int, tuple[int, str]] = {}

    def follow(self, order: dict) -> bool:
        """Follow an order, and return whether this process is the new training."""
        if "signal" in order:
            for child, code in self.running.values():  # a child that is still listed keeps its process number
                if code == order["code"]:
                    os.kill(child, order["signal"])
            return False
        parent = os.getpid()
        if (child := os.fork()) == 0:
            become(order, parent)
            return True
        self.running[os.pidfd_open(child)] = child, order["code"]
        return False

    def ended(self, descriptor: int) -> None:
        os.close(descriptor)
        child, code = self.running.pop(descriptor)
        _, status = os.waitpid(child, 0)
        if Path(code).parent.is_dir():  # else the test has given up
            write_text(code, str(os.waitstatus_to_exitcode(status)))


def serve() -> bool:
    """Follow orders. Return True in the process of a training, and False when no order can come."""
    trainings, rest = Trainings(), b""
    while True:
        ready, _, _ = select.select([0, *trainings.running], [], [])
        for descriptor in ready:
            if descriptor in trainings.running:
                trainings.ended(descriptor)
        if 0 not in ready:
            continue
        if not (data := os.read(0, 2**16)):
            return False
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if trainings.follow(json.loads(line)):
                return True


def main() -> None:
    from hylo_megatron import train
    from hylo_megatron.engine.register import install, patches

    install("megatron")
    for patch in patches("writing", "training"):
        patch.place()  # imports the module that holds the name
    for name in LATER:
        importlib.import_module(name)
    if not serve():
        return
    if KILL_AT in os.environ:
        die_at(int(os.environ[KILL_AT]))
    if AHEAD in os.environ:
        run_ahead()
    if SPOIL in os.environ:
        spoil({int(step): float(factor) for step, factor in json.loads(os.environ[SPOIL]).items()})
    train.main()


if __name__ == "__main__":
    main()
