"""Tiny hybrids of the transformers model, with weights that make every part of a mixer show."""

import pytest
import torch
from torch import nn

import hylo_megatron  # noqa: F401  (registers the model)
from hylo_megatron.hf.configuration_hylo import HyLoConfig
from hylo_megatron.hf.modeling_hylo import HyLoForCausalLM

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def tiny_config(mixers=("mla", "gdn", "mla", "gdn"), **changes) -> HyLoConfig:
    values = dict(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_attention_heads=4, head_dim=8, mixers=list(mixers),
        q_lora_rank=24, kv_lora_rank=20, qk_nope_head_dim=6, qk_rope_head_dim=8, v_head_dim=10,
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=12,
        kda_num_heads=4, kda_head_dim=6,
        mamba_num_heads=4, mamba_head_dim=8, mamba_state_size=6, mamba_num_groups=2, max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return HyLoConfig(**{**values, **changes})


def scatter(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights large enough that every part of a mixer shows in its output."""
    torch.manual_seed(seed)
    for name, parameter in module.named_parameters():
        if name.endswith(("A_log", "D", "dt_bias")):
            parameter.data.uniform_(-1.5, 1.0)
        elif parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5)
        else:
            parameter.data.normal_(0, 1.2 * parameter[0].numel() ** -0.5)
    return module.eval()


def model_of(mixers, **changes) -> HyLoForCausalLM:
    return scatter(HyLoForCausalLM(tiny_config(mixers, **changes)))


HYBRIDS = {
    "gdn": dict(mixers=("gdn", "mla", "gdn", "mla")),
    "mamba2": dict(mixers=("mla", "mamba2", "mla", "mamba2")),
    "kda": dict(mixers=("kda", "mla", "kda", "mla")),
    "qk_norm": dict(mixers=("mla", "gdn"), qk_norm=True, q_lora_rank=None),
    "yarn": dict(mixers=("mla", "gdn"), rope_parameters=YARN, tie_word_embeddings=True),
    "nope": dict(mixers=("mla", "gdn", "mla"), mla_rope=False, log_scale={"base": 3.0, "length": 4}),
    "linear_rope": dict(mixers=("kda", "mla", "kda"), linear_rope=True),
    "window": dict(mixers=("gdn", "mla", "gdn"), window={"size": 5, "sinks": 2}, num_key_value_heads=2),
    "windows": dict(mixers=("mla", "gdn", "mla"), window={"size": 5, "sinks": 2, "mla": True}, num_key_value_heads=2),
    "no_mla": dict(mixers=("gdn", "gdn")),
}
each_hybrid = pytest.mark.parametrize("kind", HYBRIDS)


def numbers(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def packed(lengths) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]
