"""``Plan``: which base layer becomes which mixer.

Files list a plan (``hylo.json``: "plan"; ``config.json``: "mixers"). Users name it (4MLA12GDN) or give the numbers of
its MLA layers. Megatron's ``HybridModel`` takes a pattern: two symbols a layer (mixer, MLP) and ``|`` between pipeline
stages.
"""

import re
from typing import Literal, NotRequired

from pydantic import ConfigDict
from typing_extensions import TypedDict

from hylo_megatron.errors import HyLoError
from hylo_megatron.json_file import Count, Size, read_json, shown
from hylo_megatron.mixers import LINEAR, MIXERS

_LINEAR_NAMES = {short: name for name in LINEAR for short in (MIXERS[name].short, *MIXERS[name].aliases)}
_NUMBER = "([0-9]{1,6})"
_PLAN_NAME = re.compile(f"{_NUMBER}MLA{_NUMBER}([A-Za-z][A-Za-z0-9]*)")

# MLA layers by (number of layers, number of MLA layers): the method paper's; that of 30 layers, SmolLM2's, is ours.
PUBLISHED_MLA_LAYERS = {
    (16, 4): (1, 5, 10, 14),
    (28, 6): (0, 5, 10, 16, 21, 26),
    (28, 7): (1, 5, 9, 13, 17, 21, 25),
    (30, 3): (4, 14, 24),
}


class Plan(tuple[str, ...]):
    """The mixer of every base layer, by its name in the registry: a tuple of ``attention``, ``mla``, ``gdn``, ..."""

    __slots__ = ()

    @classmethod
    def parse(
        cls,
        num_layers: int,
        text: str,
        linear: str | None = None,
        geometry: str | None = None,
        asked: str = "plan",
    ) -> "Plan":
        """Read ``1,5,10,14`` | ``uniform:K`` | ``all`` | ``none`` | a plan's name such as ``4MLA12GDN`` | a file
        ``*.json`` of ``hylo select-layers``.

        ``linear`` is the mixer of the layers that are not MLA (default: gdn). A plan's name says which mixer that is.
        ``geometry``: the name of the geometry that the layers get. A file that names another one is refused.
        ``asked``: the flag, or the variable with its ``=``, that gave ``text``; messages name it.
        A name puts the MLA layers where the paper lists that split; on every other layer from 0 when half of the
        layers are MLA; else uniformly. Raises ``HyLoError`` for what does not fit.
        """
        if match := _PLAN_NAME.fullmatch(text):
            layers, linear = _named_layers(match, num_layers, linear, asked)
        elif text.endswith(".json"):
            layers, linear = _layers_of_file(text, num_layers, linear, geometry, asked)
        else:
            layers = _mla_layers(text, num_layers, asked)
        linear = linear or LINEAR[0]
        if linear not in LINEAR:
            raise HyLoError(f"{_linear(asked, linear)}: expected one of {', '.join(LINEAR)}")
        return cls("mla" if layer in layers else linear for layer in range(num_layers))

    @classmethod
    def transformer(cls, num_layers: int) -> "Plan":
        """The plan of a base model."""
        return cls(("attention",) * num_layers)

    @property
    def name(self) -> str:
        """``4MLA12GDN`` for a hybrid, ``30ATT`` for a Transformer."""
        return "".join(f"{self.count(kind)}{entry.short}" for kind, entry in MIXERS.items() if kind in self)

    @property
    def is_hybrid(self) -> bool:
        return any(kind != "attention" for kind in self)

    @property
    def linear_kind(self) -> str:
        """The linear mixer of the plan; the registry's last where the plan has several."""
        return next((kind for kind in reversed(LINEAR) if kind in self), LINEAR[0])

    def stages(self, pipeline_stages: int) -> list[range]:
        """Layers of each pipeline stage. Earlier stages get the odd layers: the last one also has head and loss."""
        if pipeline_stages > len(self):
            raise HyLoError(
                f"--pipeline-model-parallel-size {pipeline_stages}: expected at most {len(self)},"
                f" since the model has {len(self)} layers"
            )
        base, extra = divmod(len(self), pipeline_stages)
        starts = [stage * base + min(stage, extra) for stage in range(pipeline_stages + 1)]
        return [range(start, stop) for start, stop in zip(starts, starts[1:], strict=False)]

    def pattern(self, pipeline_stages: int = 1) -> str:
        """Pattern of Megatron's ``HybridModel`` for a number of pipeline stages.

        A pattern is never stored: at pipeline size 1 Megatron would build only the layers before the first ``|``, and
        say nothing.
        """
        symbols = [MIXERS[kind].symbol + "-" for kind in self]
        return "|".join("".join(symbols[layer] for layer in layers) for layers in self.stages(pipeline_stages))


def linear_of_plan(text: str) -> str | None:
    """The linear mixer that a plan's name such as ``4MLA12M2`` or file states; None for any other text.

    Raises ``HyLoError`` for a file that is no plan.
    """
    if text.endswith(".json"):
        return _read(text)["linear"]
    match = _PLAN_NAME.fullmatch(text)
    return _LINEAR_NAMES.get(match[3].upper()) if match else None


def geometry_of_plan(text: str) -> str | None:
    """The geometry that a plan's file names; None for a file without it, and for any other text."""
    return _read(text).get("geometry") if text.endswith(".json") else None


def uniform_layers(num_layers: int, count: int) -> tuple[int, ...]:
    """``count`` layers spread evenly over ``num_layers``, each in the middle of its share."""
    return tuple(int((i + 0.5) * num_layers / count) for i in range(count))


def _given(asked: str, text: str) -> str:
    """Return the plan as it was given: ``--plan 1,5`` or ``PLAN=1,5``."""
    return f"{asked}{'' if asked.endswith('=') else ' '}{shown(text)}"


def _linear(asked: str, linear: str) -> str:
    """Return the linear mixer as it was given beside the plan that ``asked`` gave."""
    return f"LINEAR={linear}" if asked.endswith("=") else f"--linear {linear}"


def _named_layers(match: re.Match, num_layers: int, linear: str | None, asked: str) -> tuple[tuple[int, ...], str]:
    """Return the MLA layers and the linear mixer of a plan's name."""
    plan, count, rest, kind = _given(asked, match[0]), int(match[1]), int(match[2]), match[3].upper()
    if kind not in _LINEAR_NAMES:
        known = " or ".join(MIXERS[name].short for name in LINEAR)
        raise HyLoError(f"{plan}: unknown linear kind {match[3]!r}, expected {known}")
    if count + rest != num_layers:
        raise HyLoError(f"{plan}: has {count + rest} layers, expected {num_layers} as the base model")
    if linear not in (None, _LINEAR_NAMES[kind]):
        raise HyLoError(f"{plan} and {_linear(asked, linear)} contradict each other: leave one out")
    if 2 * count == num_layers:
        layers = tuple(range(0, num_layers, 2))
    else:
        layers = PUBLISHED_MLA_LAYERS.get((num_layers, count)) or uniform_layers(num_layers, count)
    return layers, _LINEAR_NAMES[kind]


class _PlanFile(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")

    num_layers: Size
    mla_layers: list[Count]
    linear: Literal[LINEAR]
    geometry: NotRequired[str]


def _read(path: str) -> _PlanFile:
    return read_json(path, _PlanFile, "expected plan.json of hylo select-layers")


def _layers_of_file(
    path: str, num_layers: int, linear: str | None, geometry: str | None, asked: str
) -> tuple[tuple[int, ...], str]:
    """Return the MLA layers and the linear mixer of a file that ``hylo select-layers`` wrote."""
    found = _read(path)
    if found["num_layers"] != num_layers:
        raise HyLoError(f"{path}: num_layers is {found['num_layers']}, the base model has {num_layers}")
    if linear not in (None, found["linear"]):
        raise HyLoError(f"{path}: linear is {found['linear']}, but {_linear(asked, linear)} was given; leave it out")
    if geometry and (counted := found.get("geometry", geometry)) != geometry:
        raise HyLoError(
            f"{path}: geometry is {counted}, with which the cache was counted, but the layers get {geometry}; give"
            f" them {counted}, or run hylo select-layers with the --geometry that they get"
        )
    if wrong := [layer for layer in found["mla_layers"] if layer >= num_layers]:
        raise HyLoError(f"{path}: mla_layers has {wrong[0]}, expected numbers below {num_layers}")
    return tuple(found["mla_layers"]), found["linear"]


def _mla_layers(text: str, num_layers: int, asked: str) -> tuple[int, ...]:
    if text in ("all", "none"):
        return tuple(range(num_layers)) if text == "all" else ()
    if match := re.fullmatch(f"uniform:{_NUMBER}", text):
        count = int(match[1])
        if count > num_layers:
            raise HyLoError(f"{_given(asked, text)}: the model has only {num_layers} layers, expected at most as many")
        return uniform_layers(num_layers, count)
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(_NUMBER, part) for part in parts):
        raise HyLoError(
            f"{_given(asked, text)}: expected layer numbers such as 1,5,10,14, or uniform:K, all, none, a name such as"
            " 4MLA12GDN, or plan.json of hylo select-layers"
        )
    layers = tuple(map(int, parts))
    twice = sorted({layer for layer in layers if layers.count(layer) > 1})
    if bad := [layer for layer in layers if layer >= num_layers] or twice:
        raise HyLoError(f"{_given(asked, text)}: numbers must differ and lie in 0..{num_layers - 1}; got {shown(bad)}")
    return layers
