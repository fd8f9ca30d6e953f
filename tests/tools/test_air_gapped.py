"""The commands of docs/air-gapped.md carry a run to another folder; only pip is replaced."""

import re
import subprocess

import pytest
from helpers.paths import DOCS, ROOT
from helpers.waits import PATIENCE

PIP = """#!/bin/sh
# downloads: a wheel of text; installs: what the wheel holds
case $1 in
  download) mkdir -p w/wheels && echo 'VALUE = 5' > w/wheels/one-1.whl ;;
  install) mkdir -p run/site && cp run/wheels/one-1.whl run/site/one.py ;;
esac
"""


@pytest.fixture
def sh(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "pip").write_text(PIP)
    (tools / "pip").chmod(0o755)

    def run(script: str, folder) -> subprocess.CompletedProcess:
        script = f"set -e; export PATH={tools}:$PATH\n{script}"
        return subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, timeout=PATIENCE)

    return run


def test_a_run_arrives_whole_and_damage_is_named(sh, tmp_path):
    packing, joining = re.findall(r"```bash\n(.*?)```", (DOCS / "air-gapped.md").read_text(), re.DOTALL)
    here, there = tmp_path / "here", tmp_path / "there"
    (here / "w" / "student").mkdir(parents=True)
    (here / "w" / "teacher").symlink_to(here / "w" / "student")
    (here / "w" / "student" / "weights").write_bytes(bytes(range(256)) * 40)
    for suffix in ("bin", "idx", "json"):
        (here / "w" / f"train.{suffix}").write_text(suffix)
    packing = packing.replace("git archive", f"git -C '{ROOT}' archive").replace("=w/repo", f"={here}/w/repo")
    packed = sh(packing.replace("--bytes=56M", "--bytes=20K"), here)
    assert packed.returncode == 0, packed.stderr
    (here / "w" / "bundle").rename(there)
    assert len(list(there.glob("part-*"))) > 3

    joined = sh(joining + "\nunset PYTHONSAFEPATH; python3 -c 'import hylo_megatron, one; print(one.VALUE)'", there)
    assert joined.returncode == 0 and joined.stdout == "5\n", joined.stderr
    assert (there / "run" / "teacher" / "weights").read_bytes() == bytes(range(256)) * 40

    with (there / "part-001").open("r+b") as part:
        part.write(b"damage")
    (there / "part-002").unlink()
    damaged = sh(joining, there)
    assert damaged.returncode and "part-001: FAILED" in damaged.stdout + damaged.stderr
    assert "part-002" in damaged.stdout + damaged.stderr
