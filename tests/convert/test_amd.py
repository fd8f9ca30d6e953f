"""AMD's HyLo releases: converted ones compute what plain torch written from their code does."""

import gc
import json
import math
import weakref

import pytest
import torch

pytest.importorskip("transformers")
from helpers import amd_reference as reference  # noqa: E402
from helpers import tiny  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import hylo_megatron  # noqa: E402, F401  (registers the model)
from hylo_megatron.convert import hf_to_megatron, megatron_to_hf  # noqa: E402
from hylo_megatron.convert.amd_release import convert as amd
from hylo_megatron.convert.amd_release.config import Unsaid, read_release  # noqa: E402
from hylo_megatron.convert.amd_release.tables import source_shapes  # noqa: E402
from hylo_megatron.convert.hf_config import read_architecture  # noqa: E402
from hylo_megatron.packages import has  # noqa: E402

TOLERANCE = 1e-4
TOKENS = tiny.tokens(1, 40)[0]
KINDS = [f"{base}-{linear}" for base in ("llama1b", "llama3b", "qwen1p7b") for linear in ("gdn", "m2")]
LINEAR_ROPE = dict(rope_type="linear", factor=2.0)
OTHER_RAMP = dict(rope_type="yarn", factor=4.0, beta_fast=4, beta_slow=0.5, original_max_position_embeddings=512)
REPEATED = dict(expand=1, ngroups=4, d_state=16, repeat_kv_before_conv=True)
VARIANTS = {
    "untied": ("llama1b-gdn", dict(tie_word_embeddings=False), {}),
    "kv_b of all heads": ("llama3b-gdn", {}, dict(use_full_kv_head=True)),
    "convolution of all heads": ("qwen1p7b-m2", {}, dict(ssm_cfg=REPEATED)),
    "no scaling": ("llama1b-m2", {}, dict(rope_scaling=None)),
    "linear scaling": ("llama1b-gdn", {}, dict(rope_scaling=LINEAR_ROPE)),
    "other ramp": ("llama3b-gdn", {}, dict(rope_scaling=OTHER_RAMP)),
    "linear kind is named": ("llama1b-m2", {}, dict(linear_type="mamba")),
}


def converted_logits(release, out, unsaid=Unsaid(max_position_embeddings=128)) -> torch.Tensor:  # noqa: B008
    amd.convert(release.folder, out, unsaid=unsaid)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(TOKENS[None]).logits[0]


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    assert want.std() > 0.2, "the logits say too little to compare"
    return (got - want).abs().max().item()


# ---- what is computed ----


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_the_reference(tmp_path, kind):
    release = reference.write(tmp_path / "release", kind)
    assert distance(converted_logits(release, tmp_path / "hf"), release.logits(TOKENS)) <= TOLERANCE


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_of_what_the_format_also_allows(tmp_path, name):
    kind, base, hybrid = VARIANTS[name]
    release = reference.write(tmp_path / "release", kind, base, hybrid)
    assert distance(converted_logits(release, tmp_path / "hf"), release.logits(TOKENS)) <= TOLERANCE


@pytest.mark.parametrize("kind", ["llama1b-gdn", "qwen1p7b-m2"])
def test_pairs_half_a_head_apart(tmp_path, kind):
    release = reference.write(tmp_path / "release", kind)
    got = converted_logits(release, tmp_path / "hf", Unsaid(128, interleaved=False))
    assert distance(got, release.logits(TOKENS, interleaved=False)) <= TOLERANCE
    assert distance(got, release.logits(TOKENS)) > 100 * TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_shows_in_the_reference(kind):
    """Else the comparison above would not see one that is mapped wrongly."""
    base, hybrid = reference.config_files(kind)
    base["tie_word_embeddings"] = False
    state = reference.random_tensors(base, hybrid, kind.split("-")[1])
    want = reference.logits(base, hybrid, state, TOKENS[:8])
    for name, tensor in state.items():
        changed = reference.logits(base, hybrid, state | {name: tensor.flip(0)}, TOKENS[:8])
        assert (changed - want).abs().max() > 10 * TOLERANCE, name


def test_eps_of_the_gdn_norm(tmp_path):
    """Qwen3's own is 1e-6; what the releases have, fla's or Qwen's, no file says."""
    release = reference.write(tmp_path / "release", "qwen1p7b-gdn")
    small = {n: t * 0.03 if n.endswith("gdn.v_proj.weight") else t for n, t in release.state.items()}
    save_file(small, release.folder / "model.safetensors")
    want = reference.logits(release.base, release.hybrid, small, TOKENS)
    assert distance(converted_logits(release, tmp_path / "hf"), want) <= TOLERANCE
    other = converted_logits(release, tmp_path / "other", Unsaid(128, gdn_norm_eps=1e-6))
    assert distance(other, want) > 100 * TOLERANCE
    eps = [json.loads((tmp_path / n / "config.json").read_text()).get("linear_norm_eps") for n in ("hf", "other")]
    assert eps == [1e-5, None]


# Parameters of the released files, from their model cards.
PUBLISHED = {
    "HyLo-Llama-4MLA12GDN-64K-SFT": 1_673_797_776,
    "HyLo-Llama-8MLA8GDN-8K-SFT": 1_613_437_024,
    "HyLo-Llama-6MLA22GDN-64K-SFT": 4_267_821_452,
    "HyLo-Llama-14MLA14GDN-64K-SFT": 3_971_381_500,
    "HyLo-Qwen-7MLA21GDN-64K-SFT": 2_284_173_820,
    "HyLo-Qwen-14MLA14GDN-8K-SFT": 2_182_902_440,
    "HyLo-Qwen-14MLA14M2-64K-SFT": 2_065_541_280,
}
BASES = {  # width, MLP, layers, heads, head dim, vocabulary, eps; MLA: latents, nope, rope, value; GDN heads
    "1b": (2048, 8192, 16, 32, 64, 128256, 1e-5, 1344, 128, 32, 32, 64, 6),
    "3b": (3072, 8192, 28, 24, 128, 128256, 1e-5, 1536, 128, 64, 64, 128, 9),
    "qwen": (2048, 6144, 28, 16, 128, 151936, 1e-6, 1344, 256, 64, 64, 128, 6),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_tables_count_the_published_parameters(tmp_path, name):
    count = int(name.split("-")[2].split("MLA")[0])
    size = "qwen" if "Qwen" in name else "1b" if count in (4, 8) else "3b"
    d, wide, layers, heads, head, vocab, eps, q, kv, nope, rope, value, gdn_heads = BASES[size]
    base, hybrid = reference.config_files("qwen1p7b-m2" if "M2" in name else "qwen1p7b-gdn")
    base |= dict(model_type="qwen3" if size == "qwen" else "llama", vocab_size=vocab, hidden_size=d, head_dim=head,
                 intermediate_size=wide, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=8,
                 rms_norm_eps=eps)  # fmt: skip
    hybrid |= dict(hidden_size=d, intermediate_size=wide, n_layer=layers, num_attention_heads=heads,
                   num_key_value_heads=8, rms_norm_eps=eps, q_lora_rank=q, kv_lora_rank=kv, qk_nope_head_dim=nope,
                   qk_rope_head_dim=rope, v_head_dim=value, gdn_num_heads=gdn_heads, gdn_head_dim=256, d_model=d,
                   d_inner=heads * head, d_xb=8 * head, ssm_cfg=dict(expand=1, ngroups=heads, d_state=head),
                   mla_layers=list(range(count)))  # fmt: skip
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text(json.dumps(base))
    (tmp_path / name / "hybrid_config.json").write_text(json.dumps(hybrid))
    keys = ["model.layers.27.mamba.D"] if "M2" in name else []
    release = read_release(tmp_path / name, keys, Unsaid())
    output = vocab * d  # stored though it is a copy of the embeddings
    assert sum(map(math.prod, source_shapes(release).values())) + output == PUBLISHED[name]
    assert release.arch.max_position_embeddings == (65536 if "64K" in name else 8192)


# ---- what is written ----


@pytest.fixture
def release(tmp_path):
    made = reference.write(tmp_path / "HyLo-Qwen-2MLA2GDN-8K-SFT", "qwen1p7b-gdn")
    tiny.write_tokenizer(made.folder)
    (made.folder / "generation_config.json").write_text("{}")
    return made


def test_the_folder(tmp_path, release):
    arch = amd.convert(release.folder, tmp_path / "out")
    assert read_architecture(tmp_path / "out") == arch
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    want = dict(model_type="hylo", architectures=["HyLoForCausalLM"], dtype="float32", qk_norm=True,
                mixers=["gdn", "mla", "gdn", "mla"], max_position_embeddings=8192, eos_token_id=[2, 3])  # fmt: skip
    assert {key: config[key] for key in want} == want
    names = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
             "README.md", "hylo_megatron_loader.py"}  # fmt: skip
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    got = tiny.weights(tmp_path / "out")
    assert "lm_head.weight" not in got and {t.dtype for t in got.values()} == {torch.float32}
    theirs = release.state["model.layers.0.gdn.v_proj.weight"]
    tiny.same_bits({"v": got["model.layers.0.mixer.v_proj.weight"]}, {"v": theirs})


def test_another_dtype_keeps_decay_parameters_fp32(tmp_path, release):
    amd.convert(release.folder, tmp_path / "out", torch.bfloat16)
    got = tiny.weights(tmp_path / "out")
    assert {t.dtype for n, t in got.items() if n.endswith(("A_log", "dt_bias"))} == {torch.float32}
    assert {t.dtype for n, t in got.items() if not n.endswith(("A_log", "dt_bias"))} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_few_tensors_at_a_time(tmp_path, release, monkeypatch):
    monkeypatch.setattr(amd, "SHARD_BYTES", 4096)  # less than most tensors have
    alive, peak, get = [0], [0], amd.ReleasedWeights.__getitem__

    def watched(self, key):
        tensor = get(self, key)
        alive[0] += 1
        peak[0] = max(peak[0], alive[0])
        weakref.finalize(tensor, lambda: alive.__setitem__(0, alive[0] - 1))
        return tensor

    monkeypatch.setattr(amd.ReleasedWeights, "__getitem__", watched)
    gc.disable()  # what only a collection would free counts as held
    try:
        amd.convert(release.folder, tmp_path / "out")
    finally:
        gc.enable()
    assert peak[0] <= 2
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 20
    monkeypatch.undo()
    amd.convert(release.folder, tmp_path / "whole")
    tiny.same_bits(tiny.weights(tmp_path / "out"), tiny.weights(tmp_path / "whole"))


@pytest.mark.skipif(not has("megatron-core"), reason="megatron-core is not installed")
@pytest.mark.parametrize("kind", ["llama3b-gdn", "llama1b-m2", "qwen1p7b-gdn", "qwen1p7b-m2"])
def test_through_megatron(tmp_path, kind, process_groups):
    from programs.logits import logits

    from hylo_megatron.layers.load import load_model

    release = reference.write(tmp_path / "release", kind)
    want = converted_logits(release, tmp_path / "hf")
    arch = hf_to_megatron.convert(tmp_path / "hf", tmp_path / "ckpt")
    megatron_to_hf.convert(tmp_path / "ckpt", tmp_path / "back")
    tiny.same_bits(tiny.weights(tmp_path / "back"), tiny.weights(tmp_path / "hf"))
    assert read_architecture(tmp_path / "back") == arch
    got = logits(load_model(tmp_path / "ckpt")[0], TOKENS[None])[0]
    assert distance(got, want) <= TOLERANCE


def test_fields_that_change_nothing(tmp_path, release):
    tiny.edit_json(release.folder / "hybrid_config.json", layer_rank_list={}, gdn_mode="chunk", use_cache=False)
    amd.convert(release.folder, tmp_path / "out", unsaid=Unsaid(ignored_fields=("gdn_mode", "use_cache")))


def test_the_command_line(tmp_path, release, capsys):
    (tmp_path / "model").mkdir()
    for path in release.folder.iterdir():
        path.rename(tmp_path / "model" / path.name)
    command = ["--release", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        amd.main(command)
    assert stopped.value.code == 2
    assert "--max-position-embeddings" in capsys.readouterr().err
    amd.main([*command, "--max-position-embeddings", "4096", "--dtype", "bfloat16"])
    out = capsys.readouterr().out
    assert "assumed: rotary pairs are neighbours" in out and "--gdn-norm-eps 1e-06" in out and "2MLA2GDN" in out
    assert read_architecture(tmp_path / "out").max_position_embeddings == 4096
