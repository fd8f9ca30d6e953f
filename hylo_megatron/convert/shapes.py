"""Shapes of every tensor of a model under its Hugging Face names: what a checkpoint is checked against."""

from hylo_megatron.config import Architecture

Shapes = dict[str, tuple[int, ...]]


def _attention(arch: Architecture) -> Shapes:
    d, hd = arch.hidden_size, arch.head_dim
    q, kv = arch.num_attention_heads * hd, arch.num_key_value_heads * hd
    shapes = {
        "self_attn.q_proj.weight": (q, d),
        "self_attn.k_proj.weight": (kv, d),
        "self_attn.v_proj.weight": (kv, d),
    }
    if arch.attention_bias:
        shapes |= {f"self_attn.{n}_proj.bias": (size,) for n, size in (("q", q), ("k", kv), ("v", kv))}
    if arch.qk_norm:
        shapes |= {f"self_attn.{n}_norm.weight": (hd,) for n in "qk"}
    return shapes | {"self_attn.o_proj.weight": (d, q)}


def _mla(arch: Architecture) -> Shapes:
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


def _gdn(arch: Architecture) -> Shapes:
    d, g = arch.hidden_size, arch.geometry.gdn
    k, v, heads = g.num_key_heads * g.key_head_dim, g.num_value_heads * g.value_head_dim, g.num_value_heads
    rows = {"q": k, "k": k, "v": v, "g": v, "b": heads, "a": heads}
    shapes = {f"mixer.{n}_proj.weight": (size, d) for n, size in rows.items()}
    shapes |= {f"mixer.{n}_conv1d.weight": (rows[n], 1, g.conv_kernel) for n in "qkv"}
    return shapes | {
        "mixer.A_log": (heads,), "mixer.dt_bias": (heads,),
        "mixer.o_norm.weight": (g.value_head_dim,), "mixer.o_proj.weight": (d, v),
    }  # fmt: skip


def _mamba2(arch: Architecture) -> Shapes:
    d, g = arch.hidden_size, arch.geometry.mamba2
    inner, conv = g.num_heads * g.head_dim, g.num_heads * g.head_dim + 2 * g.num_groups * g.state_size
    return {
        "mixer.in_proj.weight": (inner + conv + g.num_heads, d),
        "mixer.conv1d.weight": (conv, 1, g.conv_kernel), "mixer.conv1d.bias": (conv,),
        "mixer.A_log": (g.num_heads,), "mixer.D": (g.num_heads,), "mixer.dt_bias": (g.num_heads,),
        "mixer.norm.weight": (inner,), "mixer.out_proj.weight": (d, inner),
    }  # fmt: skip


_MIXERS = {"attention": _attention, "mla": _mla, "gdn": _gdn, "mamba2": _mamba2}
FP32_SUFFIXES = (".A_log", ".dt_bias", ".mixer.D")


def hf_shapes(arch: Architecture) -> Shapes:
    """``{Hugging Face key: shape}`` of the whole model."""
    d, f = arch.hidden_size, arch.intermediate_size
    block = {
        "input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,),
        "mlp.gate_proj.weight": (f, d), "mlp.up_proj.weight": (f, d), "mlp.down_proj.weight": (d, f),
    }  # fmt: skip
    shapes = {"model.embed_tokens.weight": (arch.vocab_size, d), "model.norm.weight": (d,)}
    for layer, kind in enumerate(arch.plan):
        shapes |= {f"model.layers.{layer}.{k}": v for k, v in (block | _MIXERS[kind](arch)).items()}
    if not arch.tie_word_embeddings:
        shapes["lm_head.weight"] = (arch.vocab_size, d)
    return shapes
