"""What a hybrid does with positions beside ``rope_parameters``: settings that each layer's code reads. No torch here.

``mla_rope``: MLA layers rotate the rotary part of queries and keys. Without it (NoPE) the part stays, unrotated.
``linear_rope``: linear layers rotate their queries and keys as the base model's attention does.
``log_scale``: MLA layers multiply the query at position t by ``log(max(t, length) + base) / log(length + base)``.
With length 0 this is the scale of HypeNet (arXiv 2601.22156), which grows from the first token on. With a trained
length nothing changes before that length, and with base 0 the scale beyond it is ``log_length(t)``.
``window``: beside each linear block stands softmax attention with the base model's own weights, over the last ``size``
tokens (the current one is the last) and the first ``sinks`` tokens of the text. Both outputs are added. The distance
to a sink counts as at most ``size + sinks - 1``. With ``mla`` a window stands beside each MLA layer too.
"""

import argparse
import math
from dataclasses import replace
from typing import Annotated, Literal, NotRequired

from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from hylo_megatron.errors import HyLoError
from hylo_megatron.flags import short
from hylo_megatron.json_file import AtLeastZero, Count
from hylo_megatron.mixers import MIXERS

WIDEST_WINDOW, MOST_SINKS = 8192, 64
# Of ``Architecture``, with their defaults.
FIELDS = {"mla_rope": True, "linear_rope": False, "log_scale": None, "window": None}


class LogScale(TypedDict):
    __pydantic_config__ = ConfigDict(extra="forbid")

    base: AtLeastZero
    length: Count


class Window(TypedDict):
    __pydantic_config__ = ConfigDict(extra="forbid")

    size: Annotated[int, Field(ge=1, le=WIDEST_WINDOW)]
    sinks: Annotated[int, Field(ge=0, le=MOST_SINKS)]
    mla: NotRequired[Literal[True]]  # earlier versions read files without it


def has_window(window: Window | None, kind: str) -> bool:
    """Return whether a window stands beside layers of ``kind`` in a model whose setting is ``window``."""
    return bool(window) and (MIXERS[kind].linear or (kind == "mla" and "mla" in window))


def window_rows(window: Window | None) -> int:
    """Return how many tokens' keys and values the window of one layer keeps."""
    return window["size"] + window["sinks"] if window else 0


def log_scale(text: str) -> LogScale | dict:
    """Return the value of a flag: ``BASE`` or ``BASE,LENGTH``; an empty dictionary for ``off``."""
    if text == "off":
        return {}
    base, *length = text.split(",")
    try:
        found = LogScale(base=float(base), length=int(*length or (0,)))
    except (ValueError, TypeError):
        found = None
    if found is None or not _computable(found):
        raise argparse.ArgumentTypeError(
            f"{short(text)}: expected off, or BASE[,LENGTH] with numbers of 0 or more whose sum is above 1,"
            " such as 600 or 600,32768"
        )
    return found


def window(text: str) -> Window | dict:
    """Return the value of a flag: ``SIZE``, ``SIZE+SINKS``, either with ``:all``; an empty dictionary for ``off``."""
    if text == "off":
        return {}
    sizes = text.removesuffix(":all")
    parts = sizes.split("+") if "+" in sizes else [sizes, "4"]
    if len(parts) == 2 and all(part.isdecimal() and part.isascii() and len(part) < 9 for part in parts):
        found = Window(size=int(parts[0]), sinks=int(parts[1]))
        if 1 <= found["size"] <= WIDEST_WINDOW and found["sinks"] <= MOST_SINKS:
            return found if sizes == text else found | {"mla": True}
    raise argparse.ArgumentTypeError(
        f"{short(text)}: expected off, or SIZE[+SINKS] with 1 to {WIDEST_WINDOW} last tokens and at most {MOST_SINKS}"
        " first ones, such as 256+4; with :all behind it, beside MLA layers too"
    )


def window_named(value: object) -> Window | None:
    """Return the window of a recipe, which is a flag's text; None for ``off``. Raises ``HyLoError``."""
    try:
        return window(str(value or "off")) or None
    except argparse.ArgumentTypeError as error:
        raise HyLoError(f"window {error}") from None


def misfit(arch) -> str | None:
    """Return which setting of an ``Architecture`` its layers cannot follow, or None."""
    for name in ("mla_rope", "log_scale"):
        if getattr(arch, name) != FIELDS[name] and "mla" not in arch.plan:
            return f"{name} is {getattr(arch, name)}, but the plan has no mla layers"
    if arch.linear_rope:
        widths = [rotary_width(kind, arch.geometry) for kind in dict.fromkeys(arch.plan) if MIXERS[kind].linear]
        if not all(widths):
            return "linear_rope is True, but the plan has linear layers without queries and keys that can rotate"
        if not widths:
            return "linear_rope is True, but the plan has no linear layers"
        if any(width % 2 for width in widths):
            return f"linear_rope is True, but linear layers have heads of {widths}, expected even numbers"
    if arch.window and "mla" in arch.window and "mla" not in arch.plan:
        return f"window is {arch.window}, but the plan has no mla layers"
    if arch.window and not any(has_window(arch.window, kind) for kind in arch.plan):
        return f"window is {arch.window}, but the plan has no linear layers"
    if arch.log_scale and not _computable(arch.log_scale):
        return f"log_scale is {arch.log_scale}, expected numbers of 0 or more whose sum is above 1"
    return None


def rotary_width(kind: str, geometry) -> int:
    """Return the head size of a linear mixer's queries and keys, 0 where they cannot rotate."""
    entry = MIXERS[kind]
    return getattr(entry.dimensions(geometry), entry.rotary) if entry.rotary else 0


def _computable(scale: LogScale) -> bool:
    base, length = scale["base"], scale["length"]
    return base >= 0 and length >= 0 and 1 < base + length < math.inf


def switch(text: str) -> bool:
    """Return the value of a flag that takes ``on`` or ``off``."""
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"{short(text)}: expected on or off")
    return text == "on"


def add_flags(add, prefix: str = "--", default: str | None = None) -> None:
    """Add a flag for each setting. A flag that is not given leaves the setting as it is, which ``default`` says."""
    add(flag("mla_rope", prefix), type=switch, metavar="on|off",
        help="off: MLA layers do not rotate queries and keys (NoPE); best from the start of a distillation stage on"
        f" (default: {default or 'on'})")  # fmt: skip
    add(flag("linear_rope", prefix), type=switch, metavar="on|off",
        help="on: linear layers rotate queries and keys behind the convolution, as the base model's attention does"
        f" (default: {default or 'off'})")  # fmt: skip
    add_log_scale(add, prefix, default)


def add_window(add) -> None:
    add("--window", type=window, metavar="SIZE[+SINKS][:all]|off",
        help="beside each linear block, the base model's own attention over the last SIZE tokens and the first SINKS;"
        " with :all beside each MLA layer too (default: off; SINKS: 4)")  # fmt: skip


def add_log_scale(add, prefix: str = "--", default: str | None = None) -> None:
    add(flag("log_scale", prefix), type=log_scale, metavar="BASE[,LENGTH]|off",
        help="multiply MLA's queries at position t by log(max(t, LENGTH) + BASE) / log(LENGTH + BASE); LENGTH: 0, or"
        f" the trained length, before which nothing changes (default: {default or 'off'})")  # fmt: skip


def flag(name: str, prefix: str = "--") -> str:
    return prefix + name.replace("_", "-")


def flags(stage, prefix: str = "--") -> dict[str, str]:
    """Return the flags for the settings that ``stage`` has: switches are booleans, a log scale is a flag's text."""
    found = {name: getattr(stage, name, None) for name in FIELDS}
    text = {True: "on", False: "off"}
    return {flag(name, prefix): text.get(value, value) for name, value in found.items() if value is not None}


def given(values: argparse.Namespace, prefix: str = "") -> dict:
    """Return the settings whose flags were given, as fields of ``Architecture``."""
    found = {name: getattr(values, prefix + name, None) for name in FIELDS}
    return {name: FIELDS[name] if value == {} else value for name, value in found.items() if value is not None}


def changed(arch, settings: dict, where: str, prefix: str = "--"):
    """Return the architecture with other settings. Raises ``HyLoError`` if they do not fit ``where``'s layers."""
    arch = replace(arch, **settings)
    if settings and (reason := misfit(arch)):
        given_flags = ", ".join(flag(name, prefix) for name in settings)
        raise HyLoError(f"{where}: {reason}; leave out {given_flags}, or choose another model")
    return arch
