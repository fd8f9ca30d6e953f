"""``--method kl``: distil the linear mixers shortly beside each restored layer, then measure.

The training is a loop over the transformers modules, in the process that measures. The trainer of ``hylo train`` would
need a checkpoint whose layers are attention and linear blocks, which it does not build, and would start dozens of
processes for trainings of seconds. Only linear mixers are trained, so the comparison shows how well they follow.
"""

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from hylo_megatron.select.cache import Layers
from hylo_megatron.select.judge import Judge, Measured
from hylo_megatron.select.models import Pair
from hylo_megatron.select.training import Masters, Training, mean_divergence


def linear_parameters(pair: Pair, restored: Layers) -> list[nn.Parameter]:
    """Return the parameters of the linear mixers at layers that are not restored."""
    layers = [layer for number, layer in enumerate(pair.student.model.layers) if number not in restored]
    return [parameter for layer in layers for parameter in getattr(layer, layer.mixer_name).parameters()]


@contextlib.contextmanager
def trainable(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Let ``parameters`` be trained inside the block; afterwards they have their values from before it."""
    before = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, value in zip(parameters, before, strict=True):
            parameter.requires_grad_(False).copy_(value)
            parameter.grad = None


def measure_distilled(pair: Pair, judge: Judge, training: Training, text_BS: Tensor, restored: Layers) -> Measured:
    """Distil with the layers ``restored``, and return what the result is measured at. The student is left as it was.

    All candidates read the same rows in the same order.
    """
    parameters = linear_parameters(pair, restored)
    with trainable(parameters), pair.restored(sorted(restored)) as student:
        masters = Masters(parameters, training)
        for step in range(training.steps):
            ids_BS = text_BS[training.rows(step, len(text_BS))].to(student.device)
            mean_divergence(pair.teacher, student, ids_BS).backward()
            masters.step()
        return judge(student)
