"""Tests that a run saved on one layout resumes on another: equal losses, and every optimizer state under its name."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.paths import PROGRAMS

from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
from helpers import train as helpers  # noqa: E402
from helpers.train import everything, read_log  # noqa: E402
from helpers.waits import PATIENCE  # noqa: E402

from hylo_megatron.checkpoint.iterations import TRACKER  # noqa: E402

HALF, END = 4, 8
AT_ONCE = 6  # runs of a launch: the threads of every run's process groups stay, and poll
TP, PP, CP = (
    {f"{kind}_parallel_size": 2} for kind in ("tensor_model", "pipeline_model", "context")
)  # the rest of the ranks are data-parallel
LAYOUTS = {"one": {}, "dp2": {}, "tp2": TP, "pp2": PP, "cp2": CP, "tp2pp2": TP | PP, "cp2dp2": CP}
RESUMED = [  # student, saved on, resumed on, flags of both
    ("gdn", "tp2", "pp2", {}), ("gdn", "pp2", "cp2", {}), ("gdn", "cp2", "tp2", {}), ("gdn", "pp2", "pp2", {}),
    ("gdn", "one", "tp2", {}), ("gdn", "dp2", "one", {}), ("gdn", "tp2pp2", "cp2dp2", {}),
    ("mamba2", "tp2", "pp2", {}), ("mamba2", "pp2", "cp2", {}), ("mamba2", "cp2", "tp2", {}),
    ("gdn", "tp2", "pp2", {"bf16": True}), ("gdn", "tp2", "tp2", {"async_save": True}),
]  # fmt: skip


def name(student, layout, flags) -> str:
    return "-".join([student, *flags, layout])


def case(student, first, second, flags) -> str:
    return name(student, first, flags) + "-" + second


class Launches:
    """Runs grouped by how many processes they need: few launches of many runs each."""

    def __init__(self, work):
        self.work, self.world = work, helpers.random_world(work)

    def flags(self, kind: str, folder: str, layout: str, stage: str = "distill", **flags) -> list[str]:
        values = dict(train_iters=END, save_interval=HALF) | LAYOUTS[layout] | flags
        source = values.pop("student", kind)
        argv = helpers.train_flags(self.world, stage, self.work / folder, source, f"{kind}-teacher", **values)
        return [str(word) for word in argv]

    def run(self, processes: int, *runs: list[str]) -> None:
        for start in range(0, len(runs), AT_ONCE):
            self.launch(processes, runs[start : start + AT_ONCE])

    def launch(self, processes: int, runs: tuple) -> None:
        path = self.work / f"runs-{processes}.json"
        path.write_text(json.dumps(runs))
        script = PROGRAMS / "layout_runs.py"
        if processes > 1:
            done = helpers.torchrun(script, path, processes=processes)
        else:
            done = subprocess.run([sys.executable, script, path], env=helpers.single(), capture_output=True,
                                          text=True, timeout=PATIENCE)  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]

    def first(self, layout: str) -> list[list[str]]:
        runs = {name(s, on, flags): (s, flags) for s, on, _, flags in RESUMED if on == layout}
        return [self.flags(s, folder, layout, **flags) for folder, (s, flags) in runs.items()]

    def second(self, *layouts: str) -> list[list[str]]:
        """Return the runs that resume on these layouts, from what earlier launches saved."""
        return [
            self.flags(s, case(s, on, then, flags), then, load=self.work / name(s, on, flags), ckpt_step=HALF, **flags)
            for s, on, then, flags in RESUMED
            if then in layouts
        ]

    def two_ranks(self) -> Path:
        """Return the folder once it has all runs of one and two processes."""
        two, from_ild = ("tp2", "pp2", "cp2"), dict(student=str(self.work / "ild"), save_interval=1, train_iters=4)
        self.run(1, *self.first("one"))
        self.run(
            2,
            *(run for layout in (*two, "dp2") for run in self.first(layout)),
            *self.second(*two),
            self.flags("gdn", "ild", "pp2", "ild", train_iters=3),
            self.flags("gdn", "from-ild-pp2", "pp2", **from_ild),
            self.flags("gdn", "from-ild-tp2", "tp2", **from_ild, async_save=True, hylo_keep_last=2),
        )
        self.run(1, *self.second("one"))
        return self.work

    def four_ranks(self) -> Path:
        self.run(4, *self.first(FOUR_RANKS), *self.second("cp2dp2"))
        return self.work


FOUR_RANKS = "tp2pp2"  # only in make test-parallel
CASES = [
    pytest.param(*values, id=case(*values), marks=[pytest.mark.parallel] if values[1] == FOUR_RANKS else [])
    for values in RESUMED
]


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    return Launches(tmp_path_factory.mktemp("resumed"))


@pytest.fixture(scope="module")
def work(launches):
    """The runs of one and two processes. Launches that fail are not repeated for the tests that follow."""
    return launches.two_ranks()


@pytest.fixture(scope="module")
def work_of_four(launches):
    return launches.four_ranks()


def gaps(got, want) -> list[float]:
    """Return relative differences of the losses of the steps that both logs have; the other fields are equal."""
    want = {line["iteration"]: line for line in want}
    for line in got:
        assert (line["lr"], line["tokens"]) == (want[line["iteration"]]["lr"], want[line["iteration"]]["tokens"])
    return [abs(line["loss"] - want[line["iteration"]]["loss"]) / want[line["iteration"]]["loss"] for line in got]


def iteration(folder, number):
    return folder / f"iter_{number:07d}"


@pytest.mark.parametrize("student, first, second, flags", CASES)
def test_the_losses_go_on_and_every_state_has_its_name(student, first, second, flags, request):
    work = request.getfixturevalue("work_of_four" if first == FOUR_RANKS else "work")
    base, resumed = work / name(student, first, flags), work / case(student, first, second, flags)
    lines = read_log(resumed / "train_log.jsonl")
    assert [line["iteration"] for line in lines] == list(range(HALF + 1, END + 1))
    found = gaps(lines, read_log(base / "train_log.jsonl"))
    print(f"RESUMED {resumed.name}:", " ".join(f"{gap:.1e}" for gap in found))
    assert found[0] <= (1e-6 if "bf16" not in flags else 1e-3)
    assert max(found) <= (1e-5 if "bf16" not in flags else 1e-3)
    if first == second:
        assert max(found) == 0
    saved, loaded = everything(iteration(base, HALF)), everything(iteration(work / f"{resumed.name}-loaded", HALF))
    assert saved.keys() == loaded.keys()
    assert sum(key.startswith("optimizer.state.") for key in saved) > 100
    for key, tensor in saved.items():
        if tensor.shape != loaded[key].shape:  # tensor parallelism pads the vocabulary
            assert key.endswith("embedding.word_embeddings.weight")
            size = min(len(tensor), len(loaded[key]))
            assert not tensor[size:].any() and not loaded[key][size:].any()
            tensor, loaded[key] = tensor[:size], loaded[key][:size]
        assert torch.equal(tensor, loaded[key]), key


@pytest.mark.parametrize("student", ["gdn", "mamba2"])
def test_every_layout_saves_the_same_state(student, work):
    """Compare the states themselves, since two layouts that resume each other could share a wrong name."""
    one = everything(iteration(work / f"{student}-cp2", HALF))
    for layout in ("tp2", "pp2"):
        other = everything(iteration(work / f"{student}-{layout}", HALF))
        for key, tensor in one.items():
            if ".exp_avg." in key:
                size = min(len(tensor), len(other[key])) if tensor.dim() else None
                torch.testing.assert_close(other[key][:size], tensor[:size], rtol=0, atol=1e-3 * tensor.abs().max())


def test_an_asynchronous_checkpoint_holds_the_bits_of_a_synchronous_one(work):
    for number in (HALF, END):
        saved = everything(iteration(work / "gdn-tp2", number))
        written = everything(iteration(work / "gdn-async_save-tp2", number))
        assert saved.keys() == written.keys()
        assert all(torch.equal(tensor, written[key]) for key, tensor in saved.items())
    assert (work / "gdn-async_save-tp2" / TRACKER).read_text() == str(END)


def test_a_stage_starts_from_the_weights_of_another_layout_and_not_from_its_optimizer(work):
    pp2, tp2 = (read_log(work / f"from-ild-{layout}" / "train_log.jsonl") for layout in ("pp2", "tp2"))
    assert [line["iteration"] for line in tp2] == [1, 2, 3, 4]
    found = gaps(tp2, pp2)
    print("STARTED:", " ".join(f"{gap:.1e}" for gap in found))
    assert found[0] <= 1e-6 and max(found) <= 1e-5
    state = everything(iteration(work / "from-ild-pp2", 1))
    means = [key for key in state if ".exp_avg." in key and state[key].any()]
    assert len(means) > 50
    for key in means:  # a first step from nothing leaves (1 - 0.9) g and (1 - 0.95) g²
        squares = state[key.replace(".exp_avg.", ".exp_avg_sq.")]
        torch.testing.assert_close(state[key].square(), 0.2 * squares, rtol=1e-4, atol=1e-20)


@pytest.mark.parametrize("layout, left", [("pp2", [1, 2, 3, 4]), ("tp2", [3, 4])])
def test_the_last_checkpoints_are_kept(layout, left, work):
    folder = work / f"from-ild-{layout}"
    assert sorted(path.name for path in folder.glob("iter_*")) == [f"iter_{number:07d}" for number in left]
    assert (folder / TRACKER).read_text() == "4"
