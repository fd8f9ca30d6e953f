"""Weights of Gated DeltaNet: names (flash-linear-attention's), shapes.

A checkpoint holds megatron-core's ``in_proj.weight`` in six sections. ``NAMES`` has them in the order of its rows.
"""

from hylo_megatron.config import Architecture
from hylo_megatron.mixers.mapping import HF, INPUT_NORM, MEGATRON, Mapping, Shapes, copies

NAMES = {
    "in_proj.weight.query": "q_proj.weight",
    "in_proj.weight.key": "k_proj.weight",
    "in_proj.weight.value": "v_proj.weight",
    "in_proj.weight.z": "g_proj.weight",
    "in_proj.weight.beta": "b_proj.weight",
    "in_proj.weight.alpha": "a_proj.weight",
    "conv1d.weight.query": "q_conv1d.weight",
    "conv1d.weight.key": "k_conv1d.weight",
    "conv1d.weight.value": "v_conv1d.weight",
    "A_log": "A_log",
    "dt_bias": "dt_bias",
    "out_norm.weight": "o_norm.weight",
    "out_proj.weight": "o_proj.weight",
}


def hf_shapes(arch: Architecture) -> Shapes:
    d, g = arch.hidden_size, arch.geometry.gdn
    keys, values, heads = g.num_key_heads * g.key_head_dim, g.num_value_heads * g.value_head_dim, g.num_value_heads
    rows = {"q": keys, "k": keys, "v": values, "g": values, "b": heads, "a": heads}
    shapes = {f"mixer.{name}_proj.weight": (size, d) for name, size in rows.items()}
    shapes |= {f"mixer.{name}_conv1d.weight": (rows[name], 1, g.conv_kernel) for name in "qkv"}
    return shapes | {
        "mixer.A_log": (heads,),
        "mixer.dt_bias": (heads,),
        "mixer.o_norm.weight": (g.value_head_dim,),
        "mixer.o_proj.weight": (d, values),
    }


def table(arch: Architecture) -> list[Mapping]:
    return [INPUT_NORM, *copies(MEGATRON + "self_attention.", HF + "mixer.", NAMES)]
