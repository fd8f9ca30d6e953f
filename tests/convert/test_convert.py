"""Hugging Face <-> Megatron: bit for bit for every shape, one tensor at a time."""

import gc
import json
import weakref
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
from helpers import tiny
from helpers.conversion import HYBRIDS

from hylo_megatron.checkpoint import folder as checkpoint
from hylo_megatron.config import Architecture
from hylo_megatron.convert import hf_to_megatron, megatron_to_hf
from hylo_megatron.convert.hf_config import read_architecture
from hylo_megatron.convert.hf_folder import HFWeights
from hylo_megatron.errors import HyLoError

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


@pytest.mark.parametrize("dtype, value", [(torch.float16, 1e5), (torch.bfloat16, 3.4e38)])
def test_export_in_a_dtype_that_cannot_hold_the_values_is_refused(tmp_path, dtype, value):
    model = tiny.teacher_model("llama", num_hidden_layers=1)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = -value
    hf_to_megatron.convert(tiny.save_model(model, tmp_path / "hf"), tmp_path / "ckpt", check=False)
    with pytest.raises(HyLoError) as caught:
        megatron_to_hf.convert(tmp_path / "ckpt", tmp_path / "out", dtype=dtype)
    assert f"up_proj.weight has values up to {value:.3g}, --dtype {str(dtype)[6:]} holds up" in str(caught.value)
    megatron_to_hf.convert(tmp_path / "ckpt", tmp_path / "out")
    assert tiny.weights(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"].min() == -value


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
