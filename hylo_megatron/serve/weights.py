"""Tensors of an exported folder as the engine's parameters: a table of names, and the padding of geometry.py.

Zeros are placed so that nothing else is touched: a rotary part of P dimensions padded to P' keeps its pairs
(i, i + P/2) as (i, i + P'/2), so that one table of frequencies, padded too, serves queries and keys.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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


# What follows model.layers.N: (the engine's name if it differs, which part of it, Padding's method)
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
    "mixer.q_conv1d.weight": ("mixer.conv1d.weight", 0, None),
    "mixer.k_conv1d.weight": ("mixer.conv1d.weight", 1, None),
    "mixer.v_conv1d.weight": ("mixer.conv1d.weight", 2, None),
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
    """``(the engine's name, tensor, part)`` for each ``(exported name, tensor)``, where ``part`` says which one of a
    merged parameter it is. Raises ``HyLoError`` for names that it does not know."""
    rules = MAMBA2_RULES if linear == "mamba2" else RULES
    for name, tensor in weights:
        if name in TOP:
            yield name, tensor, None
            continue
        prefix, rest = _parts(name)
        if rest not in rules:
            raise HyLoError(
                f"{name}: the engine has no place for it; export the folder with convert_megatron_to_hf.py"
            )
        target, part, method = rules[rest]
        with fits(name, tensor):
            served = getattr(padding, method)(tensor) if method else tensor
        yield f"{prefix}{target or rest}", served, part


@contextmanager
def fits(name: str, tensor: Tensor) -> Iterator[None]:
    """Name the tensor when its shape is not the one that the model's sizes ask for."""
    try:
        yield
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = str(error).split("\n")[0] or "another shape is expected"
        raise HyLoError(
            f"{name}: a tensor of shape {list(tensor.shape)} does not fit the sizes in config.json and --hf-overrides"
            f" ({reason}); weights and sizes must be those of one export"
        ) from error


def check_parts(loaded: set[tuple[str, int | None]], linear: str) -> None:
    """Raise ``HyLoError`` for a merged parameter in ``loaded`` of which a part is missing."""
    rules = MAMBA2_RULES if linear == "mamba2" else RULES
    for prefix, target in sorted({_parts(name) for name, part in loaded if part is not None}):
        for rest, (name, part, _) in rules.items():
            if name == target and (prefix + target, part) not in loaded:
                raise HyLoError(f"{prefix}{rest} is missing from the folder: export it again")


def conv_loader(sizes: list[int], ranks: int, rank: int):
    """A loader of a convolution's weights, one part at a time. ``sizes``: the parts' channels on all ranks."""
    sizes = [size // ranks for size in sizes]

    def load(param: Tensor, loaded_weight: Tensor, part: int) -> None:  # vLLM's reload looks for these names
        target = param.data.narrow(0, sum(sizes[:part]), sizes[part])
        target.copy_(loaded_weight.narrow(0, rank * sizes[part], sizes[part]).view_as(target))

    return load


def _parts(name: str) -> tuple[str, str]:
    """``model.layers.N.`` and the rest."""
    pieces = name.split(".", 3)
    return (".".join(pieces[:3]) + ".", pieces[3]) if len(pieces) == 4 else ("", name)
