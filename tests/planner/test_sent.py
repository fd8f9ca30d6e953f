"""``hylo_megatron.planner.sent`` against the bytes that whole trainings send, counted by ``engine/sent_bytes.py``."""

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from helpers import tiny
from helpers import train as helpers
from helpers.paths import PROGRAMS
from helpers.waits import PATIENCE

from hylo_megatron.config import Architecture
from hylo_megatron.distill.command_line import layout_of
from hylo_megatron.distill.first_flags import first_flags
from hylo_megatron.distill.memory_check import planned_run
from hylo_megatron.planner.sent import sent
from hylo_megatron.planner.training import PlannedRun

AGAIN = dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=5)
SP = dict(tensor_model_parallel_size=2, sequence_parallel=True)
CP, PP = "context_parallel_size", "pipeline_model_parallel_size"
RUNS = {  # name: processes, student, stage, flags
    "TP": (2, "window", "distill", SP | AGAIN),
    "TP, mixers": (2, "window", "distill", SP | dict(hylo_train="mixers")),
    "TP, ild": (2, "kda", "ild", SP),
    "TP without sequence parallelism": (2, "mamba2", "distill", dict(tensor_model_parallel_size=2)),
    "CP, states, gather": (2, "window", "distill", {CP: 2} | AGAIN),
    "CP, states, ring": (2, "kda", "distill", {CP: 2, "cp_comm_type": "p2p"}),
    "CP, all-to-all": (2, "kda", "ild", {CP: 2, "hylo_linear_cp": "a2a"}),
    "PP": (2, "gdn", "distill", {PP: 2} | AGAIN),
    "DP": (2, "mamba2", "distill", {}),
    "PP, ild": (2, "gdn", "ild", {PP: 2}),  # last: the teacher has asked for a state that never comes
    "CP 4": (4, "gdn", "distill", {CP: 4}),
    "CP 2 DP 2": (4, "window", "distill", {CP: 2} | AGAIN),
    "TP 2 CP 2": (4, "window", "distill", SP | {CP: 2}),
    "PP 2 CP 2": (4, "kda", "distill", {PP: 2, CP: 2}),
    "TP 2 PP 2": (4, "mamba2", "ild", SP | {PP: 2}),
}  # fmt: skip
GROUPS = {  # by megatron-core's names
    "TENSOR_MODEL_PARALLEL_GROUP": "tp", "CONTEXT_PARALLEL_GROUP": "cp", "PIPELINE_MODEL_PARALLEL_GROUP": "pp",
    "EMBEDDING_GROUP": "embedding", "DATA_PARALLEL_GROUP_WITH_CP": "dp",
}  # fmt: skip
SINGLE = 256  # bytes of single values, such as losses, which the planner leaves out


def command_line(name: str, work: Path, world: dict[str, Path]) -> list[str]:
    _, student, stage, flags = RUNS[name]
    teacher = f"{student}-teacher" if stage == "ild" else "large"
    flags = dict(bf16=True, train_iters=5, lr_warmup_iters=0, hylo_profile=work / f"{name} profile") | flags
    line = helpers.train_flags(world, stage, work / name, student=student, teacher=teacher, **flags)
    return list(map(str, line))


def trained(work: Path, processes: int) -> dict[str, Path]:
    """Train every layout of that many processes, and return the checkpoints."""
    world = helpers.random_world(work)
    changes = dict(window=tiny.WINDOW, geometry=tiny.GEOMETRY_Q_LORA, tie_word_embeddings=False)
    world["window"], world["window-teacher"] = helpers.write_pair(work / "window", "gdn", **changes)
    helpers.shutil.copytree(work / "tokenizer", world["window"] / "hf", dirs_exist_ok=True)
    large = tiny.hybrid(vocab_size=helpers.ODD_VOCAB, hidden_size=80, intermediate_size=112, head_dim=20,
                        plan=("attention",) * 6, geometry=None)  # fmt: skip
    world["large"] = helpers.write_checkpoint(work / "large", large, 4)
    runs = {processes: [command_line(name, work, world) for name in RUNS if RUNS[name][0] == processes]}
    (work / "runs.json").write_text(json.dumps(runs))
    done = subprocess.run([sys.executable, "-W", "ignore", PROGRAMS / "memory_runs.py", work / "runs.json"],
                          env=helpers.environment(), capture_output=True, text=True, timeout=PATIENCE)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return world


def planned(name: str, work: Path, world: dict[str, Path], monkeypatch) -> PlannedRun:
    processes, student, stage, _ = RUNS[name]
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    known = first_flags(command_line(name, work, world))
    teacher = world[f"{student}-teacher" if stage == "ild" else "large"]
    return planned_run(known, Architecture.load(world[student]), Architecture.load(teacher), *layout_of(known))


def counted(work: Path, name: str, ranks: range) -> dict[str, float]:
    """Return the mean bytes of a step by group."""
    found = defaultdict(float)
    for rank in ranks:
        for row in json.loads((work / f"{name} profile" / f"rank-{rank}.json").read_text())["sent"]:
            if row["group"] in GROUPS:
                found[GROUPS[row["group"]]] += row["bytes"] / len(ranks)
    return found


def compare(work: Path, processes: int, monkeypatch) -> None:
    """Compare every layout of that many processes: to the byte, but for single values and padding of gradients."""
    world = trained(work, processes)
    for name in (name for name in RUNS if RUNS[name][0] == processes):
        run = planned(name, work, world, monkeypatch)
        of_stage = processes // run.layout.pp
        for stage in range(run.layout.pp):
            got = counted(work, name, range(stage * of_stage, (stage + 1) * of_stage))
            want = sent(run, stage)
            for group in GROUPS.values():
                padding = 0.01 if group == "dp" else 0
                assert getattr(want, group) == pytest.approx(got[group], rel=padding, abs=SINGLE), (name, stage, group)


@pytest.mark.slow
def test_two_ranks_send_what_is_planned(tmp_path, monkeypatch):
    compare(tmp_path, 2, monkeypatch)


@pytest.mark.slow
@pytest.mark.parallel
def test_four_ranks_send_what_is_planned(tmp_path, monkeypatch):
    compare(tmp_path, 4, monkeypatch)
