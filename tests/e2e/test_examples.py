"""The published recipes as their scripts run them, at toy size: by bash and by torchrun, killed, resumed, on SLURM."""

import json
import os
import py_compile
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
from helpers import processes  # noqa: E402
from helpers import recipes as toy  # noqa: E402
from helpers import train as helpers  # noqa: E402
from helpers.waits import PATIENCE, wait_for  # noqa: E402

from hylo_megatron.parent import LAUNCHERS  # noqa: E402
from hylo_megatron.recipes.proxy import made_up_texts, write_model  # noqa: E402
from hylo_megatron.recipes.published import BASES  # noqa: E402

EXAMPLES = helpers.ROOT / "examples"
TORCHRUN = str(Path(sys.executable).with_name("torchrun"))
STAGES = ("ild", "distill-2k", "distill-8k", "distill-64k")
SCRIPTS = [f"upcycle_{name}.sh" for name in BASES]
MARK = processes.mark()


@pytest.fixture(scope="module", autouse=True)
def nothing_left():
    """End what a test that fails has left running."""
    yield
    processes.end(MARK)


def script(name: str) -> str:
    return str(EXAMPLES / f"upcycle_{name}.sh")


def start(*command, **variables) -> subprocess.Popen:
    environment = {name: text for name, text in os.environ.items() if name not in ("PYTHONPATH", *LAUNCHERS)}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable, processes.VARIABLE: MARK}
    environment |= {name: str(value) for name, value in variables.items()}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process: subprocess.Popen) -> str:
    printed = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0, printed[-3000:]
    return printed


def exported(out: Path, plan: str) -> None:
    """The last model is there, of the plan and length it should have, and was loaded and decoded from."""
    config = json.loads((out / "hf-distill-64k" / "config.json").read_text())
    assert [i for i, mixer in enumerate(config["mixers"]) if mixer == "mla"] == [int(i) for i in plan.split(",")]
    assert config["rope_parameters"]["rope_type"] == "yarn"
    assert set(json.loads((out / "sample.json").read_text())) == {"prompt", "teacher", "student"}
    for stage in STAGES:
        lines = helpers.read_log(out / stage / "train_log.jsonl")
        assert lines and all(line["stage"] == ("ild" if stage == "ild" else "distill") for line in lines)


def test_the_script_of_smollm2_passes_variables_and_flags_on():
    command = ("bash", script("smollm2"), "--text", "prose")
    printed = finished(
        start(*command, PYTHON="echo", RECIPE="window", TOKENS="100M", BATCH_FACTOR=4, GEOMETRY="native")
    )
    wanted = "--recipe window --tokens 100M --batch-factor 4 --geometry native --text prose"
    assert printed.strip() == f"-W ignore -m hylo_megatron recipe {wanted}"


# ---- one process, by bash and by torchrun; two runs beside each other, since each has one process ----


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, tuple[Path, str]]:
    work = tmp_path_factory.mktemp("examples")
    judged = work / "judged"
    judged.mkdir()
    for kind in ("prose", "code"):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in made_up_texts(8))
        (judged / f"eval_{kind}.jsonl").write_text(lines)
    write_model(work / "larger", BASES["qwen1p7b"], made_up_texts(), hidden_size=96, num_attention_heads=6,
                num_hidden_layers=2)  # fmt: skip
    llama = start("bash", script("llama1b"), PROXY=1, OUT=work / "llama1b", EVAL=judged)
    qwen = start(
        TORCHRUN, script("qwen1p7b"), PROXY=1, OUT=work / "qwen1p7b", STEPS=2, LINEAR="mamba2",
        TEACHER=work / "larger",
    )  # fmt: skip
    return {"llama1b": (work / "llama1b", finished(llama)), "qwen1p7b": (work / "qwen1p7b", finished(qwen))}


@pytest.mark.slow
def test_by_bash_with_an_evaluation(runs):
    out, printed = runs["llama1b"]
    exported(out, "1,5,10,14")
    assert all(f"after {stage}" in printed for stage in STAGES)
    assert "[15/15] generate" in printed
    assert "| needles found | 256 |" in printed


@pytest.mark.slow
def test_by_torchrun_with_another_teacher(runs):
    out, printed = runs["qwen1p7b"]
    exported(out, "1,5,9,13,17,21,25")
    assert "TP 1 PP 1 DP 1" in printed
    config = json.loads((out / "hf-distill-64k" / "config.json").read_text())
    assert config["qk_norm"] and config["linear_type"] == "mamba2"
    assert "--hylo-teacher-rope" not in (out / "logs" / "distill-8k.log").read_text()
    # Inside Qwen's own window nothing is stretched.
    assert json.loads((out / "distill-8k" / "hylo.json").read_text())["rope_parameters"]["rope_type"] == "default"


@pytest.mark.slow
def test_killed_and_resumed(runs, tmp_path):
    whole, _ = runs["llama1b"]
    out = tmp_path / "killed"
    shutil.copytree(whole, out, ignore=shutil.ignore_patterns("*distill-64k*", "sample.json", "report", "eval-*"))
    variables = dict(PROXY=1, OUT=out)
    process = start("bash", script("llama1b"), **variables, **toy.held("distill-64k", 3))
    toy.wait_for_step(out / "distill-64k" / "train_log.jsonl", 3, process)
    training = processes.below(process, "hylo_megatron.train")
    process.kill()
    process.communicate()
    assert training
    processes.wait_for_end(training)
    printed = finished(start("bash", script("llama1b"), **variables))
    assert "distill-8k: done before" in printed
    for stage in STAGES:
        assert toy.losses(out, stage) == toy.losses(whole, stage), stage
    same = "hf-distill-64k/model.safetensors"
    assert (out / same).read_bytes() == (whole / same).read_bytes()


@pytest.mark.slow
def test_two_ranks_of_torchrun(tmp_path):
    out = tmp_path / "run"
    printed = finished(
        start(TORCHRUN, "--nproc-per-node", "2", script("llama3b"), PROXY=1, OUT=out, STEPS=2)
    )  # fmt: skip
    assert "TP 1 PP 1 DP 2" in printed and printed.count("[ 5/9] ild") == 1
    exported(out, "0,5,10,16,21,26")


# ---- what goes wrong ----

PROGRAM = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from hylo_megatron.errors import HyLoError
from hylo_megatron.flags import command_line
from hylo_megatron.run.launch import Processes
from hylo_megatron.run.world import World, exit_on_signals

CHILD = '''
import os, pathlib, sys, time
pathlib.Path(sys.argv[1], os.environ["RANK"]).write_text(str(os.getpid()))
sys.exit("error: rank 1 has had enough") if sys.argv[2] == "fail" and os.environ["RANK"] == "1" else time.sleep(36000)
'''

@command_line
def main(folder, how):
    exit_on_signals()
    world = World()
    if world.rank:
        world.follow()
        return
    with world.leading():
        process = world.start(["-c", CHILD, folder, how], Processes(dp=2), Path(folder, "log"))
        try:
            while process.poll() is None:
                time.sleep(0.05)
            raise HyLoError(process.reason())
        finally:
            process.stop()

main(*sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fail", "signal"])
def test_all_ranks_end_together(tmp_path, how):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(root=str(helpers.ROOT)))
    mark = processes.mark()
    command = TORCHRUN, "--nproc-per-node", "2", str(program), str(tmp_path), how
    process = start(*command, **{processes.VARIABLE: mark})
    numbers = [tmp_path / rank for rank in "01"]
    wait_for(lambda: all(path.is_file() and path.read_text() for path in numbers), "ranks", process=process)
    if how == "signal":
        process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=PATIENCE)[0]  # which a rank's sleep exceeds
    assert process.returncode
    if how == "fail":
        assert printed.count("error: rank 1: error: rank 1 has had enough") == 1
    processes.wait_until_gone(mark)


def test_one_line_says_what_to_set():
    process = start("bash", script("llama3b"))
    printed = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 2
    assert printed.startswith("error: HF_MODEL is not set: the folder of Llama-3.2-3B-Instruct")
    assert printed.count("\n") == 1


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_bash_and_python(name, tmp_path):
    checked = subprocess.run(["bash", "-n", EXAMPLES / name], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")
    py_compile.compile(str(EXAMPLES / name), cfile=str(tmp_path / "compiled"), doraise=True)


# ---- SLURM ----

SRUN = """#!/usr/bin/env bash
echo "$@" >>"$CALLS"
[ "$WAIT" = 0 ] || { trap 'exit 143' TERM; while :; do sleep 0.1; done; }
"""
SCONTROL = """#!/usr/bin/env bash
[ "$1" = show ] && printf 'node7\\nnode8\\n' || echo "scontrol $@" >>"$CALLS"
"""


@pytest.mark.parametrize("ends_early", [False, True], ids=["to its end", "out of time"])
def test_slurm(tmp_path, ends_early):
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"
    job = start(
        "bash", str(EXAMPLES / "slurm" / "upcycle.sbatch"), PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        RECIPE="llama3b", CALLS=calls, WAIT=int(ends_early), SLURM_SUBMIT_DIR=helpers.ROOT, SLURM_JOB_ID=20123,
        SLURM_JOB_NODELIST="node[7-8]", SLURM_NNODES=2, SLURM_GPUS_ON_NODE=8,
    )  # fmt: skip
    wait_for(lambda: calls.is_file() and calls.read_text(), "call of srun", process=job)
    if ends_early:
        job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=PATIENCE)
    started, *rest = calls.read_text().splitlines()
    assert started == (
        "--kill-on-bad-exit=1 --open-mode=append --output=hylo-20123-node%n.log torchrun --nnodes 2 --nproc-per-node 8"
        " --rdzv-backend c10d --rdzv-endpoint node7:20123 --rdzv-id 20123-0 examples/upcycle_llama3b.sh"
    )
    assert rest == (["scontrol requeue 20123"] if ends_early else [])
    assert job.returncode == (143 if ends_early else 0)
