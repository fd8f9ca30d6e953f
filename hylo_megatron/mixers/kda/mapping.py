"""Weights of Kimi Delta Attention: names (Kimi Linear's), shapes."""

from hylo_megatron.config import Architecture
from hylo_megatron.mixers.mapping import HF, INPUT_NORM, MEGATRON, Concat, Mapping, Shapes, copies

NAMES = {
    "in_proj.weight.query": "q_proj.weight",
    "in_proj.weight.key": "k_proj.weight",
    "in_proj.weight.value": "v_proj.weight",
    "in_proj.weight.beta": "b_proj.weight",
    "decay_up.weight": "f_b_proj.weight",
    "gate_up.weight": "g_b_proj.weight",
    "conv_weight.query": "q_conv1d.weight",
    "conv_weight.key": "k_conv1d.weight",
    "conv_weight.value": "v_conv1d.weight",
    "A_log": "A_log",
    "dt_bias": "dt_bias",
    "out_norm.weight": "o_norm.weight",
    "out_proj.weight": "o_proj.weight",
}


def hf_shapes(arch: Architecture) -> Shapes:
    d, g = arch.hidden_size, arch.geometry.kda
    width, rank = g.num_heads * g.head_dim, g.head_dim
    shapes = {f"mixer.{name}_proj.weight": (width, d) for name in "qkv"}
    shapes |= {f"mixer.{name}_conv1d.weight": (width, 1, g.conv_kernel) for name in "qkv"}
    for name in "fg":
        shapes |= {f"mixer.{name}_a_proj.weight": (rank, d), f"mixer.{name}_b_proj.weight": (width, rank)}
    return shapes | {
        "mixer.b_proj.weight": (g.num_heads, d),
        "mixer.A_log": (g.num_heads,),
        "mixer.dt_bias": (width,),
        "mixer.o_norm.weight": (g.head_dim,),
        "mixer.o_proj.weight": (d, width),
    }


def table(arch: Architecture) -> list[Mapping]:
    megatron, hf, rank = MEGATRON + "self_attention.", HF + "mixer.", arch.geometry.kda.head_dim
    down = Concat((f"{megatron}down.weight",), (f"{hf}f_a_proj.weight", f"{hf}g_a_proj.weight"), rows=(rank, rank))
    return [INPUT_NORM, down, *copies(megatron, hf, NAMES)]
