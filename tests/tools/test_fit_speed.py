"""``tools/bench/fit_speed.py`` finds the constants again with which rows were made up."""

import json
from dataclasses import replace

import pytest
from helpers.paths import ROOT

from hylo_megatron.errors import HyLoError
from hylo_megatron.planner.speed import CARDS, FITTED, step_time

BENCH = ROOT / "tools" / "bench"
CARD = 700e12
LONG = "--recipe llama1b --stage distill-64k --teacher-shape llama8b --random"
SHORT = "--recipe llama1b --stage distill-8k --teacher-shape llama8b --random"


@pytest.fixture
def program(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import fit_speed

    return fit_speed


def write_rows(path, flags: str, only: str, truth, device: str = "H100") -> None:
    """Write a table as ``scaling.py`` does, of steps that take what the constants ``truth`` say."""
    import scaling

    folder = path.with_suffix("")
    folder.mkdir()
    options = scaling.parsed(flags.split())
    job = scaling.job_of(options, folder)
    rows = []
    for text in only.split(","):
        row = {"layout": str(scaling.named(text, False)), "how": "", "planned": {}}
        row["seconds"] = step_time(scaling.run_of(job, row, options), CARD, truth).total
        rows.append(row)
    rows.append({"layout": "TP 2 PP 1 DP 2", "how": "", "failed": "CUDA out of memory"})
    rows.append({"layout": "TP 1 PP 4 DP 1", "how": "recompute in pairs, optimizer on the host", "seconds": 99.0})
    command = f"tools/bench/scaling.py {flags} --only {only}"
    path.write_text(json.dumps({"device": device, "product_rate": CARD, "command": command, "rows": rows}))


def test_constants_are_found_again(program, tmp_path, capsys):
    truth = replace(FITTED, products=0.85, attention=0.6, nvlink=150e9)
    files = [tmp_path / "long.json", tmp_path / "short.json"]
    write_rows(files[0], LONG, "dp1,dp4,cp2,cp4,cp2dp2", truth)
    write_rows(files[1], SHORT, "dp1,tp2,dp2,cp2", truth)
    program.main([*map(str, files), "--constants", "products", "attention", "nvlink"])
    text = capsys.readouterr().out
    assert "9 steps" in text and "0.0% with" in text
    lines = [line.split("#")[0].split() for line in text.splitlines() if ": float" in line]
    found = {line[0]: float(line[-1]) for line in lines}
    assert found == pytest.approx({"products:": 0.85, "attention:": 0.6, "nvlink:": 150e9}, rel=5e-3)
    assert "| llama1b-distill-64k, TP 1 PP 1 CP 4 DP 1 |" in text and "TP 2 PP 1 DP 2" not in text


def test_only_constants_that_rows_depend_on_change(program, tmp_path, capsys):
    write_rows(tmp_path / "one.json", LONG, "dp1", replace(FITTED, products=0.8))
    program.main([str(tmp_path / "one.json")])
    text = capsys.readouterr().out
    assert "products: float = 0.8 " in text and "attention" not in text and "nvlink" not in text


def test_rows_of_a_known_card_are_planned_with_its_known_rate(program, tmp_path):
    for device, card in (("NVIDIA H100 80GB HBM3", CARDS["H100"]), ("a new card", CARD)):
        path = tmp_path / f"{device}.json"
        write_rows(path, LONG, "dp1", FITTED, device=device)
        assert [step.card for step in program.steps_of(path, False).values()] == [card]


def test_tables_without_a_row_that_counts_are_refused(program, tmp_path):
    path = tmp_path / "cpu.json"
    write_rows(path, LONG, "dp1", FITTED, device="CPU")
    with pytest.raises(HyLoError, match="no row of these files"):
        program.run(program.parsed([str(path)]))
    program.run(program.parsed([str(path), "--cpu"]))
