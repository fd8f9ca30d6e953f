"""Checkpoint folders as crashes leave them: what counts, what is set aside, what may be deleted."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from helpers.paths import ROOT

from hylo_megatron.checkpoint import iterations
from hylo_megatron.checkpoint.iterations import TRACKER, latest, repair, retire_older
from hylo_megatron.errors import HyLoError


def drop_older(folder, keep=1):
    for path in retire_older(folder, keep):
        shutil.rmtree(path)


def write(folder, *numbers, tracker=None):
    for number in numbers:
        path = iterations.iteration_folder(folder, number)
        path.mkdir(parents=True)
        (path / ".metadata").write_bytes(b"x")
        (path / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
        (path / "__0_0.distcp").write_text(str(number))
    if tracker is not None:
        (folder / TRACKER).write_text(tracker)
    return folder


def names(folder):
    return sorted(path.name for path in folder.glob("iter_*"))


BROKEN = {
    "no data yet": ("__0_0.distcp", ".metadata", "metadata.json"),
    "data alone": (".metadata", "metadata.json"),
    "not named whole by the engine": ("metadata.json",),
    "not named whole by torch": (".metadata",),
}


@pytest.mark.parametrize("missing", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("tracker", ["8", "", None, "x\0", "99"])
def test_a_tracker_that_names_nothing_whole_falls_back_to_the_newest_whole(tracker, missing, tmp_path, capsys):
    write(tmp_path, 4, 6, 8, tracker=tracker)
    for name in missing:
        (tmp_path / "iter_0000008" / name).unlink()
    assert latest(tmp_path) == tmp_path / "iter_0000006"
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: ") and "taking iter_0000006" in warning
    repair(tmp_path, own=True)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "iter_0000008.incomplete" in said[0]
    assert (tmp_path / TRACKER).read_text() == "6"
    assert names(tmp_path) == ["iter_0000004", "iter_0000006", "iter_0000008.incomplete"]
    repair(tmp_path, own=True)
    assert latest(tmp_path) == tmp_path / "iter_0000006"
    assert capsys.readouterr().err == ""


def test_half_a_metadata_file_is_none(tmp_path):
    write(tmp_path, 4, 8, tracker="8")
    for text in ("", '{"sharded_backend', "[]", "7"):
        (tmp_path / "iter_0000008" / "metadata.json").write_text(text)
        assert latest(tmp_path) == tmp_path / "iter_0000004"


def test_a_tracker_that_names_something_whole_is_obeyed(tmp_path, capsys):
    write(tmp_path, 4, 8, tracker="4")
    repair(tmp_path, own=True)
    assert latest(tmp_path).name == "iter_0000004" and names(tmp_path) == ["iter_0000004", "iter_0000008"]
    assert capsys.readouterr().err == ""


def test_nothing_whole_is_an_error_and_an_empty_folder_is_not(tmp_path):
    repair(tmp_path, own=True)
    (tmp_path / TRACKER).write_text("")
    with pytest.raises(HyLoError, match="names no iteration"):
        repair(tmp_path, own=True)
    (tmp_path / TRACKER).write_text("12")
    with pytest.raises(HyLoError, match="iter_0000012.*incomplete"):
        repair(tmp_path, own=True)


def test_a_folder_of_others_is_not_tidied(tmp_path):
    write(tmp_path, 4, 8, tracker="")
    (tmp_path / "iter_0000008" / ".metadata").unlink()
    repair(tmp_path, own=False)
    assert names(tmp_path) == ["iter_0000004", "iter_0000008"] and (tmp_path / TRACKER).read_text() == "4"


@pytest.mark.parametrize("keep, left", [(1, [8]), (2, [6, 8]), (3, [4, 6, 8]), (9, [2, 4, 6, 8])])
def test_the_newest_are_kept(keep, left, tmp_path):
    write(tmp_path, 2, 4, 6, 8, tracker="8")
    drop_older(tmp_path, keep)
    assert names(tmp_path) == [f"iter_{number:07d}" for number in left]


def test_nothing_goes_before_a_newer_one_is_complete_and_named(tmp_path):
    write(tmp_path, 2, 4, 6, tracker="2")
    assert retire_older(tmp_path) == [] and len(names(tmp_path)) == 3  # 4 and 6 are newer than what counts
    (tmp_path / TRACKER).write_text("6")
    (tmp_path / "iter_0000006" / "metadata.json").unlink()
    assert retire_older(tmp_path) == [] and len(names(tmp_path)) == 3
    (tmp_path / TRACKER).write_text("")
    assert retire_older(tmp_path) == [] and len(names(tmp_path)) == 3


def test_what_is_set_aside_goes_with_the_older_ones(tmp_path):
    write(tmp_path, 2, 4, tracker="4")
    iterations.set_aside(tmp_path / "iter_0000002")
    drop_older(tmp_path, 3)
    assert names(tmp_path) == ["iter_0000004"]


# Reads until its standard input ends.
READ = """
import sys
from hylo_megatron.checkpoint.iterations import reading
with reading(sys.argv[1]) as path:
    print("locked", flush=True)
    sys.stdin.read()
    assert (path / "__0_0.distcp").read_text() == "2"
"""


@pytest.fixture
def reader(tmp_path):
    """A process that reads iteration 2, the only one."""
    write(tmp_path, 2, tracker="2")
    command = [sys.executable, "-c", READ, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_what_another_process_reads_stays_until_it_is_done(tmp_path, reader):
    write(tmp_path, 4, 6, tracker="6")
    drop_older(tmp_path)
    assert names(tmp_path) == ["iter_0000002", "iter_0000006"]
    reader.stdin.close()
    assert reader.wait() == 0
    drop_older(tmp_path)
    assert names(tmp_path) == ["iter_0000006"]


def test_a_reader_that_was_killed_holds_nothing(tmp_path, reader):
    reader.kill()
    reader.wait()
    write(tmp_path, 4, tracker="4")
    drop_older(tmp_path)
    assert names(tmp_path) == ["iter_0000004"]


def test_a_link_is_not_deleted(tmp_path):
    write(tmp_path / "elsewhere", 2)
    write(tmp_path / "run", 4, tracker="4")
    (tmp_path / "run" / "iter_0000002").symlink_to(tmp_path / "elsewhere" / "iter_0000002")
    drop_older(tmp_path / "run")
    assert names(tmp_path / "run") == ["iter_0000002", "iter_0000004"]


def test_the_tracker_is_never_seen_empty(tmp_path, monkeypatch):
    write(tmp_path, 2, 4, tracker="2")
    seen = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *a: (seen.append((tmp_path / TRACKER).read_text()), replace(*a)))
    iterations.write_tracker(tmp_path, "4")
    assert seen == ["2"] and (tmp_path / TRACKER).read_text() == "4"
    assert [path.name for path in tmp_path.glob("*.partial")] == []
