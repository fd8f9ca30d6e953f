"""A recipe is a list of stages; each is a visible ``replace(...)`` of the one before."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One training run. Tokens: ``steps * global_batch * seq_length``; ``lr`` is the peak of a cosine."""

    name: str
    kind: str  # "ild" | "distill"
    seq_length: int
    global_batch: int
    steps: int
    lr: float
    min_lr: float = 0.0
    warmup: float = 0.04  # share of the steps
    micro_batch: int = 1
    train: str = "all"  # "mixers": weights copied from the base stay frozen
    copied_lr_mult: float = 0.2
    decay_lr_mult: float = 5.0
    kl_weight: float = 1.0
    ce_weight: float = 0.0
    weight_decay: float = 0.05

    @property
    def tokens(self) -> int:
        return self.steps * self.global_batch * self.seq_length

    def flags(self) -> list[str]:
        """Flags of ``python -m hylo_megatron.train`` that this stage stands for."""
        values = {
            "--hylo-stage": self.kind, "--hylo-train": self.train, "--seq-length": self.seq_length,
            "--micro-batch-size": self.micro_batch, "--global-batch-size": self.global_batch,
            "--train-iters": self.steps, "--lr": self.lr, "--min-lr": self.min_lr, "--lr-decay-style": "cosine",
            "--lr-warmup-fraction": self.warmup, "--weight-decay": self.weight_decay,
            "--hylo-copied-lr-mult": self.copied_lr_mult, "--hylo-decay-lr-mult": self.decay_lr_mult,
            "--hylo-kl-weight": self.kl_weight, "--hylo-ce-weight": self.ce_weight,
        }  # fmt: skip
        return [str(part) for pair in values.items() for part in pair]


@dataclass(frozen=True)
class Recipe:
    """What a whole run does; every number that shapes its result is here."""

    name: str
    plan: str
    linear: str
    stages: tuple[Stage, ...]
    calibration_tokens: int
    calibration_length: int
    eval_context: int
    eval_tokens: int
    needle_lengths: tuple[int, ...]
    needle_samples: int
    needle_depths: int
    save_every: int = 20
