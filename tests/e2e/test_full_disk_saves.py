"""A full disk at a save: room is checked before it, and writers that fail are seen."""

import multiprocessing
import queue
import re
import threading
import time
from pathlib import Path

import pytest
import torch

from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
from helpers.disks import ROOM, largest_file
from helpers.waits import PATIENCE
from torch.distributed.checkpoint.filesystem import _StorageWriterTransforms

from hylo_megatron.checkpoint import disk, iterations, save_room
from hylo_megatron.checkpoint.save_room import SaveRoom
from hylo_megatron.engine import checkpoint_writer, peers
from hylo_megatron.engine.register import install
from hylo_megatron.errors import HyLoError


def test_room_before_a_save(tmp_path, monkeypatch):
    room, free = SaveRoom(tmp_path, 2**20, pytest.fail), [2**22]
    monkeypatch.setattr(disk, "free", lambda _: free[0])
    room.check_start(3, keep=1)
    old, first, second = (iterations.iteration_folder(tmp_path, n) for n in (1, 2, 3))
    old.mkdir()
    set_aside = iterations.set_aside(old)
    room.begin(first)
    first.mkdir()
    (first / "data").write_bytes(b"x" * 2**18)
    free[0] = 2**20 + 2**19  # enough for one, not for the rest of the first too
    with pytest.raises(HyLoError, match=f"no room for {second.name}: it needs 1.[78] MiB, 1.5 MiB is free"):
        room.begin(second)
    assert not set_aside.exists() and (first / "data").exists()  # what is no checkpoint made room
    room.end(first)
    room.begin(second)
    room.end(second)
    free[0] = 2**19
    with pytest.raises(HyLoError, match="no room for the first checkpoint: it needs 1.0 MiB, 512 KiB is free"):
        room.check_start(3, keep=1)


def test_the_last_checkpoint_may_be_smaller(tmp_path, monkeypatch, capsys):
    room = SaveRoom(tmp_path, 2**20, pytest.fail, last=2**18)
    place = iterations.iteration_folder(tmp_path, 3)
    monkeypatch.setattr(disk, "free", lambda _: 2**19)
    room.check_start(1, keep=1)
    with pytest.raises(HyLoError, match="no room for the first checkpoint: it needs 1.0 MiB"):
        room.check_start(2, keep=1)
    with pytest.raises(HyLoError, match=f"no room for {place.name}: it needs 1.0 MiB"):
        room.begin(place)
    room.begin(place, last=True)
    monkeypatch.setattr(disk, "free", lambda _: 2**20 + 2**18)
    room.check_start(2, keep=1)
    assert not capsys.readouterr().err


def test_not_all_checkpoints_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(disk, "free", lambda _: 2 * 2**20)
    room = SaveRoom(tmp_path, 2**20, pytest.fail)
    room.check_start(3, keep=1)
    assert not capsys.readouterr().err
    room.check_start(3, keep=None)
    assert "warning" in (said := capsys.readouterr().err) and "--hylo-keep-last" in said and said.count("\n") == 1


def test_a_save_that_stands_still_on_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(save_room, "STALLED_SECONDS", 0.3)
    monkeypatch.setattr(save_room, "LOOK_SECONDS", 0.05)
    free, said = [2**30], queue.Queue()
    monkeypatch.setattr(disk, "free", lambda _: free[0])
    room, place = SaveRoom(tmp_path, 2**20, said.put), tmp_path / "iter_0000002"
    place.mkdir()
    room.begin(place)
    time.sleep(1)
    assert said.empty()  # slow, but there is room
    free[0] = 4096
    line = said.get(timeout=PATIENCE)
    assert "iter_0000002: 0 KiB written, and no space left: it needs 1.0 MiB, 4 KiB is free" in line
    room.end(place)


def bucket(file: Path, size: int):
    from torch.distributed.checkpoint.metadata import MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

    item = WriteItem(MetadataIndex("tensor"), WriteItemType.TENSOR, tensor_data=None)
    return str(file), file.name, ([], [(item, torch.zeros(size // 4))])


@pytest.mark.parametrize("bad", range(3))
def test_a_writer_answers_whichever_file_fails(bad, tmp_path):
    """The engine writes the last file first, and the others in threads, whose failure ends the process unanswered."""
    results = queue.Queue()
    buckets = [bucket(tmp_path / f"file{i}", 400_000 if i == bad else 4000) for i in range(3)]
    install("writing")
    with largest_file(100_000):
        checkpoint_writer.write_buckets([_StorageWriterTransforms()], False, 0, buckets, results)
    error = results.get_nowait()
    assert isinstance(error, HyLoError)
    assert re.search(rf"file{bad}: .*: it needs 391 KiB, .* is free on its disk", str(error))
    checkpoint_writer.write_buckets([_StorageWriterTransforms()], False, 0, buckets, results)
    assert sorted(results.get_nowait()) == [0, 1, 2]


def test_a_failed_writer_leaves_nothing_to_garbage_collection(tmp_path, monkeypatch):
    """The unfinished zip writer in the frames of the error crashed the process: ``test_small_disks`` shows it."""
    errors, said = [], checkpoint_writer._said
    monkeypatch.setattr(checkpoint_writer, "_said", lambda error, bucket: errors.append(error) or said(error, bucket))
    install("writing")
    with largest_file(100_000):
        buckets = [bucket(tmp_path / "file", 400_000)]
        checkpoint_writer.write_buckets([_StorageWriterTransforms()], False, 0, buckets, queue.Queue())
    error = errors[0]
    while error is not None:
        assert error.__traceback__ is None
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize("need", [1000, 2**60], ids=["room", "no room"])
def test_a_dead_writer_is_seen(need, tmp_path, monkeypatch):
    said = queue.Queue()
    monkeypatch.setattr(peers, "fail", said.put)
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(36000,), daemon=True)
    process.start()
    threading.Thread(
        target=checkpoint_writer._watch, args=(process, threading.Event(), tmp_path, need), daemon=True
    ).start()
    process.kill()
    line = said.get(timeout=PATIENCE)
    assert "the process that writes checkpoints is gone (killed by SIGKILL" in line
    assert bool(re.search(ROOM, line)) == (need > 1000)


def test_what_cannot_be_handed_to_a_writer(monkeypatch):
    """As when shared memory is full: the queue's thread would drop the request, and the trainer wait for ever."""
    said = queue.Queue()
    monkeypatch.setattr(peers, "fail", said.put)
    requests = multiprocessing.get_context("spawn").JoinableQueue()
    requests._on_queue_feeder_error = checkpoint_writer._not_sent
    requests.put(lambda: None)
    assert "a checkpoint cannot be handed to its writer" in said.get(timeout=PATIENCE)
