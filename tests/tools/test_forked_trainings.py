"""Forked trainings of tests: none disturbs another, and none hangs when the process that forks them ends."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
from helpers import train as helpers  # noqa: E402
from helpers.zygote import Zygote  # noqa: E402


@pytest.fixture(scope="module")
def zygote():
    started = Zygote(helpers.environment())
    yield started
    started.process.kill()
    started.process.wait()


def start(zygote, folder, name: str, *argv: str):
    return zygote.start(argv, helpers.single(), folder / f"{name}.out", folder / f"{name}.err")


def test_trainings_are_waited_for_in_any_order_and_by_several_threads(zygote, tmp_path):
    names = [str(number) for number in range(6)]
    given_up, *others = [start(zygote, tmp_path, name, "--lr", f"none-{name}") for name in names]
    with ThreadPoolExecutor() as threads:
        codes = list(threads.map(lambda each: each.wait(), reversed(others)))
    assert codes == [2] * 5
    for name in names[1:]:
        assert f"argument --lr: 'none-{name}'" in (tmp_path / f"{name}.err").read_text()
    assert start(zygote, tmp_path, "last", "--lr", "none").wait() == 2  # nobody has asked for the first one


def test_a_training_that_goes_on_is_killed(zygote, tmp_path):
    os.mkfifo(tmp_path / "hangs.out")  # which nobody reads
    hanging = start(zygote, tmp_path, "hangs", "--help")
    assert hanging.poll() is None and hanging.wait(timeout=0.1) == -signal.SIGKILL
    hanging.send(signal.SIGTERM)  # to nobody: another process may have the number by now


def test_trainings_say_that_their_parent_is_gone(tmp_path):
    zygote = Zygote(helpers.environment())
    os.mkfifo(tmp_path / "hangs.out")
    hanging = start(zygote, tmp_path, "hangs", "--help")
    zygote.process.kill()
    zygote.process.wait()
    zygote.errors.write_text("the reason\n")
    for late in (hanging.poll, hanging.wait, lambda: start(zygote, tmp_path, "late", "--help")):
        with pytest.raises(AssertionError, match="is gone: the reason"):
            late()
