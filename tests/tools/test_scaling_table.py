"""Tables of ``tools/bench/scaling.py``: what they say, and which rows they hold."""

import fcntl
import json
import os
import subprocess
import sys

import pytest
from helpers.scaling import BENCH, options_of
from helpers.waits import PATIENCE

from hylo_megatron.errors import HyLoError


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import scaling

    return scaling


def row_of(layout: str, devices: int, speed: float, **changes) -> dict:
    row = dict(
        layout=layout, devices=devices, how="", planned={"memory_gib": 55.0, "tokens_per_second": 1.2 * speed},
        tokens_per_second=speed, seconds=65536 / speed, utilization=0.5, memory_gib=50.0,
        exposed_communication_ms=3.0, sent=[{"collective": "send", "group": "x", "calls": 1, "bytes": 2_000_000}],
    )  # fmt: skip
    return row | changes


def test_the_table(scaling, tmp_path):
    import scaling_table

    head = {"name": "x", "device": "H100", "product_rate": 728e12}
    rows = [
        row_of("TP 1 PP 1 DP 1", 1, 10000.0), row_of("TP 1 PP 1 CP 2 DP 1", 2, 19000.0),
        dict(layout="TP 2 PP 1 DP 1", devices=2, how="", planned={}, failed="CUDA out of memory | 3 GiB"),
    ]  # fmt: skip
    text = scaling_table.write_table(tmp_path / "t.json", head, rows, {})
    assert (
        "| TP 1 PP 1 CP 2 DP 1 | 2 | 19,000 | 1.90 | 0.95 | 50% | 50.0 | 55.0 (+10%) | 22,800 (+20%) | send 2 MB"
        in text
    )
    assert text.splitlines()[-1].endswith("| CUDA out of memory / 3 GiB |")  # a bar would be another cell
    found = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert found[1]["planned_error"] == pytest.approx({"memory_gib": 0.1, "tokens_per_second": 0.2})
    assert (tmp_path / "t.md").read_text() == text + "\n"
    without = scaling_table.write_table(tmp_path / "t.json", head, rows[1:], {})
    assert "No row on one GPU: ratios are to TP 1 PP 1 CP 2 DP 1." in without


def test_calls_beside_each_other_add_to_one_table(scaling, tmp_path):
    """A call keeps the rows that another one has added since it began."""
    options = options_of(scaling)
    job, path = scaling.job_of(options, tmp_path), tmp_path / "t.json"
    head = scaling.head_of(job, options, "H100")
    for layout, devices in (("TP 1 PP 1 CP 2 DP 1", 2), ("TP 1 PP 1 DP 1", 1), ("TP 1 PP 1 CP 2 DP 1", 2)):
        text = scaling.added(path, head, row_of(layout, devices, 1e4 * devices), job, options, 728e12)
    rows = json.loads(path.read_text())["rows"]
    assert [row["layout"] for row in rows] == ["TP 1 PP 1 DP 1", "TP 1 PP 1 CP 2 DP 1"]
    assert rows[1]["ratio"] == 2 and "| TP 1 PP 1 DP 1 | 1 | 10,000 |" in text


def test_tables_are_written_one_at_a_time(scaling, tmp_path):
    import bench_run

    program = f"import sys; sys.path.insert(0, {str(BENCH)!r}); import pathlib, bench_run\n"
    program += "with bench_run.one_at_a_time(pathlib.Path(sys.argv[1])): print('mine', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", program, tmp_path], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout.readline() == "mine\n"
        number = os.open(tmp_path, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        other.stdin.close()
        with bench_run.one_at_a_time(tmp_path):
            assert other.wait(PATIENCE) == 0
        os.close(number)


def test_rows_of_another_step_are_not_mixed(scaling, tmp_path):
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"name": "x", "flags": [], "rows": [{"layout": "y"}]}))
    assert scaling.results_before(path, "rows", {"name": "x", "flags": []}) == [{"layout": "y"}]
    with pytest.raises(HyLoError, match="flags is .., this run has .'--hylo-kl-chunk=1'.; give another --out"):
        scaling.results_before(path, "rows", {"name": "x", "flags": ["--hylo-kl-chunk=1"]})


def test_rows_with_another_teacher_are_not_mixed(scaling, tmp_path):
    heads = []
    for name, flags in (("large", ()), ("same", ("--teacher-shape", "llama1b")), ("again", ())):
        (tmp_path / name).mkdir()
        options = options_of(scaling, *flags)
        heads.append(scaling.head_of(scaling.job_of(options, tmp_path / name), options, "H100"))
    large, same, again = heads
    path = tmp_path / f"{large['name']}.json"
    path.write_text(json.dumps(large | {"rows": [{"layout": "y"}]}))
    assert scaling.results_before(path, "rows", again) == [{"layout": "y"}]
    with pytest.raises(HyLoError, match="teacher is llama8b, this run has llama1b; give another --out"):
        scaling.results_before(path, "rows", same)


def test_rows_of_other_code_are_not_mixed(scaling, tmp_path):
    package, prints = tmp_path / "package", []
    (package / "room").mkdir(parents=True)
    for text, name in (("a = 1", "one.py"), ("a = 2", "one.py"), ("", "two.py"), ("", "notes.md")):
        (package / "room" / name).write_text(text)
        prints.append(scaling.fingerprint(package))
    assert len(set(prints[:3])) == 3 and prints[2] == prints[3]
    options = options_of(scaling)
    head = scaling.head_of(scaling.job_of(options, tmp_path), options, "H100")
    path = tmp_path / "t.json"
    path.write_text(json.dumps(head | {"code": prints[0], "rows": []}))
    with pytest.raises(HyLoError, match=f"code is {prints[0]}, this run has {head['code']}; give another --out"):
        scaling.results_before(path, "rows", head)
