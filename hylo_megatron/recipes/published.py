"""The method paper's recipes (arXiv 2604.24715) for Llama-3.2-1B, Llama-3.2-3B and Qwen3-1.7B.

``run/examples.py`` runs them. The paper leaves some choices open, which we made: the short KL stage at 2K (the paper's
staged variant, which trains the mixers alone first), the shares of the KL stages in the tokens, the batches at 2K (as
many tokens as at 8K), weight decay, and the YaRN of Qwen's teacher at 64K, which is the student's.
"""

from dataclasses import dataclass, replace

from hylo_megatron.config.plan import linear_of_plan
from hylo_megatron.mixers import LINEAR
from hylo_megatron.recipes.stage import Evaluation, Recipe, Stage

TOKENS = 10_000_000_000


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base model's rows in the paper's tables. ``batches``: sequences per batch at 8K and at 64K."""

    name: str
    model_type: str
    layers: int
    hidden: int
    heads: int
    head_dim: int
    plan: str
    lr: float
    batches: dict[str, tuple[int, int]]
    window: int  # original context length, which YaRN extends
    stretches_teacher: bool = False
    kv_heads: int = 8


BASES = {
    "llama1b": Base(
        name="Llama-3.2-1B-Instruct", model_type="llama", layers=16, hidden=2048, heads=32, head_dim=64,
        plan="1,5,10,14", lr=6e-5, batches={"gdn": (32, 8), "mamba2": (32, 8)}, window=2048,
    ),
    "llama3b": Base(
        name="Llama-3.2-3B-Instruct", model_type="llama", layers=28, hidden=3072, heads=24, head_dim=128,
        plan="0,5,10,16,21,26", lr=4e-5, batches={"gdn": (16, 8), "mamba2": (16, 8)}, window=2048,
    ),
    "qwen1p7b": Base(
        name="Qwen3-1.7B", model_type="qwen3", layers=28, hidden=2048, heads=16, head_dim=128,
        plan="1,5,9,13,17,21,25", lr=6e-5, batches={"gdn": (16, 8), "mamba2": (32, 8)}, window=32768,
        stretches_teacher=True,
    ),
}  # fmt: skip


def yarn(length: int, window: int) -> dict | None:
    """Return the change of the rotary embedding for a context of ``length``; None inside the original window."""
    if length <= window:
        return None
    return {"rope_type": "yarn", "factor": length / window, "original_max_position_embeddings": window}


def sized(stage: Stage, tokens: float) -> Stage:
    return replace(stage, steps=max(1, round(tokens / (stage.global_batch * stage.seq_length))))


def stages(base: Base, linear: str, tokens: int) -> tuple[Stage, ...]:
    batch, batch_64k = base.batches.get(linear, base.batches[LINEAR[0]])  # the paper has batches for two linear kinds
    ild = Stage(
        name="ild", kind="ild", seq_length=2048, global_batch=4 * batch, micro_batch=4, steps=1, lr=2e-4, warmup=0.01,
        train="mixers", copied_lr_mult=1.0, decay_lr_mult=1.0,
    )  # fmt: skip
    distill = replace(ild, name="distill-2k", kind="distill", lr=base.lr, kl_weight=1.0, ce_weight=0.0)
    longer = replace(
        distill, name="distill-8k", seq_length=8192, global_batch=batch, micro_batch=1, train="all",
        rope=yarn(8192, base.window),
    )  # fmt: skip
    rope = yarn(65536, base.window)
    longest = replace(
        longer, name="distill-64k", seq_length=65536, global_batch=batch_64k, rope=rope,
        # sub-layers: all mixers and MLPs
        teacher_rope=rope if base.stretches_teacher else None, recompute=2 * base.layers,
    )  # fmt: skip
    shares = (0.20, 0.10, 0.30, 0.40)
    return tuple(
        sized(stage, share * tokens) for stage, share in zip((ild, distill, longer, longest), shares, strict=True)
    )


def published(name: str, plan: str | None = None, linear: str | None = None, tokens: int = TOKENS,
              seed: int = 1234, geometry: str = "published") -> Recipe:  # fmt: skip
    """Return the paper's recipe ``name``.

    ``plan``: another layer plan in place of the paper's first for this model. ``linear``: the mixer of its linear
    layers (default: the plan's, or gdn). ``geometry``: the paper's, initialised by SVD, or our ``native`` one,
    calibrated on text.
    """
    base, linear = BASES[name], linear or linear_of_plan(plan or "") or LINEAR[0]
    evaluation = Evaluation(
        context=2048, tokens=150_000, needle_lengths=(8192, 16384, 32768, 65536), needle_samples=4, needle_depths=5
    )
    return Recipe(
        name=name, plan=plan or base.plan, linear=linear, stages=stages(base, linear, tokens),
        calibration_tokens=32768, calibration_length=2048, evaluation=evaluation, layers=base.layers, save_every=100,
        seed=seed, geometry=geometry, init="svd" if geometry == "published" else "data",
    )  # fmt: skip
