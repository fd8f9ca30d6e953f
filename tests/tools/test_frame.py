"""The project frame: the capability report, its messages, and the environment maker. Nothing is installed here."""

import os
import re
import shutil
import stat
import subprocess
import sys
from dataclasses import replace

import pytest
from helpers.paths import ROOT

from hylo_megatron import doctor
from hylo_megatron import packages as machine
from hylo_megatron.errors import HyLoError


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An empty folder in front of sys.path, for made-up packages; the cached report is dropped around it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    machine.capabilities.cache_clear()
    yield tmp_path
    machine.capabilities.cache_clear()


def package(site, name, *submodules, source=""):
    folder = site / name
    folder.mkdir()
    (folder / "__init__.py").write_text(source)
    for submodule in submodules:
        (folder / submodule).mkdir()


def executable(path, text):
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_doctor_reports_every_package_and_each_kind_of_work():
    done = subprocess.run([sys.executable, "tools/doctor.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first_words = [line.split()[0] for line in done.stdout.splitlines() if line]
    for name in [known.name for known in machine.PACKAGES] + list(doctor.PURPOSES) + ["cores", "memory", "device"]:
        assert name in first_words


def test_looking_imports_nothing():
    code = (
        "import sys; sys.argv[0] = 'hylo'; from hylo_megatron.packages import capabilities; capabilities()\n"
        "print([m for m in ('torch', 'megatron', 'fla', 'triton', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_require_names_the_package_its_use_and_the_command(monkeypatch):
    absent = dict(machine.capabilities())
    absent["megatron-core"] = replace(absent["megatron-core"], present=False, version=None)
    monkeypatch.setattr(machine, "capabilities", lambda: absent)
    with pytest.raises(HyLoError) as caught:
        machine.require("megatron-core", "training")
    message = str(caught.value)
    assert message.startswith("training needs megatron-core: ") and "\n" not in message
    assert "pip install megatron-core==0.19.2" in message and "parallel" in message


def test_load_explains_an_import_that_fails(site):
    package(site, "tilelang", source="raise ImportError('libcuda.so.1: cannot open shared object file')")
    with pytest.raises(HyLoError, match="does not import .libcuda.so.1.*pip install"):
        machine.load("tilelang", "the backward pass")


def test_another_package_named_apex_does_not_count(site):
    package(site, "apex")
    assert not machine.has("apex") and "not NVIDIA's" in machine.capabilities()["apex"].note
    shutil.rmtree(site / "apex")
    package(site, "apex", "multi_tensor_apply")
    machine.capabilities.cache_clear()
    assert machine.has("apex")


@pytest.mark.parametrize("there, words", [
    (False, "in place of 8; Apex's kernel (fused_weight_gradient_mlp_cuda, missing here) adds them up inside the"),
    (True, "gradients  are added up inside the products, by Apex's kernel"),
])  # fmt: skip
def test_the_doctor_says_who_adds_up_gradients(site, there, words):
    if there:
        package(site, doctor.APEX_KERNEL)
    elif machine.has("transformer-engine") or machine.has("apex"):
        pytest.skip("another package adds them up")
    assert words in doctor.report()


def test_mamba_ssm_without_its_compiled_part_does_not_count(site):
    if machine.has("mamba-ssm"):
        pytest.skip("the real one is installed")
    package(site, "mamba_ssm")
    machine.capabilities.cache_clear()
    assert not machine.has("mamba-ssm") and "selective_scan_cuda" in machine.capabilities()["mamba-ssm"].note


@pytest.mark.parametrize(
    "triton, tilelang, capability, wrong",
    [
        ("3.6.0", False, (9, 0), True),
        ("3.4.0", False, (9, 0), True),
        ("3.7.1", False, (9, 0), False),
        ("3.3.1", False, (9, 0), False),
        ("3.6.0", True, (9, 0), False),
        ("3.6.0", False, (8, 0), False),
    ],
)
def test_wrong_gradients_on_hopper_are_announced(triton, tilelang, capability, wrong):
    found = dict(machine.capabilities())
    found["flash-linear-attention"] = replace(found["flash-linear-attention"], present=True, version="0.6.0")
    found["triton"] = replace(found["triton"], present=True, version=triton)
    found["tilelang"] = replace(found["tilelang"], present=tilelang)
    problems = doctor.known_problems(found, [doctor.Device("a GPU", 80.0, capability)])
    assert any("gradients would be wrong" in problem for problem in problems) == wrong


def test_commands_name_the_versions_that_setup_pins():
    pins = dict(re.findall(r'"([\w-]+)(?:\[[^\]]*\])?==([\w.]+)"', (ROOT / "setup.py").read_text()))
    assert {"megatron-core", "flash-linear-attention", "mamba-ssm", "transformer-engine", "lm-eval"} <= set(pins)
    for known in machine.PACKAGES:
        if known.name in pins:
            assert known.install.strip("'").endswith(f"=={pins[known.name]}")


# The environment maker


def make_env(*arguments, path, **variables):
    """Runs tools/make_env.sh with ``path`` in front of a PATH and a HOME that hold no Python 3.12."""
    environment = {"PATH": f"{path}:/usr/bin:/bin", "HOME": str(path), **variables}
    return subprocess.run(
        [shutil.which("bash"), "tools/make_env.sh", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


SHIM = "#!/bin/sh\necho 'pyenv: python3.12: command not found' >&2\nexit 127\n"
TOO_OLD = "#!/bin/sh\nexit 1\n"  # what the version question gets from Python 3.11


def working(path):
    return executable(path, f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')


def test_find_takes_a_working_interpreter_behind_a_broken_shim(tmp_path):
    if sys.version_info < (3, 12):
        pytest.skip("needs Python 3.12 to point at")
    executable(tmp_path / "python3.12", SHIM)
    executable(tmp_path / "python3", TOO_OLD)
    (tmp_path / ".pyenv/versions/3.12.9/bin").mkdir(parents=True)
    working(tmp_path / ".pyenv/versions/3.12.9/bin/python")
    done = make_env("--find", path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert os.path.samefile(done.stdout.strip(), sys.executable)


def test_find_without_any_says_how_to_get_one(tmp_path):
    executable(tmp_path / "python3.12", SHIM)
    executable(tmp_path / "python3", TOO_OLD)
    done = make_env("--find", path=tmp_path)
    assert done.returncode == 1 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and "pyenv install 3.12" in done.stderr
    done = make_env("--find", path=tmp_path, HYLO_PYTHON=str(tmp_path / "python3.12"))
    assert done.returncode == 1 and "HYLO_PYTHON=" in done.stderr


def free_disk(folder, gib: int) -> None:
    """Let the disk have so much room, whatever this machine has."""
    table = "Filesystem 1024-blocks Used Available Capacity Mounted on\\n/dev/vda 9 9 %d 97%% /\\n"
    executable(folder / "bin/df", f"#!/bin/sh\nprintf '{table}' {gib * 2**20}\n")


@pytest.fixture
def project(tmp_path):
    """A copy of what the environment maker reads, and an environment whose pip only takes notes."""
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "setup.py", tmp_path)
    for name in ("make_env.sh", "constraints.txt"):
        shutil.copy(ROOT / "tools" / name, tmp_path / "tools")
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/pyvenv.cfg").touch()
    notes = f'echo "$@" >>"{tmp_path}/starts"\n'
    notes += f'case "$*" in *install*) echo "$@" >>"{tmp_path}/calls"; exit $(cat "{tmp_path}/status");; esac\n'
    executable(tmp_path / "venv/bin/python", "#!/bin/sh\n" + notes)
    (tmp_path / "status").write_text("0")
    (tmp_path / "bin").mkdir()
    free_disk(tmp_path, gib=6)

    def run(extras="train"):
        environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        done = subprocess.run(
            ["bash", "tools/make_env.sh", "venv", extras],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=environment,
        )
        calls = tmp_path / "calls"
        return done, len(calls.read_text().splitlines()) if calls.exists() else 0

    return tmp_path, run


def test_a_second_call_does_nothing_until_something_changes(project):
    folder, run = project
    done, installs = run()
    assert (done.returncode, installs) == (0, 1) and "is ready" in done.stdout
    starts = (folder / "starts").read_text()
    done, installs = run()
    assert (done.returncode, installs, done.stdout) == (0, 1, "")
    assert (folder / "starts").read_text() == starts, "a call with nothing to do starts no Python"
    assert run("train,dev")[1] == 2
    with open(folder / "setup.py", "a") as setup:
        setup.write("# changed\n")
    assert run("train,dev")[1] == 3


def test_a_disk_too_full_is_said_before_the_install(project):
    folder, run = project
    free_disk(folder, gib=3)
    done, installs = run()
    assert (done.returncode, installs) == (1, 0)
    assert len(done.stderr.splitlines()) == 1 and "which has 3072: free some" in done.stderr
    executable(folder / "bin/du", f"#!/bin/sh\necho {3 * 2**20} venv\n")  # an interrupted install's, which counts
    done, installs = run()
    assert (done.returncode, installs) == (0, 1), done.stderr
    (folder / "bin/du").unlink()
    free_disk(folder, gib=6)
    done, installs = run("train,dev")
    assert (done.returncode, installs) == (0, 2), done.stderr


def test_a_failed_install_is_taken_up_again(project):
    folder, run = project
    (folder / "status").write_text("3")
    done, installs = run()
    assert (done.returncode, installs) == (3, 1) and "run again to resume" in done.stderr
    assert not (folder / "venv/.hylo-stamp").exists()
    (folder / "status").write_text("0")
    assert run()[1] == 2
    assert run()[1] == 2
