"""Initial states beside a checkpoint: an interrupted run with other states than zero goes on exactly."""

import shutil

import pytest
import torch
from helpers import tiny

from hylo_megatron.checkpoint import initial_states
from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
from helpers import train as helpers  # noqa: E402


def test_a_file_holds_the_bits_of_one_rank_and_layout(tmp_path):
    states = {"3": torch.randn(2, 3, 4, 4), "7": torch.tensor([torch.nan, -0.0])}
    (tmp_path / "iter_0000004").mkdir()
    initial_states.write(tmp_path, 4, 1, states, "DP 2")
    tiny.same_bits(initial_states.read(tmp_path, 4, 1, "DP 2"), states)
    for iteration, rank, layout in ((4, 1, "DP 4"), (4, 0, "DP 2"), (8, 1, "DP 2")):
        assert initial_states.read(tmp_path, iteration, rank, layout) is None
    initial_states.write(tmp_path, 8, 1, {}, "DP 2")  # a rank without linear blocks
    assert initial_states.read(tmp_path, 8, 1, "DP 2") == {}
    (tmp_path / "iter_0000004").rmdir()
    initial_states.write(tmp_path, 12, 1, states, "DP 2")
    names = [path.name for path in sorted((tmp_path / "initial_states").iterdir())]
    assert names == ["iter_0000012-00001.safetensors"]  # neither of the others has a checkpoint
    (tmp_path / "initial_states" / names[0]).write_bytes(b"half")
    assert initial_states.read(tmp_path, 12, 1, "DP 2") is None


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return helpers.make_world(tmp_path_factory.mktemp("world"))


def steps(world, folder, mode: str, processes: int, **flags) -> tuple[list, str]:
    flags = dict(hylo_initial_states=mode, save_interval=2) | flags
    done = helpers.train(*helpers.train_flags(world, "distill", folder, **flags), processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = helpers.read_log(folder / "train_log.jsonl")
    return [(line["iteration"], line["loss"], line["grad_norm"]) for line in lines], done.stdout


@pytest.mark.parametrize("mode, processes, sizes", [
    ("carried", 1, {}),
    pytest.param("random", 1, {}, marks=pytest.mark.parallel),
    pytest.param("carried", 2, {}, marks=pytest.mark.parallel),
    pytest.param("carried", 2, dict(pipeline_model_parallel_size=2), marks=pytest.mark.parallel),
], ids=["carried", "random", "DP2", "PP2"])  # fmt: skip
def test_an_interrupted_run_goes_on_with_its_states(world, tmp_path, mode, processes, sizes):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    wanted, _ = steps(world, whole, mode, processes, **sizes)
    assert len(wanted) == 4
    shutil.copytree(whole, stopped, ignore=shutil.ignore_patterns("iter_0000004*"))
    (stopped / "latest_checkpointed_iteration.txt").write_text("2")
    found, said = steps(world, stopped, mode, processes, **sizes)
    assert found == wanted and "starts from zero" not in said
    if processes > 1:
        return
    # without the files, as after a copy of the checkpoint alone, the difference shows and is told
    shutil.rmtree(stopped)
    shutil.copytree(whole, stopped, ignore=shutil.ignore_patterns("iter_0000004*", "initial_states"))
    (stopped / "latest_checkpointed_iteration.txt").write_text("2")
    found, said = steps(world, stopped, mode, processes, **sizes)
    assert found[:2] == wanted[:2] and found[2] != wanted[2]
    assert "no initial states of this layout beside it, so the first step starts from zero" in said
