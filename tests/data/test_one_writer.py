"""Two processes that write the same files: the second one is refused, and a killed one leaves nothing in the way."""

import subprocess
import sys

import pytest
from helpers.paths import ROOT

from hylo_megatron import files
from hylo_megatron.errors import HyLoError
from hylo_megatron.packages import has
from hylo_megatron.recipes.smollm2 import smollm2_cpu
from hylo_megatron.run.launch import Processes
from hylo_megatron.run.recipe_run import Run

# Holds the lock of a folder's file until it is killed
HOLD = """
import sys, time
from pathlib import Path
from hylo_megatron.files import only_writer
with only_writer(Path(sys.argv[1]), "it"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0)


@pytest.mark.skipif(not has("megatron-core"), reason="megatron-core is not installed")
def test_token_files_have_one_writer(tmp_path):
    from hylo_megatron.data.token_writer import token_files

    with token_files(tmp_path / "text", 300, ()):
        refusal = pytest.raises(
            HyLoError, match="text.bin: another process is writing it; wait for its end, or choose"
        )
        with refusal, token_files(tmp_path / "text", 300, ()):
            pass
        with token_files(tmp_path / "other", 300, ()):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.bin", "other.idx", "text.bin", "text.idx"]


def test_a_killed_writer_is_not_in_the_way(tmp_path):
    lock = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(HyLoError, match="the folder: another process"), files.only_writer(lock, "the folder"):
            pass
    finally:
        holder.kill()
        holder.communicate()
    assert lock.exists()
    with files.only_writer(lock, "the folder"):
        pass
    assert not lock.exists()


def test_a_recipe_runs_once_in_a_folder(tmp_path, monkeypatch):
    def run():
        return Run(smollm2_cpu(), tmp_path / "out", Processes())

    def second(_):
        monkeypatch.setattr(Run, "_execute_alone", pytest.fail)
        with pytest.raises(HyLoError, match="out: another process is writing it"):
            run().execute()

    monkeypatch.setattr(Run, "_execute_alone", second)
    run().execute()
    assert not list((tmp_path / "out").iterdir())
