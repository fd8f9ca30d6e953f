"""The student that gained most (docs/recipe.md): a window of the base model's attention beside every layer, and
positions in the linear layers instead of MLA.
"""

from dataclasses import replace

from hylo_megatron.config import Plan
from hylo_megatron.config.stages import stage_kind
from hylo_megatron.mixers import MIXERS
from hylo_megatron.recipes.stage import Recipe, Stage


def with_window(recipe: Recipe, window: str = "256+4:all") -> Recipe:
    """Return ``recipe`` with a window beside its layers, and RoPE in linear layers that can rotate.

    ``window``: as ``--window``; ``:all`` is left out where no layer is MLA.
    """
    plan = Plan.parse(recipe.layers, recipe.plan, recipe.linear)
    if "mla" not in plan:
        window = window.removesuffix(":all")
    return replace(recipe, name=f"{recipe.name}-window", window=window, linear_rope=rotates(recipe))


def rotates(recipe: Recipe) -> bool:
    """Return whether the recipe has linear layers, all with queries and keys that can rotate."""
    linear = [MIXERS[kind] for kind in Plan.parse(recipe.layers, recipe.plan, recipe.linear) if MIXERS[kind].linear]
    return bool(linear) and all(mixer.rotary for mixer in linear)


def first_distillation(recipe: Recipe) -> Stage:
    return next(stage for stage in recipe.stages if not stage_kind(stage.kind).layerwise)


def without_mla_positions(recipe: Recipe) -> Recipe:
    """Return ``recipe`` with MLA layers that lose their positions in the first distillation, and no stretched RoPE.

    A recipe whose linear layers have no positions stays as it is: its MLA layers keep theirs.
    """
    if not recipe.linear_rope:
        return recipe
    off = False if "mla" in Plan.parse(recipe.layers, recipe.plan, recipe.linear) else None
    first = first_distillation(recipe)  # later stages leave MLA as this one does
    stages = tuple(replace(s, rope=None, mla_rope=off if s is first else None) for s in recipe.stages)
    return replace(recipe, stages=stages)
