"""Weights of MLA: names (DeepSeek-V2's), shapes."""

from hylo_megatron.config import Architecture
from hylo_megatron.mixers.mapping import HF, INPUT_NORM, MEGATRON, Mapping, Shapes, copies


def hf_shapes(arch: Architecture) -> Shapes:
    d, heads, g = arch.hidden_size, arch.num_attention_heads, arch.geometry.mla
    key = g.qk_nope_head_dim + g.qk_rope_head_dim
    if g.q_lora_rank:
        shapes = {
            "self_attn.q_a_proj.weight": (g.q_lora_rank, d),
            "self_attn.q_b_proj.weight": (heads * key, g.q_lora_rank),
        }
    else:
        shapes = {"self_attn.q_proj.weight": (heads * key, d)}
    if arch.mla_qk_norm:
        shapes |= {f"self_attn.{n}_norm.weight": (key,) for n in "qk"}
    return shapes | {
        "self_attn.kv_a_proj_with_mqa.weight": (g.kv_lora_rank + g.qk_rope_head_dim, d),
        "self_attn.kv_b_proj.weight": (heads * (g.qk_nope_head_dim + g.v_head_dim), g.kv_lora_rank),
        "self_attn.o_proj.weight": (d, heads * g.v_head_dim),
    }


def table(arch: Architecture) -> list[Mapping]:
    names = {
        "linear_kv_down_proj": "kv_a_proj_with_mqa",
        "linear_kv_up_proj": "kv_b_proj",
        "linear_proj": "o_proj",
    }
    if arch.geometry.mla.q_lora_rank:
        names |= {"linear_q_down_proj": "q_a_proj", "linear_q_up_proj": "q_b_proj"}
    else:
        names |= {"linear_q_proj": "q_proj"}
    if arch.mla_qk_norm:
        names |= {"q_norm": "q_norm", "k_norm": "k_norm"}
    weights = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in names.items()}
    return [INPUT_NORM, *copies(MEGATRON + "self_attention.", HF + "self_attn.", weights)]
