"""Stages, evaluations and recipes. A recipe is a list of stages.

Each stage after the first is a visible ``replace(...)`` of the previous one.
"""

import json
from dataclasses import asdict, dataclass, field, fields, replace
from math import ceil, gcd
from typing import Any

from hylo_megatron.config import Geometry, Plan, positions
from hylo_megatron.config.stages import stage_kind
from hylo_megatron.errors import HyLoError

LEVER = {"lever": True}  # metadata of the fields that docs/recipe.md lists and ``make recipe-test`` uses


def _lever(flag: str, default: Any, recorded: bool = False) -> Any:
    """Return a field that ``flag`` of the trainer sets. ``recorded``: ``recipe.json`` has its default, too."""
    return field(default=default, metadata={"flag": flag, "recorded": recorded, **LEVER})


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training of a recipe, on ``steps * global_batch * seq_length`` tokens.

    ``lr`` is the peak of a cosine schedule. ``mix`` has the shares of the packed data sets that ``run/datasets.py``
    names; without a mix the training text is read unchanged. ``rope`` and ``teacher_rope`` are changes of the rotary
    embeddings. ``mla_rope`` and ``log_scale`` (``config/positions.py``) change the student's architecture at the start
    of the stage. ``teacher_length`` is the teacher's own context; beyond it the loss is ``ce_beyond`` times the
    cross-entropy of the text. ``recompute`` is the number of sub-layers (mixers and MLPs) whose activations are
    recomputed; on GPUs that have the memory, a run recomputes fewer (``run/memory_need.py``).
    """

    name: str
    kind: str  # a name in config/stages.py
    seq_length: int = field(metadata=LEVER)
    global_batch: int = field(metadata=LEVER)
    steps: int = field(metadata=LEVER)
    lr: float = field(metadata=LEVER)
    min_lr: float = field(default=0.0, metadata=LEVER)
    warmup: float = field(default=0.04, metadata=LEVER)  # warm-up, as a share of the steps
    micro_batch: int = 1
    train: str = "all"  # "mixers": weights copied from the base model stay frozen
    copied_lr_mult: float = _lever("--hylo-copied-lr-mult", 0.2, recorded=True)
    decay_lr_mult: float = _lever("--hylo-decay-lr-mult", 5.0, recorded=True)
    kl_weight: float = _lever("--hylo-kl-weight", 1.0, recorded=True)
    ce_weight: float = _lever("--hylo-ce-weight", 0.0, recorded=True)
    weight_decay: float = 0.05
    mix: tuple[tuple[str, float], ...] = field(default=(), metadata=LEVER)
    rope: dict | None = None
    teacher_rope: dict | None = None
    mla_rope: bool | None = field(default=None, metadata=LEVER)  # None: as the previous stage left it
    log_scale: str | None = field(default=None, metadata=LEVER)  # BASE or BASE,LENGTH
    teacher_length: int | None = _lever("--hylo-teacher-length", None, recorded=True)
    ce_beyond: float = _lever("--hylo-ce-beyond-teacher", 1.0, recorded=True)
    answer_weight: float = _lever("--hylo-answer-weight", 0.0, recorded=True)
    recompute: int = 0
    # share of the plain text that the student of the stage's start writes (run/on_policy.py)
    on_policy: float = field(default=0.0, metadata=LEVER)
    # levers of later versions, which old recipe.json files do not have
    loss: str | None = _lever("--hylo-loss", None)
    jsd_beta: float = _lever("--hylo-jsd-beta", 0.5)
    ce_from: float = _lever("--hylo-ce-from", 0.0)
    hidden_weight: float = _lever("--hylo-hidden-weight", 0.0)
    hidden_layers_weight: float = _lever("--hylo-hidden-layers-weight", 0.0)
    initial_states: str = _lever("--hylo-initial-states", "zero")
    on_spike: str = _lever("--hylo-on-spike", "warn")
    spike_factor: float = _lever("--hylo-spike-factor", 3.0)
    burst_factor: float = _lever("--hylo-burst-factor", 10.0)

    @property
    def tokens(self) -> int:
        return self.steps * self.global_batch * self.seq_length

    def samples(self, share: float) -> int:
        """Return how many sequences (and a few more) this stage reads of a data set with ``share`` of the mix."""
        return ceil(1.02 * share * self.steps * self.global_batch) + 8

    def among(self, copies: int) -> "Stage":
        """Return the stage with the largest micro-batch that divides its own and each copy's share of the batch."""
        return replace(self, micro_batch=gcd(self.micro_batch, self.global_batch // copies))

    def levers(self) -> dict[str, str]:
        """Return the flag of each lever that is not at its default, by the lever's name."""
        flags = {each.name: each.metadata["flag"] for each in fields(self) if "flag" in each.metadata}
        defaults = {each.name: each.default for each in fields(self)}
        return {name: flag for name, flag in flags.items() if getattr(self, name) != defaults[name]}

    def to_dict(self) -> dict:
        """Return the fields, except later levers at their defaults, so that recipes of earlier versions stay equal."""
        later = {each.name for each in fields(self) if not each.metadata.get("recorded", True)}
        unused = later - self.levers().keys()
        unused |= {name for name in ("mla_rope", "log_scale") if getattr(self, name) is None}
        unused |= set() if self.on_policy else {"on_policy"}
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in unused}

    def flags(self) -> list[str]:
        """Return the flags of ``python -m hylo_megatron.train`` for this stage."""
        values = {
            "--hylo-stage": self.kind, "--hylo-train": self.train, "--seq-length": self.seq_length,
            "--micro-batch-size": self.micro_batch, "--global-batch-size": self.global_batch,
            "--train-iters": self.steps, "--lr": self.lr, "--min-lr": self.min_lr, "--lr-decay-style": "cosine",
            "--lr-warmup-fraction": self.warmup, "--weight-decay": self.weight_decay,
        }  # fmt: skip
        values |= {flag: getattr(self, name) for name, flag in self.levers().items()}
        if self.rope:
            values["--hylo-rope"] = json.dumps(self.rope)
        if self.teacher_rope:
            values["--hylo-teacher-rope"] = json.dumps(self.teacher_rope)
        values |= positions.flags(self, "--hylo-")
        if self.recompute:
            values |= {"--recompute-granularity": "full", "--recompute-method": "block",
                       "--recompute-num-layers": self.recompute}  # fmt: skip
        return [str(part) for pair in values.items() for part in pair]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The measurements after the last stage; after earlier stages only perplexity is measured.

    Lengths are in tokens.
    """

    context: int
    tokens: int
    needle_lengths: tuple[int, ...]
    needle_samples: int
    needle_depths: int
    long_context: int = 0  # 0: loss by position is not measured
    long_documents: int = 4


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run. Every number on which its result depends is here."""

    name: str
    plan: str = field(metadata=LEVER)
    linear: str | None
    stages: tuple[Stage, ...]
    calibration_tokens: int
    calibration_length: int
    evaluation: Evaluation
    layers: int = 30
    text: str = "small"  # the mix of hylo fetch-text
    geometry: str | Geometry = field(default="native", metadata=LEVER)
    # linear layers rotate queries and keys (config/positions.py)
    linear_rope: bool = field(default=False, metadata=LEVER)
    # SIZE+SINKS, of attention beside each linear layer (config/positions.py)
    window: str | None = field(default=None, metadata=LEVER)
    # "data", "attention", or "svd", the initialisation of the method's paper (hylo upcycle --init)
    init: str = field(default="data", metadata=LEVER)
    save_every: int = 20
    seed: int = 1234
    # the student is the base model itself; ``plan``, ``linear`` and ``geometry`` are unused
    control: bool = field(default=False, metadata=LEVER)

    def __post_init__(self):
        """Check the window. Read a plan's file once: a run that is continued has the layers with which it began."""
        if self.window is not None:
            object.__setattr__(self, "window", str(self.window) if positions.window_named(self.window) else None)
        if self.plan.endswith(".json"):
            geometry = self.geometry if isinstance(self.geometry, str) else "dimensions of the recipe's own"
            plan = Plan.parse(self.layers, self.plan, self.linear, geometry)
            layers = ",".join(str(number) for number, kind in enumerate(plan) if kind == "mla")
            object.__setattr__(self, "plan", layers or "none")
            object.__setattr__(self, "linear", plan.linear_kind)

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of ``config/positions.py`` that the student has from the start."""
        window = {"window": positions.window_named(self.window)} if self.window else {}
        return {"linear_rope": self.linear_rope, **window}

    def check_positions(self) -> None:
        """Raise ``HyLoError`` for a setting of layers that the plan does not have, before anything is trained."""
        if self.control:
            return
        plan = Plan.parse(self.layers, self.plan, self.linear)
        missing = {"MLA": "mla" not in plan, "linear": set(plan) == {"mla"}}
        asked = [("linear_rope", "linear")] if self.linear_rope else []
        asked += [("window", "MLA" if self.window.endswith(":all") else "linear")] if self.window else []
        asked += [(f"stage {stage.name}: mla_rope", "MLA") for stage in self.stages if stage.mla_rope is False]
        scaled = (stage for stage in self.stages if stage.log_scale not in (None, "off"))
        asked += [(f"stage {stage.name}: log_scale", "MLA") for stage in scaled]
        for what, kind in asked:
            if missing[kind]:
                raise HyLoError(f"{what} is set, but the plan {self.plan} has no {kind} layers: leave one of them out")

    def as_control(self) -> "Recipe":
        """Return the control: the base model itself, trained by the stages after the layer-wise ones."""
        kept = (stage for stage in self.stages if not stage_kind(stage.kind).layerwise)
        # It has no new mixers, and reads no text that a student wrote.
        changes = dict(train="all", initial_states="zero", mla_rope=None, log_scale=None, on_policy=0.0)
        stages = tuple(replace(stage, **changes) for stage in kept)
        return replace(self, name=f"{self.name}-control", stages=stages, control=True, window=None)

    def to_dict(self) -> dict:
        """Return the recipe as JSON reads it, with lists for tuples."""
        values = asdict(self) | {"stages": [stage.to_dict() for stage in self.stages]}
        for name in ("control", "linear_rope", "window"):  # earlier versions had none of them
            if not values[name]:
                del values[name]
        return json.loads(json.dumps(values))
