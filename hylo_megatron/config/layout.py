"""Check that models fit a parallel layout, and name layouts near it that they fit, before any process starts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import log2

from hylo_megatron.config.architecture import Architecture
from hylo_megatron.errors import HyLoError
from hylo_megatron.mixers import LINEAR, MIXERS

EXCHANGES = ("auto", "p2p", "all_gather")  # choices of --cp-comm-type
SIZES = ("tp", "pp", "cp")


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """How the ranks of one copy of the model share it.

    ``linear_cp`` is ``--hylo-linear-cp``, ``exchange`` is ``--cp-comm-type``.
    """

    tp: int = 1
    pp: int = 1
    cp: int = 1
    sequence_parallel: bool = False
    linear_cp: str = "auto"
    exchange: str = "auto"

    @property
    def passes_states(self) -> bool:
        """Whether linear blocks pass states between context-parallel ranks.

        Otherwise megatron-core's all-to-all distributes the heads, which sends the whole projection.
        """
        return self.cp > 1 and self.linear_cp != "a2a"

    def __str__(self) -> str:
        return self.of(SIZES)

    def of(self, sizes: Sequence[str]) -> str:
        """Return some of the sizes as text."""
        return " ".join(f"{size.upper()} {getattr(self, size)}" for size in sizes)

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.cp

    def flags(self) -> list[str]:
        """Megatron's flags for the sizes."""
        sizes = ["--tensor-model-parallel-size", str(self.tp), "--pipeline-model-parallel-size", str(self.pp)]
        return sizes + (["--context-parallel-size", str(self.cp)] if self.cp > 1 else [])


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a layout has to divide among its ranks. Zero means: not known, not checked."""

    processes: int = 0
    seq_length: int = 0
    micro_batch: int = 1
    global_batch: int = 0


NO_WORK = Work()


def shared_heads(arch: Architecture, at: ParallelLayout) -> Iterable[tuple[str, int, str, int]]:
    """Yield ``(what, how many, the sizes that divide them, how many ranks that makes)``."""
    yield "attention heads", arch.num_attention_heads, "TP", at.tp
    if "attention" in arch.plan or arch.window:
        yield "key-value heads", arch.num_key_value_heads, "TP", at.tp
    for name in LINEAR:
        if name in arch.plan:
            title, field = MIXERS[name].heads
            count = getattr(MIXERS[name].dimensions(arch.geometry), field)
            distributed = at.cp > 1 and not at.passes_states
            yield title, count, "TP x CP" if distributed else "TP", at.tp * (at.cp if distributed else 1)


def misfits(arch: Architecture, at: ParallelLayout, work: Work = NO_WORK) -> list[str]:
    """Return the reasons why ``arch`` does not fit."""
    found = []
    for what, count, sizes, ranks in shared_heads(arch, at):
        if count % ranks:
            fits = [size for size in range(1, count + 1) if count % size == 0]
            found.append(f"{sizes} = {ranks} does not divide {count} {what} (sizes that do: {fits})")
    features, rest = divmod(arch.intermediate_size, at.tp)
    if rest:
        found.append(f"TP = {at.tp} does not divide {arch.intermediate_size} MLP features")
    elif features % 2:  # its warm-up before training splits them in two
        found.append(
            f"a rank has {features} MLP features (intermediate_size / TP), megatron-core needs an even number"
        )
    if at.pp > arch.num_layers:
        found.append(f"PP = {at.pp} stages for {arch.num_layers} layers")
    chunks = 2 * at.cp if at.cp > 1 else 1
    if work.seq_length % chunks:
        found.append(f"sequences of {work.seq_length} do not divide into 2 x CP = {chunks} chunks")
    elif at.sequence_parallel and (work.seq_length // at.cp) % at.tp:
        found.append(
            f"{work.seq_length // at.cp} tokens of a rank do not divide by TP = {at.tp} (--sequence-parallel)"
        )
    if work.processes % at.ranks:
        found.append(f"{work.processes} processes do not divide by TP x PP x CP = {at.ranks}")
    elif work.processes and work.global_batch:
        together = work.micro_batch * (work.processes // at.ranks)
        if work.global_batch % together:
            found.append(f"a global batch of {work.global_batch} does not divide by micro-batch x DP = {together}")
    return found


def _divisors(processes: int) -> list[int]:
    return [size for size in range(1, processes + 1) if processes % size == 0]


def nearest(
    models: dict[str, Architecture], at: ParallelLayout, work: Work, count: int = 3, sizes: Sequence[str] = SIZES
) -> list[ParallelLayout]:
    """Return layouts of the same number of processes that every model fits; the smallest change of sizes first.

    ``sizes``: those that the user can choose; the others stay.
    """
    values = product(_divisors(work.processes or at.ranks), repeat=len(sizes))
    candidates = [replace(at, **dict(zip(sizes, each, strict=True))) for each in values]
    fits = [c for c in candidates if not any(misfits(arch, c, work) for arch in models.values())]

    def distance(other: ParallelLayout) -> float:
        return sum(abs(log2(getattr(other, name) / getattr(at, name))) for name in sizes)

    return sorted(fits, key=distance)[:count]


def check_parallel_layout(
    models: dict[str, Architecture], at: ParallelLayout, work: Work = NO_WORK, sizes: Sequence[str] = SIZES
) -> None:
    """Raise ``HyLoError`` with every reason and with layouts that fit.

    ``models``: by the names that a user knows. ``sizes``: those that the user can choose.
    """
    reasons = [f"{name}: {reason}" for name, arch in models.items() for reason in misfits(arch, at, work)]
    if not reasons:
        return
    reasons = list(dict.fromkeys(reasons))
    others = "; ".join(other.of(sizes) for other in nearest(models, at, work, sizes=sizes))
    remedy = (
        f"nearest layouts that fit: {others}"
        if others
        else "no layout of this many processes fits; change their number, or what they share"
    )
    raise HyLoError(f"{at.of(sizes)} does not fit: {'; '.join(reasons)}. {remedy}")


def check_exchange(mode: str | None) -> None:
    """Raise ``HyLoError`` for a value of ``--cp-comm-type`` that attention does not have."""
    if mode not in (None, *EXCHANGES):
        raise HyLoError(
            f"--cp-comm-type {mode}: attention across ranks has p2p (a ring), all_gather, and auto, which chooses"
        )


def check_layout(arch: Architecture, tp: int = 1, pp: int = 1, cp: int = 1, linear_cp: str = "auto") -> None:
    """Raise ``HyLoError`` if one model does not fit."""
    check_parallel_layout({"model": arch}, ParallelLayout(tp=tp, pp=pp, cp=cp, linear_cp=linear_cp))
