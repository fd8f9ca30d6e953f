"""``tools/bench/scaling.py``: which layouts it measures, and rows that fail."""

import fcntl
import json
import math
import os
import signal
import subprocess
import sys

import pytest
from helpers.scaling import BENCH, RECIPE, options_of
from helpers.waits import PATIENCE

from hylo_megatron.errors import HyLoError

TOY = (*RECIPE, "--toy", "--steps", "1", "--limit", str(PATIENCE))


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import scaling

    return scaling


def layouts_of(scaling, folder, *flags: str, **host) -> list[str]:
    options = options_of(scaling, *flags, **host)
    return [str(each.processes) for each in scaling.chosen(scaling.job_of(options, folder), options, 728e12)]


def test_the_planner_ranks_the_layouts(scaling, tmp_path):
    assert layouts_of(scaling, tmp_path, gpus=3) == ["TP 1 PP 1 DP 1", "TP 1 PP 1 DP 2", "TP 1 PP 1 DP 3"]


def test_layouts_are_named(scaling, tmp_path):
    flags = ("--only", "dp1,cp2dp2,tp2cp2,pp4", "--rows", "3")
    assert layouts_of(scaling, tmp_path, *flags) == ["TP 1 PP 1 DP 1", "TP 1 PP 1 CP 2 DP 2", "TP 2 PP 1 CP 2 DP 1"]


def test_named_layouts_of_smollm2_use_a_graph_where_each_gpu_has_the_model(scaling, tmp_path):
    options = scaling.parsed(["--recipe", "smollm2", "--stage", "distill-2k", "--random", "--only", "dp1,dp2,pp2"])
    options.gpus, options.gpu_memory = 2, 80.0
    found = scaling.chosen(scaling.job_of(options, tmp_path), options, 728e12)
    assert [each.processes.one_graph for each in found] == [True, True, False]


@pytest.mark.parametrize("only, words", [
    ("cp2tp", "--only cp2tp: expected sizes"), ("", "--only : expected sizes"), ("tp4", "does not divide 6"),
    ("cp8", "needs 8 GPUs, there are 4"), ("dp2dp2", "expected sizes"),
])  # fmt: skip
def test_layouts_that_cannot_run_are_refused_first(scaling, tmp_path, only, words):
    options = options_of(scaling, "--only", only or "")
    with pytest.raises(HyLoError, match=words):
        scaling.chosen(scaling.job_of(options, tmp_path), options, 728e12) if only else scaling.named(only, False)


def test_a_layout_without_memory_gets_what_saves_it(scaling, tmp_path):
    options = options_of(scaling, gpus=1)
    job = scaling.job_of(options, tmp_path)
    savers = []
    for memory in (80, 60, 50, 30):
        options.gpu_memory = memory
        [only] = scaling.chosen(job, options, 728e12)
        savers.append(only.saver)
    assert savers == list(scaling.SAVERS)
    assert only.run.offload_teacher and only.run.offload_optimizer and only.run.recompute_chunk == 2


def test_a_known_card_is_planned_with_its_known_rate(scaling):
    assert scaling.planned_rate("NVIDIA H100 80GB HBM3", 795e12) == 728e12
    assert scaling.planned_rate("a new card", 795e12) == 795e12
    assert scaling.planned_rate("CPU", 1e9) == 728e12


def test_the_card_is_measured_once(scaling, tmp_path, monkeypatch):
    path, calls = tmp_path / "new" / "card.json", []

    def probe(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:  # a call beside this one waits for its file
            number = os.open(path.parent, os.O_RDONLY)
            with pytest.raises(BlockingIOError):
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.close(number)
        return subprocess.CompletedProcess(args, 0, stdout='a warning\n["H100", 4, 7.5e14]\n')

    monkeypatch.setattr(scaling.subprocess, "run", probe)
    options = scaling.parsed([*RECIPE, "--card", str(path)])
    assert [scaling.device_here(options) for _ in range(2)] == [("H100", 4, 7.5e14)] * 2
    assert len(calls) == 1 and json.loads(path.read_text())["count"] == 4
    scaling.device_here(scaling.parsed(list(RECIPE)))
    assert len(calls) == 2


def test_kills_of_another_recipe_run_do_not_count(scaling, tmp_path):
    import recipe_faults

    options = recipe_faults.parsed(["--recipe", "llama3b", "--ranks", "4", "--out", str(tmp_path)])
    path = tmp_path / "kills.json"
    settings = recipe_faults.settings_of(options)
    assert recipe_faults.results_before(path, "kills", settings, "settings") == []
    path.write_text(json.dumps({"settings": settings, "kills": [{"stage": "ild"}]}))
    assert recipe_faults.results_before(path, "kills", settings, "settings") == [{"stage": "ild"}]
    options.ranks = 8
    with pytest.raises(HyLoError, match="kills.json: ranks is 4, this run has 8; give another --out"):
        recipe_faults.results_before(path, "kills", recipe_faults.settings_of(options), "settings")


def test_processes_end_with_their_row(scaling):
    """Also those that have left their parent's session."""
    import bench_run

    with pytest.raises(HyLoError), bench_run.processes_ended():
        mark = os.environ[bench_run.MARK]
        sleeping = subprocess.Popen(["sleep", "1000"], start_new_session=True)
        assert bench_run.marked(mark) == [sleeping.pid]
        raise HyLoError("the row fails")
    assert sleeping.wait(PATIENCE) == -signal.SIGKILL and not bench_run.marked(mark)


def test_a_row_that_takes_too_long_is_a_row(scaling, tmp_path):
    options = options_of(scaling, "--toy", "--limit", "0.2", gpus=1)
    job = scaling.job_of(options, tmp_path)
    [candidate] = scaling.chosen(job, options, 728e12)
    row = scaling.attempt(job, candidate, options, tmp_path, 1e9)
    assert row["failed"].endswith("went on after 0.2 s, the time limit") and row["layout"] == "TP 1 PP 1 DP 1"


def test_the_cause_of_a_failure_is_found(scaling):
    import measured_step

    log = "error: rank 1 left\n[rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried 4 GiB\nerror: late\n"
    assert "CUDA out of memory" in measured_step.cause(log)
    assert measured_step.cause(log.replace("out of memory", "busy")) == "rank 1 left"
    assert measured_step.cause("all well\n") is None


def bench(program: str, *flags) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", str(BENCH / program), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)


def measured_rows(folder, *flags) -> dict[str, dict]:
    result = bench("scaling.py", *TOY, "--out", folder, *flags)
    assert result.returncode == 0, result.stderr[-2000:]
    return {
        row["layout"]: row for row in json.loads((folder / "scaling-toy-llama1b-distill-64k.json").read_text())["rows"]
    }


@pytest.mark.slow
def test_one_rank_is_measured(tmp_path):
    [row] = measured_rows(tmp_path, "--gpus", 1).values()
    assert row["ratio"] == row["of_linear"] == 1 and row["sent"] == [] and math.isfinite(row["losses"][0])
    assert row["planned"]["memory_gib"] > 0 and "planned_error" in row and row["profiled_seconds"] > 0


@pytest.mark.slow
@pytest.mark.parallel
def test_two_and_four_ranks_are_measured(tmp_path):
    rows = measured_rows(tmp_path, "--gpus", 4, "--only", "dp1,cp2")
    rows |= measured_rows(tmp_path, "--gpus", 4, "--only", "tp2,pp2,cp2dp2")  # a later call adds its rows
    assert len(rows) == 5 and not [row["failed"] for row in rows.values() if "failed" in row]
    one = rows["TP 1 PP 1 DP 1"]
    shared = rows["TP 1 PP 1 CP 2 DP 1"]["losses"][0]  # with TP and PP the random weights are others, with DP the data
    assert shared == pytest.approx(one["losses"][0], rel=1e-2)
    for row in rows.values():
        assert math.isfinite(row["losses"][0])
        assert row["of_linear"] == pytest.approx(row["tokens_per_second"] / row["devices"] / one["tokens_per_second"])
    kinds = {layout: {each["collective"] for each in row["sent"]} for layout, row in rows.items()}
    assert {"all-gather", "reduce-scatter"} <= kinds["TP 1 PP 1 CP 2 DP 1"]
    assert "send" in kinds["TP 1 PP 2 DP 1"] and "all-gather" in kinds["TP 2 PP 1 DP 1"]


@pytest.mark.slow
@pytest.mark.parallel
def test_the_step_is_compared_with_transformers(tmp_path):
    result = bench("train_step.py", "--recipe", "llama1b", "--stage", "distill-8k", "--teacher-shape", "llama8b",
                   "--random", "--toy", "--steps", 1, "--peer", "transformers", "--out", tmp_path)  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(next(tmp_path.glob("*.json")).read_text())
    peer, ours = found["runs"]
    assert peer["layout"] == "transformers, batch 1" and peer["tokens"] == ours["tokens"] == 64
    assert found["ratio"] == ours["tokens_per_second"] / peer["tokens_per_second"]


@pytest.mark.slow
@pytest.mark.parallel
def test_a_recipe_survives_a_killed_rank_and_ends_on_half_the_ranks(tmp_path):
    flags = "--recompute-method uniform --recompute-num-layers 2 --hylo-offload-optimizer"
    result = bench("recipe_faults.py", "--recipe", "llama3b", "--ranks", 2, "--toy", "--steps", 6, "--out", tmp_path,
                   "--half-flags", flags)  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    assert "distill-2k: a rank killed after the checkpoint of step" in result.stdout
    assert "distill-64k ended on 1 ranks of 2, exported" in result.stdout


@pytest.mark.slow
@pytest.mark.parallel
def test_a_random_model_loads_as_a_downloaded_one(tmp_path):
    from hylo_megatron.convert.hf_config import read_architecture
    from hylo_megatron.convert.hf_folder import HFWeights

    result = bench("random_model.py", "--shape", "llama8b", "--toy", "--out", tmp_path / "m", "--text", tmp_path / "t")
    assert result.returncode == 0, result.stderr[-2000:]
    arch = read_architecture(tmp_path / "m")
    weights = HFWeights(tmp_path / "m", arch)
    assert arch.num_layers == 32 and not arch.tie_word_embeddings
    assert all(weights[key].isfinite().all() for key in weights.expected)
