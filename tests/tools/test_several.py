"""Benchmark commands, several at once, each on GPUs of its own."""

import json
import subprocess
import sys

import pytest
from helpers.paths import DOCS, ROOT

PROGRAM = """
import json, os, sys, time
began = time.time()
time.sleep(float(sys.argv[1]))
with open(sys.argv[2], "a") as file:
    print(json.dumps([os.environ["CUDA_VISIBLE_DEVICES"].split(","), began, time.time()]), file=file)
sys.exit("--wrong" in sys.argv)
"""


@pytest.fixture
def several(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools" / "bench")
    import several

    return several


def test_each_layout_of_the_page_is_a_run_on_its_gpus(several, tmp_path):
    options = several.parsed([str(DOCS / "benchmarks.md"), "--gpus", "4", "--out", str(tmp_path)])
    runs = several.planned(options)
    assert len({run.name for run in runs}) == len(runs) and all(run.gpus <= 4 for run in runs)
    gpus = {run.name.partition("-")[2]: run.gpus for run in runs}
    assert gpus["scaling-llama1b-distill-64k-dp1"] == 1 and gpus["scaling-llama3b-distill-64k-pp2cp2"] == 4
    assert gpus["scaling-llama1b-distill-8k-tp2"] == 2 and gpus["recipe_faults-llama3b"] == 4
    assert gpus["kl_loss"] == 1 and gpus["attention_ranks"] == 4  # of its lines the last one
    import scaling
    import train_step

    for run in runs:  # the programs take the flags
        flags = run.words[2:]
        if "tools/bench/scaling.py" in run.words:
            parsed = scaling.parsed(flags)
            assert parsed.out == tmp_path and parsed.gpus == 4 and "," not in (parsed.only or "")
        elif "tools/bench/train_step.py" in run.words:
            assert train_step.parsed(flags).out == tmp_path / run.name
    assert not any("--toy" in run.words or "tools/bench/several.py" in run.words for run in runs)
    smaller = several.planned(several.parsed([str(DOCS / "benchmarks.md"), "--gpus", "1", "--match", "llama1b"]))
    assert {run.gpus for run in smaller} == {1} and all("llama1b" in " ".join(run.words) for run in smaller)


def ran(tmp_path, *lines: str, flags: tuple = ()) -> tuple[subprocess.CompletedProcess, list]:
    (tmp_path / "program.py").write_text(PROGRAM)
    seen = tmp_path / "seen"
    seen.touch()
    text = "\n".join(f"python {tmp_path}/program.py {line}" for line in lines).replace("SEEN", str(seen))
    (tmp_path / "lines.txt").write_text(f"a remark\n{text}\n")
    command = [sys.executable, "tools/bench/several.py", tmp_path / "lines.txt", "--out", tmp_path / "out", *flags]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    return done, [json.loads(line) for line in seen.read_text().splitlines()]


def test_no_gpu_has_two_runs_at_once_and_smaller_ones_do_not_wait(tmp_path):
    lines = "1 SEEN", "0.2 SEEN --ranks 2", "0.2 SEEN", "0.2 SEEN --ranks=2"
    done, seen = ran(tmp_path, *lines, flags=("--gpus", 2))
    assert done.returncode == 0, done.stderr
    assert sorted(len(gpus) for gpus, *_ in seen) == [1, 1, 2, 2]
    assert {gpu for gpus, *_ in seen for gpu in gpus} == {"0", "1"}
    for number, (gpus, began, ended) in enumerate(seen):
        for others, begins, ends in seen[number + 1 :]:
            assert not set(gpus) & set(others) or begins >= ended or ends <= began
    alone = [begins for gpus, begins, _ in seen if len(gpus) == 1]
    assert max(alone) < min(begins for gpus, begins, _ in seen if len(gpus) == 2)


def test_what_fails_and_what_takes_too_long_is_named(tmp_path):
    done, seen = ran(tmp_path, "0 SEEN --wrong", "60 SEEN", "0 SEEN", flags=("--gpus", 1, "--limit", 3))
    assert done.returncode == 2 and "failed or not started: 00-program, 01-program; see the logs" in done.stderr
    assert len(seen) == 2 and "01-program: ended at the limit" in done.stdout
    assert (tmp_path / "out" / "00-program.log").is_file()


def test_a_file_without_commands_is_refused(several, tmp_path):
    (tmp_path / "empty.txt").write_text("nothing\n")
    with pytest.raises(several.HyLoError, match="no command for 2 GPUs"):
        several.planned(several.parsed([str(tmp_path / "empty.txt"), "--gpus", "2"]))
