"""Shapes of every tensor of a model under its Hugging Face name, against which weights are checked. No torch."""

from math import prod

from hylo_megatron.config import Architecture
from hylo_megatron.mixers import MIXERS, window
from hylo_megatron.mixers.mapping import Shapes


def hf_shapes(arch: Architecture) -> Shapes:
    """Return ``{Hugging Face key: shape}`` of the whole model."""
    d, f = arch.hidden_size, arch.intermediate_size
    rest = {"input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,), "mlp.gate_proj.weight": (f, d),
            "mlp.up_proj.weight": (f, d), "mlp.down_proj.weight": (d, f)}  # fmt: skip
    blocks = {
        kind: rest | MIXERS[kind].part("mapping").hf_shapes(arch) | window.hf_shapes(arch, kind)
        for kind in set(arch.plan)
    }
    shapes = {"model.embed_tokens.weight": (arch.vocab_size, d), "model.norm.weight": (d,)}
    for layer, kind in enumerate(arch.plan):
        shapes |= {f"model.layers.{layer}.{key}": shape for key, shape in blocks[kind].items()}
    if not arch.tie_word_embeddings:
        shapes["lm_head.weight"] = (arch.vocab_size, d)
    return shapes


def element_count(arch: Architecture) -> int:
    """Return the number of values in all weights of a model."""
    return sum(map(prod, hf_shapes(arch).values()))
