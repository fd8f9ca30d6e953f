"""Layer plans: which base layer becomes which mixer.

A plan is a tuple with one of ``attention``, ``mla``, ``gdn``, ``mamba2`` per base layer. Megatron's ``HybridModel``
takes a string instead, two symbols a layer (mixer, MLP) and ``|`` between pipeline stages; it is made here.
"""

import re

from hylo_megatron.errors import HyLoError
from hylo_megatron.mixers import LINEAR, MIXERS

_LINEAR_NAMES = {short: name for name in LINEAR for short in (MIXERS[name].short, *MIXERS[name].aliases)}

_NUMBER = "([0-9]{1,6})"

# Where the method's paper puts its MLA layers (hybrids named KMLA(L-K)X): by (number of layers, number of MLA layers).
PUBLISHED_MLA_LAYERS = {
    (16, 4): (1, 5, 10, 14),
    (28, 6): (0, 5, 10, 16, 21, 26),
    (28, 7): (1, 5, 9, 13, 17, 21, 25),
    (30, 3): (4, 14, 24),
}


def uniform_layers(num_layers: int, count: int) -> tuple[int, ...]:
    """``count`` layers spread evenly over ``num_layers``, each in the middle of its stretch."""
    return tuple(int((i + 0.5) * num_layers / count) for i in range(count))


def _mla_layers(text: str, num_layers: int) -> tuple[int, ...]:
    if text in ("all", "none"):
        return tuple(range(num_layers)) if text == "all" else ()
    if match := re.fullmatch(f"uniform:{_NUMBER}", text):
        count = int(match[1])
        if count > num_layers:
            raise HyLoError(f"--mla-layers {text}: the model has only {num_layers} layers")
        return uniform_layers(num_layers, count)
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(_NUMBER, part) for part in parts):
        raise HyLoError(
            f"--mla-layers {_shown(text)}: expected layer numbers such as 1,5,10,14, or uniform:K, all, none"
        )
    layers = tuple(map(int, parts))
    twice = sorted({layer for layer in layers if layers.count(layer) > 1})
    if bad := [layer for layer in layers if layer >= num_layers] or twice:
        raise HyLoError(
            f"--mla-layers {_shown(text)}: numbers must differ and lie in 0..{num_layers - 1}; got {_shown(bad)}"
        )
    return layers


def _shown(value: object, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."


def parse_plan(num_layers: int, mla_layers: str, linear: str | None = None) -> tuple[str, ...]:
    """Plan from ``1,5,10,14`` | ``uniform:K`` | ``all`` | ``none`` | a name such as ``4MLA12GDN``.

    ``linear``: what the other layers are, gdn if not said. A name says it itself; its MLA layers are the paper's
    where it lists that split, else uniform, and every other layer from 0 when half of them are MLA (as published).
    Raises ``HyLoError`` when it does not fit.
    """
    if match := re.fullmatch(f"{_NUMBER}MLA{_NUMBER}([A-Za-z][A-Za-z0-9]*)", mla_layers):
        count, rest, kind = int(match[1]), int(match[2]), match[3].upper()
        if kind not in _LINEAR_NAMES:
            known = " or ".join(MIXERS[name].short for name in LINEAR)
            raise HyLoError(f"plan {mla_layers}: unknown linear kind {match[3]!r}, expected {known}")
        if count + rest != num_layers:
            raise HyLoError(f"plan {mla_layers} has {count + rest} layers; the base model has {num_layers}")
        if linear not in (None, _LINEAR_NAMES[kind]):
            raise HyLoError(f"plan {mla_layers} and --linear {linear} say different things: leave one out")
        linear = _LINEAR_NAMES[kind]
        if 2 * count == num_layers:
            layers = tuple(range(0, num_layers, 2))
        else:
            layers = PUBLISHED_MLA_LAYERS.get((num_layers, count)) or uniform_layers(num_layers, count)
    else:
        layers = _mla_layers(mla_layers, num_layers)
    linear = linear or LINEAR[0]
    if linear not in LINEAR:
        raise HyLoError(f"--linear {linear!r}: expected one of {', '.join(LINEAR)}")
    return tuple("mla" if i in layers else linear for i in range(num_layers))


def plan_name(plan: tuple[str, ...]) -> str:
    """``4MLA12GDN`` for a hybrid, ``30ATT`` for a Transformer."""
    return "".join(f"{plan.count(name)}{entry.short}" for name, entry in MIXERS.items() if name in plan)


def megatron_pattern(plan: tuple[str, ...], pipeline_stages: int = 1) -> str:
    """``HybridModel``'s pattern, its pipes made for the pipeline size at hand.

    A pattern with pipes at pipeline size 1 would silently build only its first segment, so they are never stored.
    Earlier stages get the odd layers, since the last one also has the head and the loss.
    """
    if pipeline_stages > len(plan):
        raise HyLoError(
            f"--pipeline-model-parallel-size {pipeline_stages}: the model has {len(plan)} layers; at most that many"
        )
    symbols = [MIXERS[kind].symbol + "-" for kind in plan]
    base, extra = divmod(len(plan), pipeline_stages)
    stages, start = [], 0
    for stage in range(pipeline_stages):
        size = base + (stage < extra)
        stages.append("".join(symbols[start : start + size]))
        start += size
    return "|".join(stages)
