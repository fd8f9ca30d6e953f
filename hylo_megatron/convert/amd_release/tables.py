"""Tables of the weights in AMD's HyLo releases and their Hugging Face names in our hybrids.

Every target consists of rows of one source: unchanged, reordered or repeated. ``{i}`` is the layer. The names for MLA
and Mamba-2 are those of ``Zebra-Llama/hybrid`` in github.com/AMD-AGI/AMD-Hybrid-Models, the names for GDN those of
flash-linear-attention's ``GatedDeltaNet``. Number and sizes of these tensors match the published parameter counts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hylo_megatron.config.shapes import hf_shapes
from hylo_megatron.convert.amd_release.config import Release
from hylo_megatron.mixers.gdn import mapping as gdn_mapping
from hylo_megatron.mixers.mapping import Shapes


@dataclass(frozen=True)
class Take:
    """``target`` is ``source[rows]``; None: all rows. ``rows`` names every row of the source at least once."""

    source: str
    target: str
    rows: Tensor | None = None

    def source_shape(self, target: tuple[int, ...]) -> tuple[int, ...]:
        return target if self.rows is None else (int(self.rows.max()) + 1, *target[1:])

    def __call__(self, source: Tensor) -> Tensor:
        return source if self.rows is None else source[self.rows]


def in_every_head(rows: Tensor, heads: int) -> Tensor:
    """Return the same ``rows`` of each head."""
    return (torch.arange(heads)[:, None] * len(rows) + rows).flatten()


def repeated_heads(kv_heads: int, heads: int, size: int) -> Tensor:
    """Return the rows of ``kv_heads`` heads of ``size``, each head ``heads / kv_heads`` times in a row."""
    return torch.arange(kv_heads * size).view(kv_heads, size).repeat_interleave(heads // kv_heads, 0).flatten()


def after_one_another(*sections: Tensor) -> Tensor:
    """Return the rows of a tensor made of sections; each section's rows count from its own start."""
    starts = [0]
    for section in sections:
        starts.append(starts[-1] + int(section.max()) + 1)
    return torch.cat([section + start for section, start in zip(sections, starts, strict=False)])


def half_split(size: int, interleaved: bool) -> Tensor:
    """Return rotary rows in our order, pairs half the head apart. ``interleaved``: their pairs are neighbours."""
    rows = torch.arange(size)
    return rows.view(-1, 2).T.flatten() if interleaved else rows


def mla_table(release: Release) -> list[Take]:
    arch, g = release.arch, release.arch.geometry.mla
    heads, whole = arch.num_attention_heads, torch.arange
    rope = half_split(g.qk_rope_head_dim, release.interleaved)
    head, latent = after_one_another(whole(g.qk_nope_head_dim), rope), after_one_another(whole(g.kv_lora_rank), rope)
    keys_values = repeated_heads(release.mla_kv_heads, heads, g.qk_nope_head_dim + g.v_head_dim)
    table = [("kv_a_proj_with_mqa", "kv_a_proj_with_mqa", latent), ("kv_b_proj", "kv_b_proj", keys_values),
             ("out_proj", "o_proj", None)]  # fmt: skip
    if g.q_lora_rank:
        table += [("q_a_proj", "q_a_proj", None), ("q_b_proj", "q_b_proj", in_every_head(head, heads))]
    else:
        table += [("q_proj", "q_proj", in_every_head(head, heads))]
    if arch.mla_qk_norm:  # applied before the rotation, so their rows follow its order
        table += [("q_norm", "q_norm", head), ("k_norm", "k_norm", head)]
    layer = "model.layers.{i}."
    return [Take(f"{layer}mla.{theirs}.weight", f"{layer}self_attn.{ours}.weight", rows)
            for theirs, ours, rows in table]  # fmt: skip


def gdn_table(release: Release) -> list[Take]:
    names = gdn_mapping.NAMES.values()  # both are flash-linear-attention's
    return [Take(f"model.layers.{{i}}.gdn.{name}", f"model.layers.{{i}}.mixer.{name}") for name in names]


def mamba2_table(release: Release) -> list[Take]:
    """Return the table of Mamba-2.

    x and B have the width of the base model's keys; their heads are repeated here instead of in every forward pass.
    The convolution is depthwise, so it may see them repeated as well.
    """
    g, whole = release.arch.geometry.mamba2, torch.arange
    inner, xb = g.num_heads * g.head_dim, repeated_heads(release.mamba_kv_heads, g.num_heads, g.head_dim)
    conv = None if release.conv_repeated else after_one_another(xb, xb, whole(inner))
    rows = {
        "in_proj.weight": after_one_another(whole(inner), xb, xb, whole(inner), whole(g.num_heads)),  # z, x, B, C, dt
        "conv1d.weight": conv, "conv1d.bias": conv, "A_log": None, "D": None, "dt_bias": None,
        "norm.weight": None, "out_proj.weight": None,
    }  # fmt: skip
    return [Take(f"model.layers.{{i}}.mamba.{n}", f"model.layers.{{i}}.mixer.{n}", r) for n, r in rows.items()]


BLOCK_NAMES = ("input_layernorm", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
BLOCK_TABLE = [Take(f"model.layers.{{i}}.{n}.weight", f"model.layers.{{i}}.{n}.weight") for n in BLOCK_NAMES]
MIXER_TABLES = {"mla": mla_table, "gdn": gdn_table, "mamba2": mamba2_table}
OUTPUT = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


def takes(release: Release) -> list[Take]:
    """Return the table of a complete release, in the order of the model."""
    arch = release.arch
    by_kind = {kind: MIXER_TABLES[kind](release) + BLOCK_TABLE for kind in set(arch.plan)}
    layers = [
        Take(take.source.format(i=layer), take.target.format(i=layer), take.rows)
        for layer, kind in enumerate(arch.plan)
        for take in by_kind[kind]
    ]
    ends = ("model.norm.weight",) if arch.tie_word_embeddings else ("model.norm.weight", OUTPUT)
    return [Take(EMBEDDING, EMBEDDING), *layers, *(Take(key, key) for key in ends)]


def source_shapes(release: Release) -> Shapes:
    """Return ``{their name: shape}`` of what ``takes`` reads."""
    ours = hf_shapes(release.arch)
    return {take.source: take.source_shape(ours[take.target]) for take in takes(release)}
