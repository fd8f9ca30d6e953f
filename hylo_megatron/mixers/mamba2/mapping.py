"""Weights of Mamba-2: names (mamba-ssm's), shapes."""

from hylo_megatron.config import Architecture
from hylo_megatron.mixers.mapping import HF, MEGATRON, Mapping, Rows, Shapes, copies, copy

SAME_NAMES = ("A_log", "D", "dt_bias", "norm.weight", "out_proj.weight")


def hf_shapes(arch: Architecture) -> Shapes:
    d, g = arch.hidden_size, arch.geometry.mamba2
    inner = g.num_heads * g.head_dim
    conv = inner + 2 * g.num_groups * g.state_size
    return {
        "mixer.in_proj.weight": (inner + conv + g.num_heads, d),
        "mixer.conv1d.weight": (conv, 1, g.conv_kernel),
        "mixer.conv1d.bias": (conv,),
        "mixer.A_log": (g.num_heads,),
        "mixer.D": (g.num_heads,),
        "mixer.dt_bias": (g.num_heads,),
        "mixer.norm.weight": (inner,),
        "mixer.out_proj.weight": (d, inner),
    }


def table(arch: Architecture) -> list[Mapping]:
    megatron, hf, g = MEGATRON + "mixer.", HF + "mixer.", arch.geometry.mamba2
    inner, groups = g.num_heads * g.head_dim, g.num_groups * g.state_size
    conv = (inner, groups, groups)

    def rows(name: str, parts: str, sizes: tuple[int, ...]) -> Mapping:
        return Rows(tuple(f"{megatron}{name}.{part}" for part in parts.split()), (hf + name,), rows=sizes)

    return [
        copy(MEGATRON + "norm.weight", HF + "input_layernorm.weight"),
        rows("in_proj.weight", "z x B C dt", (inner, *conv, g.num_heads)),
        rows("conv1d.weight", "x B C", conv),
        rows("conv1d.bias", "x B C", conv),
        *copies(megatron, hf, {name: name for name in SAME_NAMES}),
    ]
