"""The README's tour, as it is typed there, on a toy model."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
from helpers import recipes  # noqa: E402
from helpers import train as helpers  # noqa: E402
from helpers.waits import PATIENCE  # noqa: E402

README = (helpers.ROOT / "README.md").read_text()
NEEDS_NETWORK = ("fetch-smollm2", "fetch-text")  # tests/corpus/test_fetch.py runs them with a downloader of its own


def block(heading: str, language: str) -> str:
    """The first block of code in ``language`` after a heading."""
    return re.search(rf"^#+ {heading}\n.*?```{language}\n(.*?)```", README, re.DOTALL | re.MULTILINE).group(1)


def commands(code: str) -> list[str]:
    lines = (re.sub(r"\s+#.*", "", line).strip() for line in code.replace("\\\n", " ").splitlines())
    return [line for line in lines if line and not line.startswith("source ")]


def run(command: list[str], work: Path) -> str:
    bin_first = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = helpers.environment(PATH=bin_first, HYLO_REGISTER="1")
    result = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 0, f"{command[-1]}\n{result.stdout[-2000:]}{result.stderr[-2000:]}"
    return result.stdout


def test_the_tour(tmp_path):
    recipes.write_inputs(tmp_path / "w", layers=30)
    (tmp_path / "tools").symlink_to(helpers.ROOT / "tools")
    typed = commands(block("Five-minute tour", "bash"))
    assert len(typed) == 10
    for command in typed:
        if not any(name in command for name in NEEDS_NETWORK):
            run(["bash", "-c", command], tmp_path)
    assert (tmp_path / "w" / "report" / "evaluation.md").is_file()
    code = block("Five-minute tour", "python") + "print(model.num_parameters())"
    assert int(run([sys.executable, "-c", code], tmp_path)) > 1e6
