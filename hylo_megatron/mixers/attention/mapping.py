"""Weights of softmax attention: names, shapes."""

from hylo_megatron.config import Architecture
from hylo_megatron.mixers.mapping import HF, INPUT_NORM, MEGATRON, GroupedQKV, Mapping, Shapes, copies, copy


def hf_shapes(arch: Architecture) -> Shapes:
    d, hd = arch.hidden_size, arch.head_dim
    q, kv = arch.num_attention_heads * hd, arch.num_key_value_heads * hd
    sizes = {"q": q, "k": kv, "v": kv}
    shapes = {f"self_attn.{name}_proj.weight": (size, d) for name, size in sizes.items()}
    if arch.attention_bias:
        shapes |= {f"self_attn.{name}_proj.bias": (size,) for name, size in sizes.items()}
    if arch.qk_norm:
        shapes |= {f"self_attn.{name}_norm.weight": (hd,) for name in "qk"}
    return shapes | {"self_attn.o_proj.weight": (d, q)}


def table(arch: Architecture) -> list[Mapping]:
    megatron, hf = MEGATRON + "self_attention.", HF + "self_attn."
    sizes = dict(heads=arch.num_attention_heads, groups=arch.num_key_value_heads, head_dim=arch.head_dim)
    mappings = [INPUT_NORM, copy(megatron + "linear_proj.weight", hf + "o_proj.weight")]
    for kind in ("weight", "bias") if arch.attention_bias else ("weight",):
        qkv = tuple(f"{hf}{name}_proj.{kind}" for name in "qkv")
        mappings.append(GroupedQKV((f"{megatron}linear_qkv.{kind}",), qkv, **sizes))
    if arch.qk_norm:
        mappings += copies(megatron, hf, {f"{x}_layernorm.weight": f"{x}_norm.weight" for x in "qk"})
    return mappings
