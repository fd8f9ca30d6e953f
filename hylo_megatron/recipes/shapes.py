"""Shapes of the published models, to plan and to measure trainings without their weights. No torch in here."""

from hylo_megatron.config import Architecture, Plan
from hylo_megatron.config.student import student_architecture
from hylo_megatron.errors import HyLoError
from hylo_megatron.recipes.published import BASES, TOKENS, published
from hylo_megatron.recipes.stage import Recipe, Stage

# The shape of each recipe's base model.
BASE_OF = {name: name for name in (*BASES, "smollm2")} | {"smollm2-window": "smollm2"}
RECIPES = tuple(BASE_OF)
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192}  # fmt: skip
_LLAMA = dict(model_type="llama", vocab_size=128256, rms_norm_eps=1e-5, max_position_embeddings=131072)
_QWEN = dict(model_type="qwen3", vocab_size=151936, rms_norm_eps=1e-6, max_position_embeddings=40960, qk_norm=True,
             rope_parameters={"rope_type": "default", "rope_theta": 1e6})  # fmt: skip


def _shape(family: dict, layers: int, sizes: tuple[int, int, int, int, int], tied: bool, **changes) -> Architecture:
    """Return a Transformer. ``sizes``: hidden, MLP, heads, key-value heads, head dimension."""
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    values = family | dict(zip(names, sizes, strict=True)) | changes
    return Architecture(plan=Plan.transformer(layers), tie_word_embeddings=tied, **values)


SHAPES = {
    "smollm2": _shape(_LLAMA, 30, (576, 1536, 9, 3, 64), True, vocab_size=49152, max_position_embeddings=8192,
                      rope_parameters={"rope_type": "default", "rope_theta": 1e5}),
    "llama1b": _shape(_LLAMA, 16, (2048, 8192, 32, 8, 64), True, rope_parameters=_LLAMA3 | {"factor": 32.0}),
    "llama3b": _shape(_LLAMA, 28, (3072, 8192, 24, 8, 128), True, rope_parameters=_LLAMA3 | {"factor": 32.0}),
    "llama8b": _shape(_LLAMA, 32, (4096, 14336, 32, 8, 128), False, rope_parameters=_LLAMA3 | {"factor": 8.0}),
    "llama70b": _shape(_LLAMA, 80, (8192, 28672, 64, 8, 128), False, rope_parameters=_LLAMA3 | {"factor": 8.0}),
    "qwen1p7b": _shape(_QWEN, 28, (2048, 6144, 16, 8, 128), True),
    "qwen8b": _shape(_QWEN, 36, (4096, 12288, 32, 8, 128), False),
    "qwen32b": _shape(_QWEN, 64, (5120, 25600, 64, 8, 128), False),
}  # fmt: skip


def shape(name: str) -> Architecture:
    """Return the Transformer of that name. Raises ``HyLoError`` for an unknown one."""
    if name not in SHAPES:
        raise HyLoError(f"shape {name!r}: expected one of {', '.join(SHAPES)}")
    return SHAPES[name]


def recipe_named(name: str, plan: str | None = None, linear: str | None = None, tokens: int | None = None) -> Recipe:
    """Return the recipe of that name. Raises ``HyLoError`` for an unknown one.

    ``tokens``: those of a whole published run (default: the paper's). The SmolLM2 recipes have their own.
    ``smollm2`` is the one without windows, ``smollm2-window`` the default of ``hylo recipe`` on GPUs.
    """
    if name in BASES:
        return published(name, plan, linear, tokens or TOKENS)
    if name not in RECIPES:
        raise HyLoError(f"recipe {name!r}: expected one of {', '.join(RECIPES)}")
    from hylo_megatron.recipes.smollm2 import smollm2_gpu, smollm2_gpu_window

    return (smollm2_gpu_window if name == "smollm2-window" else smollm2_gpu)(plan, linear)


def stage_named(recipe: Recipe, name: str) -> Stage:
    """Return that stage of ``recipe``. Raises ``HyLoError`` for an unknown one."""
    stages = {stage.name: stage for stage in recipe.stages}
    if name not in stages:
        raise HyLoError(f"stage {name!r}: the recipe {recipe.name} has {', '.join(stages)}")
    return stages[name]


def student_shape(recipe: Recipe, base: Architecture) -> Architecture:
    """Return the student that ``recipe`` makes of ``base``."""
    plan = Plan.parse(base.num_layers, recipe.plan, recipe.linear)
    qk_norm = recipe.init == "svd" and base.qk_norm
    return student_architecture(base, plan, recipe.geometry, qk_norm=qk_norm, **recipe.settings)
