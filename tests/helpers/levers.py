"""Toy recipes that together use every lever of docs/recipe.md, and what no recipe of a list uses."""

from collections.abc import Iterable
from dataclasses import MISSING, fields, replace

from helpers.recipes import toy_recipe

from hylo_megatron.recipes.stage import Recipe

SPOILED = {  # steps of a stage whose losses are multiplied, so that the stage's guard fires
    "late": {13: 1000.0},
    "reverse": {3: float("nan")},
    "jensen": {4: float("nan")},
    "last": {5: float("nan")},
}
KILLED = {"reverse": 4, "jensen": 5}  # the step of a stage after which its process is killed
LATENT = {"plan": "0,2,4", "geometry": "native:88+8"}  # 3 x (88 + 8) values a token, as 2 x (128 + 16) of "native"


def lever_names(kind: type) -> list[str]:
    """Return the fields of ``Stage`` or ``Recipe`` that are levers."""
    return [each.name for each in fields(kind) if each.metadata.get("lever")]


def every_lever() -> Recipe:
    """Return a hybrid's recipe of five stages; each of the four guards has a stage that ``SPOILED`` fires it in."""
    toy = toy_recipe()
    ild = replace(toy.stages[0], steps=4, global_batch=4)
    late = replace(
        ild, name="late", kind="distill", seq_length=128, global_batch=2, steps=14, train="all", lr=6e-4,
        min_lr=5e-5, warmup=0.1, copied_lr_mult=0.3, decay_lr_mult=2.0, kl_weight=0.6, ce_weight=0.4, ce_from=1 / 7,
        hidden_weight=0.5, hidden_layers_weight=0.1, spike_factor=2.5, burst_factor=5.0,
        mix=(("text", 0.6), ("sampled", 0.4)),
    )  # fmt: skip
    reverse = replace(
        late, name="reverse", steps=6, loss="reverse-kl", hidden_layers_weight=0.0, mla_rope=False,
        initial_states="random", on_spike="skip", mix=(("text", 1.0),), on_policy=0.25,
    )  # fmt: skip
    jensen = replace(
        reverse, name="jensen", seq_length=512, loss="jsd", jsd_beta=0.3, log_scale="600,512", on_spike="rollback",
        initial_states="carried", answer_weight=0.1, teacher_length=384, ce_beyond=0.5, rope={"rope_theta": 5e4},
        recompute=4, on_policy=0.0, mix=(("long", 0.4), ("chat", 0.1), ("retrieval", 0.5)),
    )  # fmt: skip
    last = replace(
        jensen, name="last", loss="kl", jsd_beta=0.5, initial_states="zero", on_spike="stop", recompute=0,
        mix=(("text", 1.0),),
    )  # fmt: skip
    stages = (ild, late, reverse, jensen, last)
    linear = dict(linear="gdn", linear_rope=True, window="48+4:all", init="attention")
    return replace(toy, name="levers", layers=5, stages=stages, **linear, **LATENT)


def control() -> Recipe:
    """Return the control of ``every_lever``, with two of its stages and no mix."""
    recipe = every_lever().as_control()
    stages = [replace(recipe.stages[at], seq_length=64, steps=3, on_spike="warn", mix=()) for at in (0, 2)]
    return replace(recipe, stages=(stages[0], replace(stages[1], teacher_length=48)))


def recipes() -> tuple[Recipe, ...]:
    return every_lever(), control()


def _unused(kind: type, items: tuple, usual: dict[str, object]) -> set[str]:
    """Return the levers of ``kind`` that have no other value than the usual one, or than their default."""
    found = set()
    for lever in (each for each in fields(kind) if each.name in lever_names(kind)):
        values = {repr(getattr(item, lever.name)) for item in items}
        plain = usual.get(lever.name, lever.default)
        if len(values) < 2 if plain is MISSING else values <= {repr(plain)}:
            found.add(lever.name)
    return found


def unused(found: Iterable[Recipe]) -> set[str]:
    """Return the levers of ``Stage`` and ``Recipe`` that none of the recipes uses."""
    found = tuple(found)
    stages = tuple(stage for recipe in found for stage in recipe.stages)
    of_recipes = _unused(type(found[0]), found, {"plan": toy_recipe().plan})
    return of_recipes | _unused(type(stages[0]), stages, {})
