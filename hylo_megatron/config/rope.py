"""Rotary embeddings as transformers' dictionaries: the kinds that we compute and their fields. No torch in here."""

import math
from typing import NotRequired

from typing_extensions import TypedDict

from hylo_megatron.errors import HyLoError
from hylo_megatron.json_file import AtLeastZero, Positive, Size, check


class _Default(TypedDict):
    rope_type: str
    rope_theta: Positive


class _Linear(_Default):
    factor: Positive


class _Llama3(_Linear):
    low_freq_factor: Positive
    high_freq_factor: Positive
    original_max_position_embeddings: Size


class _YaRN(_Linear):
    original_max_position_embeddings: Size
    attention_factor: NotRequired[Positive | None]
    beta_fast: NotRequired[AtLeastZero | None]
    beta_slow: NotRequired[AtLeastZero | None]
    mscale: NotRequired[AtLeastZero | None]
    mscale_all_dim: NotRequired[AtLeastZero | None]
    truncate: NotRequired[bool | None]


KINDS = {"default": _Default, "linear": _Linear, "llama3": _Llama3, "yarn": _YaRN}
# Fields that transformers does not read: other names of the same settings, and notes of the file's authors.
_UNREAD = ("type", "finetuned", "original_max_position_embeddings")


def fix_original_length(rope: dict, max_positions: int) -> dict:
    """Return ``rope`` with the length that its scaling starts from, and with YaRN's factor, if these are left open.

    transformers would take the model's maximum length. We write that length down, because training on longer sequences
    raises the maximum, and the frequencies must not change.
    """
    kind = rope.get("rope_type", rope.get("type"))
    if kind not in ("llama3", "yarn"):
        return rope
    original = rope.get("original_max_position_embeddings", max_positions)
    rope = rope | {"original_max_position_embeddings": original}
    if kind == "yarn" and rope.get("factor", 0) is None and original:
        rope["factor"] = max_positions / original
    return rope


def checked_rope(rope: dict, max_positions: int, where: str) -> dict:
    """Return ``rope`` with its original length written out and with only the fields that its kind reads.

    Raises ``HyLoError`` for kinds that we do not compute, and for values that are missing, null, zero or unknown.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in KINDS:
        raise HyLoError(
            f"{where}: rope_type {kind!r} is not supported; expected one of {', '.join(KINDS)}"
            f" (rope parameters per layer type are not supported either)"
        )
    fields = KINDS[kind].__annotations__
    unknown = [key for key in rope if key not in fields and key not in _UNREAD]
    if rope.get("partial_rotary_factor") == 1:
        unknown.remove("partial_rotary_factor")
    if unknown:
        raise HyLoError(
            f"{where}: {unknown[0]} is not a field of rope_type {kind!r}; expected {', '.join(fields)}: remove it, or"
            " choose the rope_type that it belongs to"
        )
    rope = {"rope_type": kind} | fix_original_length(rope, max_positions)
    kept = check({key: rope[key] for key in rope if key in fields}, KINDS[kind], where)
    if kind == "llama3" and kept["high_freq_factor"] <= kept["low_freq_factor"]:
        raise HyLoError(f"{where}: high_freq_factor must be larger than low_freq_factor")
    return {key: rope[key] for key in kept}


def same_at_any_width(rope: dict, head_dim: int) -> dict:
    """Return ``rope`` such that a narrower rotary part has every n-th frequency of a head of ``head_dim``.

    Only YaRN needs a change. It rounds the ends of its ramp to whole pairs, and for an MLA layer, whose rotary part is
    narrower than the head, it would round to other frequencies. The result has the rounded ends and switches rounding
    off.
    """
    if rope["rope_type"] != "yarn" or not rope.get("truncate", True):
        return rope
    original, per_pair = rope["original_max_position_embeddings"], 2 * math.log(rope["rope_theta"]) / head_dim

    def end(beta: float) -> float:
        return math.log(original / (beta * 2 * math.pi)) / per_pair

    low, high = math.floor(end(rope.get("beta_fast") or 32)), math.ceil(end(rope.get("beta_slow") or 1))
    turns = [original / (2 * math.pi) * math.exp(-per_pair * pair) for pair in (max(low, 0), min(high, head_dim - 1))]
    return rope | {"beta_fast": turns[0], "beta_slow": turns[1], "truncate": False}
