"""Weight mappings between Hugging Face and Megatron names, as tables.

``{i}`` is the base layer; Megatron's ``HybridModel`` has it as layers ``{m} = 2 i`` (mixer), ``{p} = 2 i + 1`` (MLP).
Every entry names all its keys on both sides, so that an unmapped or unused key can be told from the table alone.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hylo_megatron.config import Architecture


@dataclass(frozen=True)
class Mapping:
    """Tensors named ``hf`` and ``megatron`` that hold the same numbers; this base kind is a plain copy."""

    megatron: tuple[str, ...]
    hf: tuple[str, ...]

    def to_megatron(self, hf: list[Tensor]) -> list[Tensor]:
        return hf

    def to_hf(self, megatron: list[Tensor]) -> list[Tensor]:
        return megatron


@dataclass(frozen=True)
class Concat(Mapping):
    """Several HF tensors are the rows of one Megatron tensor, in order (``rows``: their sizes)."""

    rows: tuple[int, ...] = ()

    def to_megatron(self, hf):
        return [torch.cat(hf, 0)]

    def to_hf(self, megatron):
        return list(megatron[0].split(self.rows, 0))


@dataclass(frozen=True)
class Rows(Mapping):
    """One HF tensor is the rows of several Megatron tensors, in order."""

    rows: tuple[int, ...] = ()

    def to_megatron(self, hf):
        return list(hf[0].split(self.rows, 0))

    def to_hf(self, megatron):
        return [torch.cat(megatron, 0)]


@dataclass(frozen=True)
class GroupedQKV(Mapping):
    """Megatron interleaves by key-value group: the group's queries, its key, its value."""

    heads: int = 0
    groups: int = 0
    head_dim: int = 0

    def to_megatron(self, hf):
        q, k, v = hf
        tail, per_group = q.shape[1:], self.heads // self.groups
        q = q.reshape(self.groups, per_group * self.head_dim, *tail)
        k, v = (x.reshape(self.groups, self.head_dim, *tail) for x in (k, v))
        return [torch.cat([q, k, v], 1).reshape(-1, *tail)]

    def to_hf(self, megatron):
        tail, queries = megatron[0].shape[1:], self.heads // self.groups * self.head_dim
        groups = megatron[0].reshape(self.groups, queries + 2 * self.head_dim, *tail)
        parts = groups.split([queries, self.head_dim, self.head_dim], 1)
        return [part.reshape(-1, *tail) for part in parts]


def _copy(megatron: str, hf: str) -> Mapping:
    return Mapping((megatron,), (hf,))


def model_table(arch: Architecture) -> list[Mapping]:
    table = [
        _copy("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        _copy("decoder.final_norm.weight", "model.norm.weight"),
    ]
    if not arch.tie_word_embeddings:
        table.append(_copy("output_layer.weight", "lm_head.weight"))
    return table


def mlp_table(arch: Architecture) -> list[Mapping]:
    m, h = "decoder.layers.{p}.", "model.layers.{i}."
    return [
        _copy(m + "pre_mlp_layernorm.weight", h + "post_attention_layernorm.weight"),
        Concat(
            (m + "mlp.linear_fc1.weight",),
            (h + "mlp.gate_proj.weight", h + "mlp.up_proj.weight"),
            rows=(arch.intermediate_size,) * 2,
        ),
        _copy(m + "mlp.linear_fc2.weight", h + "mlp.down_proj.weight"),
    ]


def attention_table(arch: Architecture) -> list[Mapping]:
    m, h = "decoder.layers.{m}.self_attention.", "model.layers.{i}.self_attn."
    sizes = dict(heads=arch.num_attention_heads, groups=arch.num_key_value_heads, head_dim=arch.head_dim)
    kinds = ("weight", "bias") if arch.attention_bias else ("weight",)
    table = [
        _copy("decoder.layers.{m}.input_layernorm.weight", "model.layers.{i}.input_layernorm.weight"),
        _copy(m + "linear_proj.weight", h + "o_proj.weight"),
    ]
    for kind in kinds:
        qkv = tuple(f"{h}{name}_proj.{kind}" for name in "qkv")
        table.append(GroupedQKV((f"{m}linear_qkv.{kind}",), qkv, **sizes))
    if arch.qk_norm:
        table += [_copy(f"{m}{x}_layernorm.weight", f"{h}{x}_norm.weight") for x in "qk"]
    return table


def mla_table(arch: Architecture) -> list[Mapping]:
    m, h = "decoder.layers.{m}.self_attention.", "model.layers.{i}.self_attn."
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
    return [_copy("decoder.layers.{m}.input_layernorm.weight", "model.layers.{i}.input_layernorm.weight")] + [
        _copy(f"{m}{megatron}.weight", f"{h}{hf}.weight") for megatron, hf in names.items()
    ]


def gdn_table(arch: Architecture) -> list[Mapping]:
    m, h = "decoder.layers.{m}.self_attention.", "model.layers.{i}.mixer."
    names = {
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
    return [_copy("decoder.layers.{m}.input_layernorm.weight", "model.layers.{i}.input_layernorm.weight")] + [
        _copy(m + megatron, h + hf) for megatron, hf in names.items()
    ]


def mamba2_table(arch: Architecture) -> list[Mapping]:
    m, h, g = "decoder.layers.{m}.mixer.", "model.layers.{i}.mixer.", arch.geometry.mamba2
    inner, groups = g.num_heads * g.head_dim, g.num_groups * g.state_size
    conv = (inner, groups, groups)
    table = [
        _copy("decoder.layers.{m}.norm.weight", "model.layers.{i}.input_layernorm.weight"),
        Rows(
            tuple(f"{m}in_proj.weight.{part}" for part in ("z", "x", "B", "C", "dt")),
            (h + "in_proj.weight",),
            rows=(inner, *conv, g.num_heads),
        ),
    ]
    for kind in ("weight", "bias"):
        parts = tuple(f"{m}conv1d.{kind}.{part}" for part in ("x", "B", "C"))
        table.append(Rows(parts, (f"{h}conv1d.{kind}",), rows=conv))
    return table + [_copy(m + n, h + n) for n in ("A_log", "D", "dt_bias", "norm.weight", "out_proj.weight")]


MIXER_TABLES = {"attention": attention_table, "mla": mla_table, "gdn": gdn_table, "mamba2": mamba2_table}


def _at_layer(mapping: Mapping, layer: int) -> Mapping:
    numbers = dict(i=layer, m=2 * layer, p=2 * layer + 1)
    return replace(
        mapping,
        megatron=tuple(key.format(**numbers) for key in mapping.megatron),
        hf=tuple(key.format(**numbers) for key in mapping.hf),
    )


def mappings(arch: Architecture) -> list[Mapping]:
    """The whole table of a model, in the order in which its tensors are used."""
    layers = [
        _at_layer(mapping, layer)
        for layer, kind in enumerate(arch.plan)
        for mapping in MIXER_TABLES[kind](arch) + mlp_table(arch)
    ]
    ends = model_table(arch)
    return ends[:1] + layers + ends[1:]
