"""Initial states of linear blocks other than zero, for length extrapolation (arXiv 2507.02782).

A block that starts from the state of another text learns to work with states that a text as short as the training's
never reaches. Legend: B sequences of a micro-batch, H heads; a state is ``[B, H, ..]``.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from hylo_megatron.kernels import Ops, ops_for

# Choices of --hylo-initial-states
MODES = ("zero", "random", "carried")


class InitialStates:
    """The kernels of one block, whose recurrence starts from a state that ``begin_step`` makes.

    Only for training: evaluations start from zero, as the first step does. ``carried``: the final states of the
    previous step's last micro-batch. ``random``: normal noise with mean and deviation of these, for each head. No
    gradient reaches the step that a state comes from. After a step whose states are not finite, or one that ``forget``
    follows, the recurrence starts from zero again. States are written in place: a CUDA graph reads them, and a
    recomputed layer reads the same ones again.
    """

    def __init__(self, mode: str, recurrences: Iterable[str], seed: int):
        self.mode, self.recurrences, self.seed = mode, tuple(recurrences), seed
        self.final: Tensor | None = None
        self.initial: Tensor | None = None

    def begin_step(self, step: int) -> None:
        if self.final is None:
            return
        if self.initial is None or self.initial.shape != self.final.shape:
            self.initial = torch.empty_like(self.final)
        states = self.final if self.mode == "carried" else self._noise(step)
        self.initial.copy_(torch.where(states.isfinite().all(), states, 0.0))

    def forget(self) -> None:
        """Let the next step start from zero: the weights or samples that the states come from are discarded."""
        if self.final is not None:
            self.final.zero_()

    def restore(self, final: Tensor) -> None:
        """Let the next step start as after a step that ended with ``final``, which an earlier process has saved."""
        if self.final is None:
            self.final = final.clone()
        else:
            self.final.copy_(final)

    def _noise(self, step: int) -> Tensor:
        device = self.final.device
        generator = torch.Generator(device).manual_seed(self.seed * 1_000_003 + step)  # a resumed run draws the same
        noise = torch.randn(self.final.shape, generator=generator, device=device)
        inner = (0, *range(2, self.final.dim()))
        return noise * self.final.std(inner, keepdim=True) + self.final.mean(inner, keepdim=True)

    def kernels(self, x: Tensor) -> Ops:
        """Choose kernels as ``ops_for`` does."""
        local = ops_for(x)
        return replace(local, **{name: partial(self._run, getattr(local, name)) for name in self.recurrences})

    def _run(self, recurrence: Callable, x: Tensor, *inputs, **settings):
        fits = self.initial is not None and len(self.initial) == len(x)
        states = dict(initial_state=self.initial if fits else None, output_final_state=True)
        out, final = recurrence(x, *inputs[:6], **settings, **states)  # Mamba-2 gives its own two after six others
        if self.final is None or self.final.shape != final.shape:
            self.final = final.detach().clone().float()
        else:
            self.final.copy_(final.detach())
        return out, final
