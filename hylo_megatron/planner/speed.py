"""Seconds of a training step, from shapes, the parallel layout and the card. No torch in here.

A step is the sum of its parts. Each part is a count (``planner/flops.py``, ``planner/sent.py``,
``mixers/*/memory.py``) over a rate of the card, with constants that were fitted to whole steps on one, two and four
GPUs (``tests/planner/test_speed.py`` has them).
"""

from dataclasses import astuple, dataclass
from math import prod

from hylo_megatron.config import Architecture
from hylo_megatron.config.decisions import CHUNK
from hylo_megatron.config.shapes import hf_shapes
from hylo_megatron.errors import HyLoError
from hylo_megatron.mixers import MIXERS, window
from hylo_megatron.planner.flops import RATES, head_products, layer_products, mixing, token_flops
from hylo_megatron.planner.sent import sent
from hylo_megatron.planner.training import PlannedRun, stage_sub_layers

CARDS = {"H100": RATES["NVIDIA H100 80GB HBM3"], "H200": RATES["NVIDIA H200"]}  # FLOP/s of a large bf16 product


@dataclass(frozen=True, kw_only=True)
class Constants:
    """Fitted to measured steps, except ``node`` and ``network``, which are assumptions: no step used two nodes."""

    products: float = 0.95  # share of the rate of products that the products of layers reach
    head: float = 0.79  # the same for the logits' products
    attention: float = 1.22  # the same for attention's, forward and backward together, beside ``score``
    window: float = 0.10  # the same for windows, whose kernel reads a mask and keys twice as wide as needed
    score: float = 3.7e-13  # seconds that a score takes however narrow its head is: its exponential, above all
    traffic: float = 0.86e-12  # seconds for a byte that a layer keeps for the backward pass, in a forward pass
    optimizer: float = 0.4e-12  # seconds for a byte of gradients and optimizer
    recurrence: float = 20.5e-12  # seconds for a value of the queries, keys, values and outputs of a linear block
    chunk: float = 2.45e-6  # seconds for a chunk of the recurrence, which waits for the chunk before
    step: float = 0.015  # seconds of a step without a kernel: logging and data
    node: int = 8  # GPUs that NVLink connects
    nvlink: float = 160e9  # bytes a second that a GPU sends within a node, with starts of collectives and slower ranks
    network: float = 40e9  # and to another node


FITTED = Constants()


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one step. ``waiting``: bubbles of a pipeline, and what runs between steps."""

    products: float
    attention: float
    recurrences: float
    traffic: float
    optimizer: float
    communication: float
    waiting: float

    @property
    def total(self) -> float:
        return sum(astuple(self))


def card_named(name: str) -> float:
    """Return the rate of products of the card of that name. Raises ``HyLoError`` for an unknown one."""
    if name not in CARDS:
        raise HyLoError(f"--card {name!r}: expected one of {', '.join(CARDS)}, whose rate of products was measured")
    return CARDS[name]


def _recomputed(run: PlannedRun) -> float:
    """Return the share of sub-layers that are computed twice."""
    if run.recompute_chunk and not run.kind.layerwise:
        return 1.0
    return min(1.0, run.recompute * run.layout.pp / (2 * run.student.num_layers))


def _products(run: PlannedRun, card: float, fitted: Constants) -> float:
    """Return the seconds of a token in products with weights, on a rank of the last pipeline stage.

    That stage has both heads beside its layers, and the other stages wait for it.
    """
    found = token_flops(run.student, run.teacher, run.kind, train=run.train, length=run.work.seq_length,
                        taught=run.taught * run.layout.cp // run.work.micro_batch)  # fmt: skip
    logits = 0.0
    if not run.kind.layerwise:
        taught, learnt = 2 * run.taught / run.share.tokens, 6 if run.train == "all" else 4
        logits = taught * head_products(run.teacher) + learnt * head_products(run.student)
    again = 2 * _recomputed(run) * sum(layer_products(run.student).values())
    layers = found.teacher_products + found.student_products - logits + again
    return (layers / fitted.products / run.layout.pp + logits / fitted.head) / run.layout.tp / card


def _attention(run: PlannedRun, card: float, fitted: Constants) -> float:
    """Return the seconds of a token in attention, on one rank."""
    length, taught = run.work.seq_length, run.taught * run.layout.cp // run.work.micro_batch
    windows = window.computed(run.student, length, run.layout.cp)
    own = mixing(run.student, length) - window.mixing(run.student, length) - _recurrence_flops(run.student)
    again = _recomputed(run)
    window_passes = 1 if run.frozen_windows else 3 + again
    flops = taught / length * mixing(run.teacher, taught) + (3 + again) * own
    scores = taught / length * _scores(run.teacher, taught) + (2 + again) * _scores(run.student, length)
    beside = window_passes * windows / fitted.window
    return (flops / fitted.attention + beside) / card + scores * fitted.score


def _scores(arch: Architecture, length: int) -> float:
    """Return the causal scores of a token in all layers of attention, those of windows left out."""
    return sum(not MIXERS[kind].linear for kind in arch.plan) * arch.num_attention_heads * length / 2


def _recurrence_flops(arch: Architecture) -> int:
    return sum(MIXERS[kind].part("flops").mixing(arch, 1) for kind in arch.plan if MIXERS[kind].linear)


def _recurrences(run: PlannedRun, fitted: Constants) -> float:
    """Return the seconds of a micro-batch in the recurrences of linear blocks, on one rank."""
    blocks = [MIXERS[kind].part("flops") for kind in run.student.plan if MIXERS[kind].linear]
    states = run.layout.passes_states
    values = sum(block.VALUE_COST * block.values(run.student, states) for block in blocks) / run.layout.tp
    scanned = run.share.length * (0.5 if states else run.layout.cp)  # two chunks at once, or the whole sequence
    waits = fitted.chunk * len(blocks) * scanned / CHUNK
    again = 1 + _recomputed(run) / 3
    return again / run.layout.pp * (fitted.recurrence * values * run.share.tokens + waits)


def _traffic(run: PlannedRun, fitted: Constants) -> float:
    """Return the seconds of a micro-batch in norms, element-wise functions and copies, on one rank."""
    kept = sum(part.kept for part in stage_sub_layers(run, range(run.student.num_layers)))
    c, f, heads = run.teacher.hidden_size, run.teacher.intermediate_size, run.teacher.num_attention_heads
    read = run.teacher.num_layers * 2 * run.taught * (4 * c + 3 * f + 3 * heads * run.teacher.head_dim) / run.layout.tp
    return fitted.traffic * (kept * (3 + _recomputed(run)) + read) / run.layout.pp


def _elements(run: PlannedRun) -> float:
    """Return the trained parameters of a rank, as if tensors and layers were split evenly."""
    trained = sum(prod(shape) for name, shape in hf_shapes(run.student).items() if run.trains(name))
    return trained / run.layout.tp / run.layout.pp


def _optimizer(run: PlannedRun, fitted: Constants) -> float:
    """Return the seconds of a step: gradients are read twice, and the shared states read and written."""
    sharers = run.work.processes // (run.layout.tp * run.layout.pp)
    return _elements(run) * (8 + 28 / sharers) * fitted.optimizer


def _bandwidths(run: PlannedRun, fitted: Constants) -> dict[str, float]:
    """Return the bytes a second that a rank sends to each of its groups.

    megatron-core numbers ranks by TP, CP, DP and PP: each group lies within so many successive ranks.
    """
    tp, cp, pp, world = run.layout.tp, run.layout.cp, run.layout.pp, run.work.processes
    within = {"tp": tp, "cp": tp * cp, "dp": world // pp, "pp": world, "embedding": world}
    return {name: fitted.nvlink if ranks <= fitted.node else fitted.network for name, ranks in within.items()}


def _communication(run: PlannedRun, attention: float, fitted: Constants) -> tuple[float, float]:
    """Return the seconds of a step that its micro-batches wait for other ranks, and those at its end.

    Keys, values and latents arrive behind attention to a rank's own tokens, one part in CP of all its ``attention``.
    Nothing else is hidden: no recipe overlaps the sums of gradients with the backward pass.
    """
    rates, most = _bandwidths(run, fitted), (0.0, 0.0)
    for stage in range(run.layout.pp):
        found = sent(run, stage)
        seconds = {name: getattr(found, name) / rate for name, rate in rates.items()}
        hidden = min(found.behind / rates["cp"], attention / run.layout.cp)
        waited = seconds["tp"] + seconds["cp"] + seconds["pp"] - hidden
        most = max(most, (waited, seconds["dp"] + seconds["embedding"]), key=sum)
    return most


def step_time(run: PlannedRun, card: float, fitted: Constants = FITTED) -> StepTime:
    """Return the seconds of a step. The layers of pipeline stages are taken as equally slow."""
    split, times = run.layout.tp * run.layout.pp, run.micro_batches
    tokens = times * run.share.tokens
    parts = dict(
        products=tokens * _products(run, card, fitted), attention=tokens / split * _attention(run, card, fitted),
        recurrences=times * _recurrences(run, fitted), traffic=times * _traffic(run, fitted),
    )  # fmt: skip
    waited, shared = _communication(run, parts["attention"], fitted)
    waits = 0 if run.kind.layerwise else run.layout.pp - 1  # micro-batches; a layer-wise stage has no bubble
    bubble = waits / times * (sum(parts.values()) + waited)
    return StepTime(**parts, optimizer=_optimizer(run, fitted), communication=waited + shared,
                    waiting=fitted.step + bubble)  # fmt: skip


def tokens_per_second(run: PlannedRun, card: float, fitted: Constants = FITTED) -> float:
    """Return the tokens that all ranks together train on in a second."""
    data_parallel = run.work.processes // run.layout.ranks
    tokens = run.work.micro_batch * run.micro_batches * data_parallel * run.work.seq_length
    return tokens / step_time(run, card, fitted).total
