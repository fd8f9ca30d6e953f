"""Hugging Face <-> Megatron: bit for bit for every shape, one tensor at a time, no output when the input is bad."""

import errno
import gc
import json
import re
import subprocess
import sys
import weakref
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
from helpers import tiny  # noqa: E402
from helpers.paths import ROOT

from hylo_megatron.checkpoint import folder as checkpoint
from hylo_megatron.config import Architecture, MLAGeometry, Plan, geometry_preset  # noqa: E402
from hylo_megatron.config.geometry import check_heads  # noqa: E402
from hylo_megatron.config.plan import uniform_layers  # noqa: E402
from hylo_megatron.convert import hf_to_megatron, megatron_to_hf  # noqa: E402
from hylo_megatron.convert.hf_folder import HFWeights, read_architecture  # noqa: E402
from hylo_megatron.errors import HyLoError  # noqa: E402
from hylo_megatron.mixers.mla.memory import row_values  # noqa: E402

HYBRIDS = {
    "gdn": tiny.hybrid("gdn"),
    "mamba2": tiny.hybrid("mamba2", tie_word_embeddings=False),
    "kda": tiny.hybrid("kda"),
    "positions": tiny.hybrid("gdn", mla_rope=False, linear_rope=True, log_scale=tiny.LOG_SCALE),
    "window": tiny.hybrid("mamba2", model_type="qwen2", attention_bias=True, window=tiny.WINDOW),
    "q_lora": tiny.hybrid("gdn", geometry=tiny.GEOMETRY_Q_LORA, rope_parameters=tiny.YARN),
    "qk_norm": tiny.hybrid("mamba2", model_type="qwen3", qk_norm=True, mla_qk_norm=True),
}


# ---- there and back ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("shape", tiny.SHAPES)
def test_round_trip_keeps_every_bit(tmp_path, shape, shards, dtype):
    source = tiny.save_model(tiny.teacher_model(shape, dtype), tmp_path / "hf", shards)
    arch = hf_to_megatron.convert(source, tmp_path / "ckpt")
    megatron_to_hf.convert(tmp_path / "ckpt", tmp_path / "back")
    tiny.same_bits(tiny.weights(tmp_path / "back"), tiny.weights(source))
    assert Architecture.load(tmp_path / "ckpt") == arch == read_architecture(tmp_path / "back")
    modes = {path.stat().st_mode for path in (tmp_path / "back").iterdir()}
    assert len(modes) == 1, "weights are as readable as the other files"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "ckpt", "hf"]


def test_a_trained_transformer_is_exported_with_its_own_rope_or_not_at_all(tmp_path):
    source = tiny.save_model(tiny.teacher_model(next(iter(tiny.SHAPES)), torch.float32), tmp_path / "hf")
    base = hf_to_megatron.convert(source, tmp_path / "ckpt")
    changed = replace(base, rope_parameters=base.rope_parameters | {"rope_theta": 77.0}, max_position_embeddings=512)
    changed.save(tmp_path / "ckpt")
    megatron_to_hf.convert(tmp_path / "ckpt", tmp_path / "out")
    assert read_architecture(tmp_path / "out") == changed != base
    replace(base, rms_norm_eps=0.5).save(tmp_path / "ckpt")
    with pytest.raises(HyLoError, match="hf/config.json: rms_norm_eps is .*hylo.json has 0.5"):
        megatron_to_hf.convert(tmp_path / "ckpt", tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", HYBRIDS)
def test_hybrid_export_import_export_keeps_every_bit(tmp_path, kind, dtype):
    state = tiny.write_hybrid(tmp_path / "ckpt", HYBRIDS[kind], dtype)
    megatron_to_hf.convert(tmp_path / "ckpt", tmp_path / "hf")
    tiny.same_bits(tiny.weights(tmp_path / "hf"), state)
    assert hf_to_megatron.convert(tmp_path / "hf", tmp_path / "again") == HYBRIDS[kind]
    megatron_to_hf.convert(tmp_path / "again", tmp_path / "hf2")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "hf2" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


def test_odd_values_and_extra_tensors_of_other_exporters(tmp_path):
    """NaN, -0.0, infinities and denormals survive; a second copy of tied embeddings and inv_freq are left out."""
    source = tiny.save_model(tiny.teacher_model("llama"), tmp_path / "hf")
    state = tiny.weights(source)
    odd = torch.tensor([float("nan"), -0.0, float("inf"), 1e-42])
    state["model.layers.1.self_attn.k_proj.weight"][3, :4] = odd
    extra = {"lm_head.weight": state["model.embed_tokens.weight"].clone()}
    extra["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tiny.write_weights(source, state | extra)
    hf_to_megatron.convert(source, tmp_path / "ckpt", allow_nan=True)
    megatron_to_hf.convert(tmp_path / "ckpt", tmp_path / "back", allow_nan=True)
    tiny.same_bits(tiny.weights(tmp_path / "back"), state)


def test_export_in_another_dtype_keeps_decay_parameters_fp32(tmp_path):
    state = tiny.write_hybrid(tmp_path / "ckpt", HYBRIDS["gdn"])
    megatron_to_hf.convert(tmp_path / "ckpt", tmp_path / "hf", torch.bfloat16)
    want = {k: t if k.endswith(("A_log", "dt_bias")) else t.bfloat16() for k, t in state.items()}
    tiny.same_bits(tiny.weights(tmp_path / "hf"), want)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


def test_export_drops_the_padding_of_the_vocabulary(tmp_path):
    """Training at some tensor-parallel sizes saves more embedding rows than the model has."""
    arch = tiny.hybrid("gdn", tie_word_embeddings=False)
    state = tiny.write_hybrid(tmp_path / "ckpt", replace(arch, vocab_size=tiny.VOCAB + 4))
    arch.save(tmp_path / "ckpt")
    megatron_to_hf.convert(tmp_path / "ckpt", tmp_path / "hf")
    ends = ("model.embed_tokens.weight", "lm_head.weight")
    tiny.same_bits(tiny.weights(tmp_path / "hf"), {k: t[: tiny.VOCAB] if k in ends else t for k, t in state.items()})


# ---- streaming ----


class Live:
    """How many tensors handed out are alive at once, at most, and how many there were."""

    def __init__(self):
        self.now = self.peak = self.total = 0

    def __call__(self, tensor):
        self.now, self.total = self.now + 1, self.total + 1
        self.peak = max(self.peak, self.now)
        weakref.finalize(tensor.untyped_storage(), self._gone)
        return tensor

    def _gone(self):
        self.now -= 1


def test_import_holds_a_few_tensors_at_a_time(tmp_path, monkeypatch):
    source = tiny.save_model(tiny.teacher_model("llama"), tmp_path / "hf", shards=3)
    read, written = Live(), Live()
    get, resolve = HFWeights.__getitem__, checkpoint._StreamingPlanner.resolve_data
    monkeypatch.setattr(HFWeights, "__getitem__", lambda self, key: read(get(self, key)))

    def resolved(self, item):
        out = resolve(self, item)
        return written(out) if isinstance(out, torch.Tensor) else out

    monkeypatch.setattr(checkpoint._StreamingPlanner, "resolve_data", resolved)
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 1)  # a file for each tensor: torch holds what one file has
    gc.disable()  # what only a collection would free counts as held
    try:
        hf_to_megatron.convert(source, tmp_path / "ckpt", check=False)
    finally:
        gc.enable()
    assert read.total == len(tiny.weights(source))
    assert read.peak <= 4, f"{read.peak} source tensors alive at once; Q, K and V are three"
    assert written.total > 20
    assert written.peak <= 3, f"{written.peak} converted tensors alive at once"


def test_export_holds_one_shard_at_a_time(tmp_path, monkeypatch):
    state = tiny.write_hybrid(tmp_path / "ckpt", HYBRIDS["gdn"])
    limit, held = max(t.nbytes for t in state.values()) + 1, []
    monkeypatch.setattr(megatron_to_hf, "SHARD_BYTES", limit)
    add = megatron_to_hf.ShardWriter.add

    def watched(self, key, tensor):
        add(self, key, tensor)
        held.append(sum(t.nbytes for t in self.pending.values()))

    monkeypatch.setattr(megatron_to_hf.ShardWriter, "add", watched)
    megatron_to_hf.convert(tmp_path / "ckpt", tmp_path / "hf")
    assert max(held) <= limit
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 3
    assert all(f.name == f"model-{i:05d}-of-{len(files):05d}.safetensors" for i, f in enumerate(files, 1))
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == state.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())
    assert HFWeights(tmp_path / "hf", HYBRIDS["gdn"]).where == index["weight_map"]
    tiny.same_bits(tiny.weights(tmp_path / "hf"), state)


# ---- bad input ----


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return tiny.save_model(tiny.teacher_model("mistral"), tmp_path_factory.mktemp("good") / "hf")


@pytest.fixture
def folder(good, tmp_path):
    """A copy of a good folder, to be spoilt."""
    target = tmp_path / "hf"
    target.mkdir()
    for path in good.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def refused(work, tmp_path, *words, out="out"):
    """``work()`` ends in one line that has all ``words``, and nothing of ``out`` is left."""
    with pytest.raises(HyLoError) as caught:
        work()
    message = str(caught.value)
    assert "\n" not in message
    assert not [word for word in words if word not in message], message
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(out)]


KEY = "model.layers.2.mlp.up_proj.weight"


def _change_weights(change):
    def spoil(folder):
        state = tiny.weights(folder)
        change(state)
        tiny.write_weights(folder, state)

    return spoil


def _config(**changes):
    return lambda folder: tiny.edit_json(folder / "config.json", **changes)


def _without(*fields):
    def spoil(folder):
        config = json.loads((folder / "config.json").read_text())
        for field in fields:
            del config[field]
        (folder / "config.json").write_text(json.dumps(config))

    return spoil


def _truncate(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def _pickle_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _sharded(spoil):
    def work(folder):
        state = tiny.weights(folder)
        (folder / "model.safetensors").unlink()
        tiny.write_weights(folder, state, shards=2)
        spoil(folder)

    return work


SHARD = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def _index_names_the_wrong_shard(folder):
    index = json.loads((folder / INDEX).read_text())
    here = index["weight_map"][KEY]
    index["weight_map"][KEY] = next(name for name in index["weight_map"].values() if name != here)
    (folder / INDEX).write_text(json.dumps(index))


BAD = {
    "missing tensor": (_change_weights(lambda s: s.pop(KEY)), [KEY, "missing", "[96, 64]"]),
    "wrong shape": (
        _change_weights(lambda s: s.update({KEY: s[KEY][1:].clone()})),
        ["model.safetensors", KEY, "[95, 64]", "[96, 64]"],
    ),
    "unexpected tensor": (_change_weights(lambda s: s.update(odd=torch.ones(1))), ["unexpected tensor odd"]),
    "integer tensor": (_change_weights(lambda s: s.update({KEY: s[KEY].to(torch.int8)})), [KEY, "I8"]),
    "truncated file": (_truncate("model.safetensors", 20_000), ["model.safetensors", "truncated or damaged"]),
    "truncated header": (_truncate("model.safetensors", 20), ["model.safetensors", "truncated or damaged"]),
    "truncated shard": (_sharded(_truncate(SHARD, 20_000)), [SHARD, "truncated or damaged"]),
    "missing shard": (_sharded(lambda f: (f / SHARD).unlink()), [SHARD, "not found"]),
    "wrong shard": (_sharded(_index_names_the_wrong_shard), ["model-0000", KEY, INDEX]),
    "index without a map": (_sharded(lambda f: (f / INDEX).write_text("{}")), [INDEX, "weight_map"]),
    "pickle only": (_pickle_only, ["pytorch_model.bin", "pickle"]),
    "no config": (lambda folder: (folder / "config.json").unlink(), ["config.json not found"]),
    "broken config": (_truncate("config.json", 50), ["config.json", "not valid JSON"]),
    "config lacks a field": (_without("rms_norm_eps"), ["config.json", "rms_norm_eps", "missing"]),
    "unknown architecture": (_config(model_type="mamba"), ["config.json", "'mamba'", "llama, mistral, qwen2, qwen3"]),
    "sliding window": (_config(sliding_window=64), ["config.json", "sliding_window 64"]),
    "quantized": (_config(quantization_config={"bits": 4}), ["config.json", "quantization_config"]),
    "attention bias": (_config(attention_bias=True), ["config.json", "attention_bias"]),
    "other activation": (_config(hidden_act="gelu"), ["config.json", "hidden_act", "gelu"]),
    "large tokenizer": (lambda f: tiny.write_tokenizer(f, 301), ["tokenizer.json", "300", "vocab_size is 300"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(case, folder, tmp_path):
    spoil, words = BAD[case]
    spoil(folder)
    refused(lambda: hf_to_megatron.convert(folder, tmp_path / "out"), tmp_path, *words)


def test_what_is_only_a_long_enough_window_is_taken(folder, tmp_path):
    tiny.edit_json(folder / "config.json", sliding_window=256)
    hf_to_megatron.convert(folder, tmp_path / "out")


@pytest.mark.parametrize("work", [hf_to_megatron.convert, megatron_to_hf.convert])
def test_an_output_that_is_not_empty_stays_as_it_is(work, good, tmp_path):
    hf_to_megatron.convert(good, tmp_path / "ckpt")
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes").write_text("mine")
    source = good if work is hf_to_megatron.convert else tmp_path / "ckpt"
    with pytest.raises(HyLoError, match="out exists and is not empty"):
        work(source, out)
    assert [p.name for p in out.iterdir()] == ["notes"]
    (out / "notes").unlink()
    work(source, out)  # an empty folder is fine
    assert (out / "hylo.json").exists() or (out / "config.json").exists()


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device", "out")


@pytest.mark.parametrize("where", ["tensors", "companions", "description"])
def test_a_full_disk_during_import(where, good, tmp_path, monkeypatch, capsys):
    target = {
        "tensors": (checkpoint._StreamingPlanner, "resolve_data"),
        "companions": (hf_to_megatron, "copy_companions"),
        "description": (Architecture, "save"),
    }[where]
    monkeypatch.setattr(*target, no_space)
    with pytest.raises(SystemExit) as caught:
        hf_to_megatron.main(["--hf", str(good), "--out", str(tmp_path / "out")])
    assert caught.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"error: .*out: no space left.*: it needs .*iB, .* is free on its disk", message)
    assert not list(tmp_path.iterdir())


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
from hylo_megatron.convert import {module}
{module}.main({argv})
"""


@pytest.mark.parametrize("module", ["hf_to_megatron", "megatron_to_hf"])
def test_a_file_that_may_not_grow_ends_in_one_line(module, good, tmp_path):
    """A limit on file sizes fails in the writers themselves, as a full disk does."""
    source = good
    if module == "megatron_to_hf":
        source = tmp_path / "ckpt"
        hf_to_megatron.convert(good, source)
    argv = ["--hf" if module == "hf_to_megatron" else "--ckpt", str(source), "--out", str(tmp_path / "out")]
    code = LIMITED.format(module=module, argv=argv)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


def test_the_tool_prints_one_line_and_exits_with_2(folder, tmp_path):
    _truncate("model.safetensors", 20_000)(folder)
    argv = [sys.executable, "tools/convert_hf_to_megatron.py", "--hf", str(folder), "--out", str(tmp_path / "out")]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert str(folder / "model.safetensors") in done.stderr
    assert not (tmp_path / "out").exists()


class TestBadCheckpoint:
    def export(self, tmp_path):
        return lambda: megatron_to_hf.convert(tmp_path / "ckpt", tmp_path / "out")

    def test_not_a_checkpoint(self, tmp_path):
        (tmp_path / "ckpt").mkdir()
        refused(self.export(tmp_path), tmp_path, "hylo.json not found")

    def test_no_tracker(self, tmp_path):
        tiny.write_hybrid(tmp_path / "ckpt", HYBRIDS["gdn"])
        (tmp_path / "ckpt" / checkpoint.TRACKER).unlink()
        refused(self.export(tmp_path), tmp_path, checkpoint.TRACKER, "not found")

    def test_an_iteration_that_is_not_there(self, tmp_path):
        tiny.write_hybrid(tmp_path / "ckpt", HYBRIDS["gdn"])
        (tmp_path / "ckpt" / checkpoint.TRACKER).write_text("40")
        refused(self.export(tmp_path), tmp_path, "iter_0000040", "incomplete")

    def test_a_description_of_another_model(self, tmp_path):
        tiny.write_hybrid(tmp_path / "ckpt", HYBRIDS["gdn"])
        replace(HYBRIDS["gdn"], tie_word_embeddings=False).save(tmp_path / "ckpt")
        refused(self.export(tmp_path), tmp_path, "output_layer.weight", "missing")
        replace(HYBRIDS["gdn"], geometry=tiny.GEOMETRY_Q_LORA).save(tmp_path / "ckpt")
        refused(self.export(tmp_path), tmp_path, "release", "hylo.json")

    def test_a_data_file_that_is_cut_off(self, tmp_path):
        tiny.write_hybrid(tmp_path / "ckpt", HYBRIDS["gdn"])
        data = next((tmp_path / "ckpt" / "release").glob("*.distcp"))
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
        refused(self.export(tmp_path), tmp_path, "release", "it is truncated; copy the checkpoint again")


# ---- plans ----


def where(plan, kind="mla"):
    return tuple(i for i, k in enumerate(plan) if k == kind)


def test_plans_from_numbers_and_words():
    plan = Plan.parse(16, "1,5,10,14", "mamba2")
    assert where(plan) == (1, 5, 10, 14)
    assert plan.count("mamba2") == 12
    assert Plan.parse(4, "all") == ("mla",) * 4
    assert Plan.parse(4, "none", "mamba2") == ("mamba2",) * 4
    assert where(Plan.parse(30, "uniform:3")) == (5, 15, 25)
    assert where(Plan.parse(16, "uniform:16")) == tuple(range(16))
    assert plan.name == "4MLA12M2"
    assert Plan.transformer(30).name == "30ATT"


@pytest.mark.parametrize("count", range(1, 13))
def test_uniform_layers_are_apart_by_about_the_same(count):
    layers = uniform_layers(28, count)
    gaps = [b - a for a, b in zip(layers, layers[1:], strict=False)]
    assert len(set(layers)) == count and layers[0] >= 0 and layers[-1] < 28
    assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    "layers, name, mla, linear",
    [
        (16, "4MLA12GDN", (1, 5, 10, 14), "gdn"),
        (16, "4MLA12M2", (1, 5, 10, 14), "mamba2"),
        (16, "8MLA8GDN", tuple(range(0, 16, 2)), "gdn"),
        (28, "6MLA22M2", (0, 5, 10, 16, 21, 26), "mamba2"),
        (28, "7MLA21GDN", (1, 5, 9, 13, 17, 21, 25), "gdn"),
        (28, "14MLA14mamba2", tuple(range(0, 28, 2)), "mamba2"),
        (10, "2MLA8GDN", (2, 7), "gdn"),
        (30, "3MLA27KDA", (4, 14, 24), "kda"),
    ],
)
def test_names_put_mla_where_the_paper_does(layers, name, mla, linear):
    plan = Plan.parse(layers, name)
    assert Plan.parse(layers, name, linear) == plan
    assert where(plan) == mla
    assert set(plan) == {"mla", linear}


@pytest.mark.parametrize(
    "layers, text, linear, words",
    [
        (16, "1,5,16", "gdn", "16"), (16, "1,-2", "gdn", "-2"), (16, "1,1", "gdn", "differ"),
        (16, "1;2", "gdn", "expected layer numbers"), (16, "", "gdn", "expected layer numbers"),
        (16, "4MLA12GDN", "mamba2", "contradict"), (4, "uniform:5", "gdn", "only 4 layers"),
        (4, "uniform:0", "rwkv", "rwkv"),
        (16, "4MLA10GDN", "gdn", "has 14 layers"), (16, "4MLA12RWKV", "gdn", "RWKV"),
    ],
)  # fmt: skip
def test_plans_that_do_not_fit(layers, text, linear, words):
    with pytest.raises(HyLoError) as caught:
        Plan.parse(layers, text, linear)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_megatron_pattern_has_a_pipe_between_stages_and_the_odd_layers_first():
    plan = Plan(("mla", "gdn", "mamba2", "attention", "gdn", "mla", "gdn"))
    assert plan.pattern() == "+-G-M-*-G-+-G-"
    assert plan.pattern(2) == "+-G-M-*-|G-+-G-"
    assert plan.pattern(3) == "+-G-M-|*-G-|+-G-"
    assert plan.pattern(7).count("|") == 6
    with pytest.raises(HyLoError, match="7 layers"):
        plan.pattern(8)


# ---- geometry: the reference's numbers, section 1 ----

PUBLISHED = [  # d, heads, head dim: kv_lora, nope, rope, v, q_lora; GDN heads
    ((2048, 32, 64), (128, 32, 32, 64, 1344), 6),
    ((3072, 24, 128), (128, 64, 64, 128, 1536), 9),
    ((2048, 16, 128), (256, 64, 64, 128, 1344), 6),
]


@pytest.mark.parametrize("base, mla, gdn_heads", PUBLISHED)
def test_published_geometry(base, mla, gdn_heads):
    g = geometry_preset("published", *base)
    hidden, _, head_dim = base
    assert tuple(vars(g.mla).values()) == mla
    assert (g.gdn.num_key_heads, g.gdn.key_head_dim) == (gdn_heads, 256)
    assert gdn_heads * 256 == hidden * 3 // 4  # d_k = 0.75 d
    assert g.gdn.num_value_heads * g.gdn.value_head_dim == 2 * gdn_heads * 256  # d_v = 2 d_k
    assert g.mamba2.num_heads * g.mamba2.head_dim == hidden  # expand 1
    assert g.mamba2.num_groups == g.mamba2.num_heads and g.mamba2.state_size == head_dim


@pytest.mark.parametrize("name, layers, base, mla, kept", [
    ("4MLA12GDN", 16, (2048, 32, 64), 8, 3.9), ("8MLA8M2", 16, (2048, 32, 64), 8, 7.8),
    ("6MLA22GDN", 28, (3072, 24, 128), 8, 2.0), ("14MLA14GDN", 28, (3072, 24, 128), 8, 4.7),
    ("7MLA21GDN", 28, (2048, 16, 128), 8, 3.9), ("14MLA14M2", 28, (2048, 16, 128), 8, 7.8),
])  # fmt: skip
def test_published_geometry_keeps_the_published_share_of_the_cache(name, layers, base, mla, kept):
    hidden, heads, head_dim = base
    arch = tiny.hybrid(
        hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=8, head_dim=head_dim,
        plan=Plan.parse(layers, name), geometry=geometry_preset("published", *base),
    )  # fmt: skip
    share = 100 * arch.kv_bytes_per_token() / arch.as_teacher().kv_bytes_per_token()
    assert share == pytest.approx(kept, abs=0.06)


@pytest.mark.parametrize("base", [base for base, *_ in PUBLISHED] + [(576, 9, 64), (896, 14, 64), (4096, 32, 128)])
def test_native_geometry_is_what_engines_run_without_padding(base):
    hidden, heads, head_dim = base
    g = geometry_preset("native", *base)
    assert (g.mla.kv_lora_rank, g.mla.qk_nope_head_dim, g.mla.qk_rope_head_dim) == (256, 64, 64)
    assert g.mla.v_head_dim == head_dim and g.mla.q_lora_rank is None
    assert g.gdn.key_head_dim == g.gdn.value_head_dim == head_dim
    assert g.gdn.num_value_heads == 2 * g.gdn.num_key_heads
    assert g.gdn.num_key_heads == (hidden // 64 if head_dim == 64 else 0.75 * hidden / 128)
    assert (g.mamba2.num_heads, g.mamba2.num_groups) == (heads, heads)
    assert g.mamba2.head_dim == g.mamba2.state_size == head_dim


def test_geometry_that_is_not_there():
    with pytest.raises(HyLoError, match="no published dimensions for d 576.*--geometry native"):
        geometry_preset("published", 576, 9, 64)
    for name in ("small", "native:128", "native:128+x", "native:0+32", "native:128+32+64", "native:"):
        with pytest.raises(HyLoError, match="expected one of native, published, or with another latent"):
            geometry_preset(name, 576, 9, 64)


def test_another_latent_in_the_same_cache():
    """Six layers of 128 + 32 hold what three of 256 + 64 hold, and every frequency is one of the head's."""
    native, split = (geometry_preset(name, 576, 9, 64) for name in ("native", "native:128+32"))
    assert split == replace(native, mla=MLAGeometry(128, 64, 32, 64))
    assert 6 * row_values(split.mla) == 3 * row_values(native.mla)
    check_heads(64, split, {"mla", "gdn"})
    wide = geometry_preset("native:128+32", 3072, 24, 128).mla
    assert (wide.qk_nope_head_dim, wide.qk_rope_head_dim) == (96, 32)
    with pytest.raises(HyLoError, match="qk_rope_head_dim 24 must divide the head dimension 64"):
        check_heads(64, geometry_preset("native:128+24", 576, 9, 64), {"mla"})
