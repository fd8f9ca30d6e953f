"""The table of all weights of a model, with Hugging Face and Megatron names (``mixers/mapping.py``)."""

from dataclasses import replace

from hylo_megatron.config import Architecture
from hylo_megatron.mixers import MIXERS, window
from hylo_megatron.mixers.mapping import Concat, Mapping, copy


def _model_table(arch: Architecture) -> list[Mapping]:
    table = [
        copy("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        copy("decoder.final_norm.weight", "model.norm.weight"),
    ]
    if not arch.tie_word_embeddings:
        table.append(copy("output_layer.weight", "lm_head.weight"))
    return table


def _mlp_table(arch: Architecture) -> list[Mapping]:
    megatron, hf = "decoder.layers.{p}.", "model.layers.{i}."
    return [
        copy(megatron + "pre_mlp_layernorm.weight", hf + "post_attention_layernorm.weight"),
        Concat((megatron + "mlp.linear_fc1.weight",), (hf + "mlp.gate_proj.weight", hf + "mlp.up_proj.weight"),
               rows=(arch.intermediate_size,) * 2),
        copy(megatron + "mlp.linear_fc2.weight", hf + "mlp.down_proj.weight"),
    ]  # fmt: skip


def _at_layer(mapping: Mapping, layer: int) -> Mapping:
    numbers = dict(i=layer, m=2 * layer, p=2 * layer + 1)
    megatron, hf = (tuple(key.format(**numbers) for key in names) for names in (mapping.megatron, mapping.hf))
    return replace(mapping, megatron=megatron, hf=hf)


def mappings(arch: Architecture) -> list[Mapping]:
    """Return the mappings of a whole model, in the order in which its tensors are used."""
    tables = {
        kind: MIXERS[kind].part("mapping").table(arch) + window.table(arch, kind) + _mlp_table(arch)
        for kind in set(arch.plan)
    }
    layers = [_at_layer(mapping, layer) for layer, kind in enumerate(arch.plan) for mapping in tables[kind]]
    ends = _model_table(arch)
    return ends[:1] + layers + ends[1:]
