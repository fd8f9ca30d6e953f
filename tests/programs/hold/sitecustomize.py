"""Holds a training once a step is in its log, so that a test can kill the training there, however slow the test is.

Python imports this module at its start if the module's folder is in PYTHONPATH. ``HYLO_TEST_HOLD`` has the name of a
stage's folder and the step, such as ``distill-8k 4``.
"""

import os
import sys
import time
from importlib.util import find_spec


class Holding:
    """Finds the module of the log, and lets its ``write`` never return from the step."""

    def find_spec(self, name, *_):
        if name != "hylo_megatron.engine.step_log":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        load = spec.loader.exec_module

        def load_and_hold(module):
            load(module)
            hold(module.StepLog)

        spec.loader.exec_module = load_and_hold
        return spec


def hold(log_class) -> None:
    write, (stage, step) = log_class.write, os.environ["HYLO_TEST_HOLD"].split()

    def write_and_wait(log, losses, iteration, *more):
        write(log, losses, iteration, *more)
        while iteration == int(step) and log.path.parent.name == stage:
            time.sleep(1)

    log_class.write = write_and_wait


if "HYLO_TEST_HOLD" in os.environ:
    sys.meta_path.insert(0, Holding())
