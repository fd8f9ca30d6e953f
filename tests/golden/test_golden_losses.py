"""Losses of short trainings against those under version control.

A change that means to move the losses writes them again, and its diff shows by how much::

    python -m pytest tests/golden/test_golden_losses.py --rewrite-golden
"""

import json

import pytest

from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
from helpers import golden_runs as golden  # noqa: E402

each_kind = pytest.mark.parametrize("kind", golden.KINDS)
each_stage = pytest.mark.parametrize("stage", golden.STAGES)
each_layout = pytest.mark.parametrize("layout", golden.LAYOUTS)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Gives the log of a run, which is made when it is first asked for."""
    folder, logs = tmp_path_factory.mktemp("golden"), {}
    world = golden.write_world(folder)

    def log_of(kind: str, stage: str, layout: str) -> list[dict]:
        name = f"{kind}-{stage}-{layout}"
        if name not in logs:
            logs[name] = golden.run(world, kind, stage, layout, folder / f"{name}.jsonl")
        return logs[name]

    return log_of


@each_layout
@each_stage
@each_kind
def test_losses_are_the_golden_ones(kind, stage, layout, found, request):
    steps, path = found(kind, stage, layout), golden.path_of(kind, stage, layout)
    rewrite = request.config.getoption("--rewrite-golden")
    expected = json.loads(path.read_text()) if path.is_file() or not rewrite else []
    if rewrite and golden.differences(steps, expected):  # another machine's last bits are no news
        golden.write_golden(path, steps)
        expected = steps
    assert len(expected) == golden.STEPS
    wrong = golden.differences(steps, expected)
    assert not wrong, f"{path.name}: {len(wrong)} numbers differ\n" + "\n".join(wrong)


@each_stage
@each_kind
def test_one_process_and_four_agree(kind, stage, found):
    wrong = golden.differences(found(kind, stage, "tp2-pp2"), found(kind, stage, "single"))
    assert not wrong, "TP2 PP2 differs from one process\n" + "\n".join(wrong)
