"""Hugging Face folders with generated configs and random weights, and the logits that transformers makes of them."""

import json
import shutil
from pathlib import Path

import torch
from helpers import tiny
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from hylo_megatron.config import Architecture
from hylo_megatron.convert import hf_to_megatron
from hylo_megatron.init.teacher import BaseModel

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
LENGTH = 32
SAME = 1e-4  # largest relative difference of logits
TOKENS = torch.randint(40, (1, LENGTH), generator=torch.Generator().manual_seed(1))

_THETA = st.sampled_from([1e4, 5e5, 1000000])
_YARN = st.fixed_dictionaries(
    {"factor": st.sampled_from([2.0, 4, 8.5])},
    optional={
        "original_max_position_embeddings": st.sampled_from([16, 32]),
        "attention_factor": st.sampled_from([1.0, 1.3, None]),
        "beta_fast": st.sampled_from([16, 32.0, None]),
        "beta_slow": st.sampled_from([1, 2]),
        "mscale": st.sampled_from([0.7, 1.0]),
        "mscale_all_dim": st.sampled_from([0.5, 1]),
        "truncate": st.booleans(),
        "finetuned": st.just(True),
    },
)
_LLAMA3 = st.fixed_dictionaries(
    {
        "factor": st.sampled_from([4.0, 8]),
        "low_freq_factor": st.just(1.0),
        "high_freq_factor": st.sampled_from([2, 4.0]),
    },
    optional={"original_max_position_embeddings": st.sampled_from([16, 32])},
)
_SCALINGS = {
    "default": st.just({}),
    "linear": st.fixed_dictionaries({"factor": st.sampled_from([2.0, 3])}),
    "llama3": _LLAMA3,
    "yarn": _YARN,
}


@st.composite
def _rope(draw) -> dict:
    """The rotary embedding's part of a config, as transformers 4, 5 or both at once write it."""
    kind, theta = draw(st.sampled_from(sorted(_SCALINGS))), draw(_THETA)
    scaling = draw(_SCALINGS[kind])
    style = draw(st.sampled_from(["4", "4 type", "5", "both", "conflict", "none"]))
    if style == "5":
        return {"rope_parameters": {"rope_type": kind, "rope_theta": theta} | scaling}
    if style == "none":
        return {}
    old = {"rope_theta": theta, "rope_scaling": {"type" if style == "4 type" else "rope_type": kind} | scaling}
    if style == "both":
        return old | {"rope_parameters": {"rope_type": kind, "rope_theta": theta} | scaling}
    if style == "conflict":
        return old | {"rope_parameters": {"rope_type": "default", "rope_theta": 3e4}}
    return old


def _windows(kind: str):
    if kind == "mistral":
        return st.fixed_dictionaries({"sliding_window": st.sampled_from([None, 64, 4096])})
    if kind == "llama":
        return st.just({})
    return st.fixed_dictionaries(
        {},
        optional={
            "use_sliding_window": st.just(False),
            "sliding_window": st.sampled_from([None, 8, 4096]),
            "max_window_layers": st.sampled_from([0, 1, 28]),
            "layer_types": st.just(["full_attention"] * 2),
        },
    )


@st.composite
def configs(draw, kind: str) -> dict:
    """Configs that we compute."""
    heads = draw(st.sampled_from([2, 4]))
    config = {
        "architectures": ["Whatever"], "model_type": kind, "vocab_size": 40, "hidden_size": 32,
        "intermediate_size": draw(st.sampled_from([24, 40])), "num_hidden_layers": 2, "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([k for k in (1, 2, 4) if heads % k == 0])),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-2])), "max_position_embeddings": 64,
        "tie_word_embeddings": draw(st.booleans()), "torch_dtype": "bfloat16",
    }  # fmt: skip
    if kind == "qwen3" or draw(st.booleans()):
        config["head_dim"] = draw(st.sampled_from([8, 16]))
    return config | draw(_rope()) | draw(_windows(kind))


def write_folder(folder: Path, raw: dict, shards: int = 1, dtype=torch.float32, seed: int = 0) -> Path:
    """A folder with config ``raw`` as it is, and the weights that transformers wants for it."""
    folder.mkdir(parents=True)
    config = CONFIG_MAPPING[raw["model_type"]].from_dict(json.loads(json.dumps(raw)))
    model, generator = AutoModelForCausalLM.from_config(config), torch.Generator().manual_seed(seed)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    state = {
        name: tiny.scatter(name, tuple(tensor.shape), generator).to(dtype)
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    tiny.write_weights(folder, state, shards)
    (folder / "config.json").write_text(json.dumps(raw))
    tiny.write_tokenizer(folder, 40)
    return folder


def loaded(folder: Path):
    """transformers' model, or None where it refuses the folder or fills in tensors of its own."""
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except Exception:
        return None
    return None if info["missing_keys"] or info["mismatched_keys"] else model.eval()


@torch.no_grad()
def difference(folder: Path, checkpoint: Path) -> float:
    """Relative difference between transformers' logits and those of the written checkpoint."""
    want, base = loaded(folder)(TOKENS).logits, BaseModel(checkpoint, torch.device("cpu"))
    x = base.embed(TOKENS)
    for index in range(base.arch.num_layers):
        x = base.layer(index, x)[1]
    return ((base.logits(x) - want).norm() / want.norm()).item()


def convert(source: Path, out: Path, **options) -> Architecture:
    shutil.rmtree(out, ignore_errors=True)
    return hf_to_megatron.convert(source, out, log=lambda _: None, **options)
