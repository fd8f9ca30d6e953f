"""Tensors of an exported folder as the engine's parameters: a table of names, and the padding of geometry.py.

Zeros are placed so that nothing else is touched: a rotary part of P dimensions padded to P' keeps its pairs
(i, i + P/2) as (i, i + P'/2), so that one table of frequencies, padded too, serves queries and keys.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hylo_megatron.config import Geometry
from hylo_megatron.errors import HyLoError


def pad(x: Tensor, dim: int, size: int) -> Tensor:
    """``x`` with zeros behind it in ``dim``."""
    missing = size - x.shape[dim]
    return x if not missing else F.pad(x, [0, 0] * (x.dim() - 1 - dim % x.dim()) + [0, missing])


def spread(x: Tensor, dim: int, size: int) -> Tensor:
    """Both halves of a rotary ``dim`` padded to halves of ``size``."""
    return torch.cat([pad(half, dim, size // 2) for half in x.chunk(2, dim)], dim)


@dataclass(frozen=True)
class Padding:
    """From trained to served geometry, for one kind of tensor each: ``[rows, columns]``, heads in rows."""

    trained: Geometry
    served: Geometry
    heads: int

    def query(self, rows: Tensor) -> Tensor:
        t, s = self.trained.mla, self.served.mla
        rows = rows.unflatten(0, (-1, t.qk_nope_head_dim + t.qk_rope_head_dim))
        nope, rope = rows.split([t.qk_nope_head_dim, t.qk_rope_head_dim], 1)
        return torch.cat([pad(nope, 1, s.qk_nope_head_dim), spread(rope, 1, s.qk_rope_head_dim)], 1).flatten(0, 1)

    def latent(self, rows: Tensor) -> Tensor:
        t, s = self.trained.mla, self.served.mla
        latent, rope = rows.split([t.kv_lora_rank, t.qk_rope_head_dim])
        return torch.cat([pad(latent, 0, s.kv_lora_rank), spread(rope, 0, s.qk_rope_head_dim)])

    def key_value(self, rows: Tensor) -> Tensor:
        t, s = self.trained.mla, self.served.mla
        rows = rows.unflatten(0, (self.heads, t.qk_nope_head_dim + t.v_head_dim))
        nope, value = rows.split([t.qk_nope_head_dim, t.v_head_dim], 1)
        rows = torch.cat([pad(nope, 1, s.qk_nope_head_dim), pad(value, 1, s.v_head_dim)], 1).flatten(0, 1)
        return pad(rows, 1, s.kv_lora_rank)

    def value_heads(self, x: Tensor) -> Tensor:
        """One entry a value head: each of those that it was split into gets it."""
        return x.repeat_interleave(self.served.gdn.num_value_heads // self.trained.gdn.num_value_heads, 0)


# What follows model.layers.N: (the engine's name if it differs, its shard, Padding's method)
_SAME = (None, None, None)
RULES = {
    "mlp.gate_proj.weight": ("mlp.gate_up_proj.weight", 0, None),
    "mlp.up_proj.weight": ("mlp.gate_up_proj.weight", 1, None),
    "mlp.down_proj.weight": _SAME,
    "input_layernorm.weight": _SAME,
    "post_attention_layernorm.weight": _SAME,
    "self_attn.q_proj.weight": (None, None, "query"),
    "self_attn.q_a_proj.weight": _SAME,
    "self_attn.q_b_proj.weight": (None, None, "query"),
    "self_attn.kv_a_proj_with_mqa.weight": (None, None, "latent"),
    "self_attn.kv_b_proj.weight": (None, None, "key_value"),
    "self_attn.o_proj.weight": _SAME,
    "self_attn.q_norm.weight": _SAME,
    "self_attn.k_norm.weight": _SAME,
    # Gated DeltaNet
    "mixer.q_proj.weight": ("mixer.in_proj_qkvz.weight", 0, None),
    "mixer.k_proj.weight": ("mixer.in_proj_qkvz.weight", 1, None),
    "mixer.v_proj.weight": ("mixer.in_proj_qkvz.weight", 2, None),
    "mixer.g_proj.weight": ("mixer.in_proj_qkvz.weight", 3, None),
    "mixer.b_proj.weight": ("mixer.in_proj_ba.weight", 0, "value_heads"),
    "mixer.a_proj.weight": ("mixer.in_proj_ba.weight", 1, "value_heads"),
    "mixer.dt_bias": (None, None, "value_heads"),
    "mixer.A_log": (None, None, "value_heads"),
    "mixer.o_norm.weight": ("mixer.norm.weight", None, None),
    "mixer.o_proj.weight": ("mixer.out_proj.weight", None, None),
    # the convolution's three parts become one
    "mixer.q_conv1d.weight": ("mixer.conv1d.weight", "q", None),
    "mixer.k_conv1d.weight": ("mixer.conv1d.weight", "k", None),
    "mixer.v_conv1d.weight": ("mixer.conv1d.weight", "v", None),
}
MAMBA2_RULES = {
    name: rule for name, rule in RULES.items() if not name.startswith("mixer.")
} | {
    "mixer.A_log": ("mixer.A", None, None),
    **{f"mixer.{name}": _SAME for name in ("in_proj.weight", "conv1d.weight", "conv1d.bias", "D", "dt_bias",
                                           "norm.weight", "out_proj.weight")},
}  # fmt: skip
TOP = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")


def served_weights(
    weights: Iterable[tuple[str, Tensor]], padding: Padding, linear: str
) -> Iterator[tuple[str, Tensor, int | None]]:
    """``(the engine's name, tensor, shard)`` for each ``(exported name, tensor)``. Raises ``HyLoError`` for names that
    it does not know, and at the end for missing parts of a parameter that is made of several."""
    rules, merged = MAMBA2_RULES if linear == "mamba2" else RULES, {}
    for name, tensor in weights:
        if name in TOP:
            yield name, tensor, None
            continue
        prefix, rest = _parts(name)
        if rest not in rules:
            raise HyLoError(
                f"{name}: the engine has no place for it; export the folder with convert_megatron_to_hf.py"
            )
        target, shard, method = rules[rest]
        if method:
            tensor = getattr(padding, method)(tensor)
        if shard is None:
            yield f"{prefix}{target or rest}", tensor, None
            continue
        parts = merged.setdefault((prefix, target), {})
        parts[shard] = tensor if isinstance(shard, str) else None
        if isinstance(shard, int):
            yield f"{prefix}{target}", tensor, shard
        elif len(parts) == 3:
            yield f"{prefix}{target}", torch.cat([parts[part] for part in "qkv"]), None
    _all_parts(merged, rules)


def _all_parts(merged: dict, rules: dict) -> None:
    """The engine takes a merged parameter for loaded when one part came; the others would hold what memory held."""
    for (prefix, target), parts in merged.items():
        for rest, (name, shard, _) in rules.items():
            if name == target and shard not in parts:
                raise HyLoError(f"{prefix}{rest} is missing from the folder: export it again")


def _parts(name: str) -> tuple[str, str]:
    """``model.layers.N.`` and the rest."""
    pieces = name.split(".", 3)
    return (".".join(pieces[:3]) + ".", pieces[3]) if len(pieces) == 4 else ("", name)
