"""``hylo upcycle``: the student's checkpoint, what is kept of the calibration, and what is refused."""

import errno
import json
import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
from helpers import tiny
from helpers.bases import CPU, RUNS, TOKENS, error, output, student

from hylo_megatron import files
from hylo_megatron.config import Architecture
from hylo_megatron.convert import megatron_to_hf
from hylo_megatron.errors import HyLoError
from hylo_megatron.init import upcycle
from hylo_megatron.init.calibration import calibration_tokens
from hylo_megatron.init.linear_algebra import relative_error
from hylo_megatron.init.teacher import BaseModel
from hylo_megatron.init.window import window_beside

MIXED = {
    "gdn": ("mla", "gdn", "gdn", "mla"),
    "mamba2": ("mamba2", "mla", "mamba2", "mamba2"),
    "kda": ("mla", "kda", "mla", "kda"),
}


@pytest.mark.parametrize("how", upcycle.INITS)
@pytest.mark.parametrize("linear", MIXED)
def test_student_checkpoint(bases, tmp_path, linear, how):
    """bf16 teacher: what is not a mixer is copied bit for bit, decay parameters are fp32, errors are reported."""
    model, checkpoint = bases.model("llama", torch.bfloat16)
    plan, lines = MIXED[linear], []
    out = tmp_path / "student"
    report = upcycle.upcycle(checkpoint, out, plan, init=how, tokens_BS=TOKENS, log=lines.append)
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    megatron_to_hf.convert(out, tmp_path / "hf")
    teacher = {key: tensor for key, tensor in model.state_dict().items() if key != "lm_head.weight"}
    found = tiny.weights(tmp_path / "hf")
    is_mixer = {key: ".self_attn." in key or ".mixer." in key for key in found | teacher}
    tiny.same_bits(
        {key: tensor for key, tensor in found.items() if not is_mixer[key]},
        {key: tensor for key, tensor in teacher.items() if not is_mixer[key]},
    )
    decay = {key for key in found if key.endswith((".A_log", ".dt_bias", ".mixer.D"))}
    assert len(decay) == (3 if linear == "mamba2" else 2) * plan.count(linear)
    assert all((tensor.dtype == torch.float32) == (key in decay) for key, tensor in found.items())

    arch = Architecture.load(out)
    assert arch.plan == plan and arch.is_hybrid
    assert json.loads((out / upcycle.REPORT).read_text()) == report
    assert [(entry["layer"], entry["kind"]) for entry in report["layers"]] == list(enumerate(plan))
    assert arch.extra["ild_norms"] == [[e["output_norm"], e["update_norm"]] for e in report["layers"]]
    for layer, entry in zip(BaseModel(checkpoint, CPU).layers(TOKENS), report["layers"], strict=True):
        assert entry["output_norm"] == pytest.approx(layer.output_BSD.norm(dim=-1).mean().item())
        prefix = f"model.layers.{layer.index}."
        stored = {k.removeprefix(prefix): t for k, t in found.items() if k.startswith(prefix) and is_mixer[k]}
        held = replace(layer, inputs_BSD=layer.inputs_BSD[3:], output_BSD=layer.output_BSD[3:])
        assert error(held, arch, stored) == pytest.approx(entry["error"], abs=0.02)  # the stored ones are rounded
    assert len(lines) == 4 and all("relative error" in line for line in lines)
    assert (out / "hf" / "tokenizer.json").exists()


def test_ridge_is_kept_only_where_it_helps(bases, tmp_path):
    checkpoint = bases.model(common=0.1)[1]
    plain = upcycle.upcycle(checkpoint, tmp_path / "a", MIXED["gdn"], tokens_BS=RUNS, ridge=False, log=list)
    fitted = upcycle.upcycle(checkpoint, tmp_path / "b", MIXED["gdn"], tokens_BS=RUNS, log=list)
    for entry, before in zip(fitted["layers"], plain["layers"], strict=True):
        assert ("error_ridge" in entry) == (entry["kind"] == "gdn")
        assert "error_ridge" not in before
        if entry["kind"] == "gdn":
            assert entry["error_transferred"] == pytest.approx(before["error"])
            assert entry["error"] == min(entry["error_transferred"], entry["error_ridge"])
            assert entry["error"] < before["error"]
        else:
            assert entry["error"] == before["error"]


def test_mla_beside_a_window_is_fitted_where_linear_blocks_are_not(bases, tmp_path):
    """``--no-ridge`` is for linear blocks. MLA beside a window adds nothing until it is fitted."""
    settings = dict(tokens_BS=RUNS, ridge=False, log=list, window=tiny.WINDOWS)
    report = upcycle.upcycle(bases.model(common=0.1)[1], tmp_path / "a", MIXED["gdn"], **settings)
    assert all(("error_ridge" in entry) == (entry["kind"] == "mla") for entry in report["layers"])
    assert any(entry["error"] < entry.get("error_transferred", 0) for entry in report["layers"])


def test_attention_chooses_the_ridge_and_leaves_mla_as_it_is(bases, tmp_path):
    checkpoint, found = bases.model(common=0.1)[1], {}
    for how in ("data", "attention"):
        report = upcycle.upcycle(checkpoint, tmp_path / how, MIXED["gdn"], init=how, tokens_BS=RUNS, log=list)
        megatron_to_hf.convert(tmp_path / how, tmp_path / f"{how}.hf")
        found[how] = report["layers"], tiny.weights(tmp_path / f"{how}.hf")
        assert {entry["ridge"] for entry in report["layers"] if entry["kind"] == "gdn"} <= set(upcycle.RIDGES[how])
    (data, old), (attention, new) = found.values()
    tiny.same_bits(*({k: t for k, t in weights.items() if ".mixer." not in k} for weights in (old, new)))
    for before, after in zip(data, attention, strict=True):
        assert after["kind"] == "gdn" or after["error"] == before["error"]


def test_a_windows_gates_are_not_fitted_on_held_out_rows(bases):
    layer, base = bases.layer()
    arch = replace(student(base, "gdn"), window=tiny.WINDOW)

    def gates(row: int) -> torch.Tensor:
        changed = replace(layer, heads_BSHK=layer.heads_BSHK.clone())
        changed.heads_BSHK[row] *= -1
        return window_beside(base, changed, arch).weights["mixer.window.gate_proj.weight"]

    first, last = gates(0), gates(3)
    assert torch.equal(last, window_beside(base, layer, arch).weights["mixer.window.gate_proj.weight"])
    assert not torch.allclose(first, last)


@pytest.mark.parametrize("how", ["data", "attention", "svd"])
def test_mla_beside_a_window_starts_no_worse_than_the_window(bases, tmp_path, how):
    """Its output projection is 0 where no fit of what the window leaves over helps on held-out rows."""
    checkpoint = bases.model(common=0.1)[1]
    report = upcycle.upcycle(
        checkpoint, tmp_path / "a", MIXED["gdn"], init=how, tokens_BS=RUNS, log=list, window=tiny.WINDOWS
    )
    stored = {}
    megatron_to_hf.convert(tmp_path / "a", tmp_path / "hf")
    for key, tensor in tiny.weights(tmp_path / "hf").items():
        stored.setdefault(key.split(".")[2], {})[key.split(".", 3)[-1]] = tensor
    base, arch, fits = BaseModel(checkpoint, CPU), Architecture.load(tmp_path / "a"), []
    for layer in base.layers(RUNS):
        if arch.plan[layer.index] != "mla":
            continue
        entry, weights = report["layers"][layer.index], stored[str(layer.index)]
        found = window_beside(base, layer, arch)
        for name in "qkvo":
            key = f"{name}_proj.weight"
            assert torch.equal(weights[f"self_attn.window.{key}"], layer[f"self_attn.{key}"])
        held = slice(layer.fitted_rows, None)
        alone = relative_error(found.output_BSD[held], layer.output_BSD[held])
        assert entry.get("error_transferred", entry["error"]) == pytest.approx(alone)
        fitted = weights["self_attn.o_proj.weight"].any()
        assert entry["error"] < alone if fitted else entry["error"] == pytest.approx(alone)
        assert not fitted if how == "svd" else entry["ridge"] in upcycle.RIDGES["attention"]
        fits.append(bool(fitted))
        own = {k: t for k, t in weights.items() if k.startswith("self_attn.") and ".window." not in k}
        both = found.output_BSD + output(layer, arch, own)
        assert relative_error(both[held], layer.output_BSD[held]) == pytest.approx(entry["error"])
    assert any(fits) == (how != "svd")


def test_the_same_seed_gives_the_same_student(bases, tmp_path):
    checkpoint, found = bases.model()[1], []
    for number, seed in enumerate((1, 1, 2)):
        report = upcycle.upcycle(checkpoint, tmp_path / f"{number}", MIXED["gdn"], init="svd", seed=seed, log=list)
        assert "error" not in report["layers"][0]  # nothing to measure on
        megatron_to_hf.convert(tmp_path / f"{number}", tmp_path / f"{number}.hf")
        found.append(tiny.weights(tmp_path / f"{number}.hf"))
    tiny.same_bits(found[1], found[0])
    key = "model.layers.1.mixer.A_log"
    assert not torch.equal(found[2][key], found[0][key])
    assert upcycle.summary({"layers": [{"kind": "mla"}]}) == "not measured"


def test_what_upcycle_refuses(bases, tmp_path):
    checkpoint = bases.model()[1]

    def refused(words, *args, **kwargs):
        with pytest.raises(HyLoError, match=words):
            upcycle.upcycle(*args, tmp_path / "out", MIXED["gdn"], **kwargs)
        assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]

    refused("--calibration TEXT", checkpoint)
    refused("init 'svg': expected one of data, attention, svd", checkpoint, init="svg")
    refused("--init attention needs --calibration TEXT", checkpoint, init="attention")
    refused("no published dimensions", checkpoint, init="svd", geometry="published")
    tiny.write_hybrid(tmp_path / "hybrid", tiny.hybrid())
    refused("already a hybrid .2MLA2GDN.", tmp_path / "hybrid", init="svd")
    refused("hylo.json not found", tmp_path, init="svd")


def test_an_output_that_is_not_empty_is_refused_before_the_work(bases, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    monkeypatch.setattr(upcycle, "initial_mixer", lambda *_: pytest.fail("worked for nothing"))
    with pytest.raises(HyLoError, match="exists and is not empty"):
        upcycle.upcycle(bases.model()[1], tmp_path / "out", MIXED["gdn"], init="svd", log=list)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["notes", "out"]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    rows = [" ".join(f"w{(7 * i * j + j) % tiny.VOCAB}" for j in range(90)) for i in range(1, 9)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def tool(checkpoint, tmp_path, *more):
    argv = ["--teacher", str(checkpoint), "--out", str(tmp_path / "out"), "--mla-layers", "0,3", *map(str, more)]
    upcycle.main(argv)


def test_a_student_that_another_process_makes_is_left_to_it(bases, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0)
    checkpoint, tried = bases.model()[1], []

    def log(line):
        if not tried:
            tried.append(line)
            with pytest.raises(HyLoError, match="out: another process is writing it"):
                upcycle.upcycle(checkpoint, tmp_path / "out", MIXED["gdn"], init="svd")

    upcycle.upcycle(checkpoint, tmp_path / "out", MIXED["gdn"], init="svd", log=log)
    assert tried and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_tool_with_calibration_text(bases, tmp_path, text, capsys):
    size = ("--calibration-tokens", 192, "--calibration-length", 64)
    tool(bases.model()[1], tmp_path, "--calibration", text, *size)
    printed = capsys.readouterr().out
    assert "relative error of the new mixers, mean: mla" in printed and "2MLA2GDN -> " in printed
    assert Architecture.load(tmp_path / "out").plan == ("mla", "gdn", "gdn", "mla")


def test_calibration_text_that_begins_with_a_row_is_read_as_format_says(bases, tmp_path, text, capsys):
    notes = tmp_path / "notes.txt"
    words = " ".join(f"w{(7 * i) % tiny.VOCAB}" for i in range(900))
    notes.write_text(text.read_text().splitlines()[0] + f"\n{words}\n")
    flags = ("--calibration", notes, "--calibration-tokens", 192, "--calibration-length", 64)
    with pytest.raises(SystemExit):
        tool(bases.model()[1], tmp_path, *flags)
    assert "notes.txt:2: not valid JSON" in capsys.readouterr().err
    tool(bases.model()[1], tmp_path, *flags, "--format", "text")
    assert "2MLA2GDN -> " in capsys.readouterr().out


@pytest.mark.parametrize(
    "more, words",
    [
        (["--init", "svd", "--format", "text"], "--format text: is that of --calibration, which is not given"),
        ([], "--init data needs --calibration"),
        (["--calibration", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--calibration", "TEXT", "--calibration-length", 999], "--calibration-length 999: the base model was made"),
        (["--calibration", "TEXT", "--calibration-tokens", 9999], "lower --calibration-tokens"),
        (["--init", "svd", "--mla-qk-norm"], "needs a base model with per-head norms"),
        (["--init", "svd", "--mla-layers", "9"], "lie in 0..3"),
    ],
)
def test_tool_refuses_in_one_line(bases, tmp_path, text, capsys, more, words):
    with pytest.raises(SystemExit) as caught:
        tool(bases.model()[1], tmp_path, *(text if word == "TEXT" else word for word in more))
    message = capsys.readouterr().err
    assert caught.value.code == 2 and words in message and message.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["text.jsonl"]


@pytest.mark.parametrize("name", ["save_tensors", "copy_companions"])
def test_a_full_disk(bases, tmp_path, monkeypatch, capsys, name):
    def no_space(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(upcycle, name, no_space)
    with pytest.raises(SystemExit) as caught:
        tool(bases.model()[1], tmp_path, "--init", "svd")
    assert caught.value.code == 2
    assert re.match(r"error: .*no space left.*free space", capsys.readouterr().err, re.IGNORECASE)
    assert not list(tmp_path.iterdir())


def test_calibration_tokens_come_from_everywhere_and_are_the_same_each_time(bases, tmp_path, text):
    folder = bases.model()[1] / "hf"
    rows = calibration_tokens(text, folder, 128, 32)
    assert rows.shape == (4, 32)
    assert rows.equal(calibration_tokens(text, folder, 128, 32))
    starts = [[int(w[1:]) for w in json.loads(line)["text"].split()[:32]] for line in text.read_text().splitlines()]
    assert rows[0].tolist() in starts[1:]  # a file sorted by source must not be calibrated on its first source alone
    assert rows.flatten()[32].item() == 2  # the end of a document, of which a stretch of one row is taken
    plain = tmp_path / "text.txt"
    plain.write_text(" ".join(f"w{i}" for i in range(64)))
    with pytest.raises(HyLoError, match="text.txt: holds 33 tokens, calibration needs 64"):
        calibration_tokens(plain, folder, 32, 32)
    plain.write_text(" ".join(f"w{i}" for i in range(90)) * 2)
    assert calibration_tokens(plain, folder, 64, 32).shape == (2, 32)
    text.write_text('{"text": "w1"}\nno json\n')
    with pytest.raises(HyLoError, match="text.jsonl:2: not valid JSON"):
        calibration_tokens(text, folder, 128, 32)
