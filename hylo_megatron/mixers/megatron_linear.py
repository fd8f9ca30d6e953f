"""What the Megatron modules of linear blocks share: fp32 decay parameters, aligned projections, context parallelism.

Under context parallelism a linear block works in one of two ways. Either megatron-core's all-to-all gives each rank
some heads of the complete sequence. Or each rank keeps its part of the sequence with all heads, and composes the state
before its part from those of all ranks (``parallel/state_passing.py``); megatron-core's module then sees a
context-parallel group of one rank.
"""

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor

from hylo_megatron.config import Architecture
from hylo_megatron.config.layout import ParallelLayout
from hylo_megatron.config.positions import rotary_width
from hylo_megatron.errors import HyLoError
from hylo_megatron.kernels import ops_for
from hylo_megatron.kernels.norm import wide
from hylo_megatron.kernels.segments import RECURRENCES, segmented
from hylo_megatron.mixers.initial_states import InitialStates
from hylo_megatron.mixers.megatron_layers import Backend, Rotary
from hylo_megatron.mixers.mixer import Mixer
from hylo_megatron.parallel.state_passing import kernels_across, without_context_parallelism


def sharing(entry: Mixer, arch: Architecture, linear_cp: str, backend: Backend) -> dict:
    """Return the parameters of ``LinearMixer`` for a mixer. ``linear_cp``: ``--hylo-linear-cp``."""
    rotary = Rotary(arch, rotary_width(entry.name, arch.geometry)) if arch.linear_rope else None
    return {
        "linear_cp": linear_cp,
        "rotary": rotary,  # one for all layers
        "window": backend.window_beside(entry.name, arch),
    }


ALIGNED_WIDTH = 16


class AlignedColumnParallelLinear(ColumnParallelLinear):
    """A column-parallel projection whose output ends in zeros that make its width a multiple of 16.

    Tensor cores need aligned rows, and the projection of a linear block has two odd columns a head. (SmolLM2's took 50
    of 320 ms a step without.) ``exact_width``: without the zeros, for megatron-core's all-to-all, which cuts the
    projection by its own sizes.
    """

    exact_width = False

    def _forward_impl(self, input, weight, *args, **kwargs):
        missing = 0 if self.exact_width else -len(weight) % ALIGNED_WIDTH
        if missing:
            weight = F.pad(weight, (0, 0, 0, missing))
            kwargs["gradient_accumulation_fusion"] = False  # the main gradient has no rows for the zeros
        return super()._forward_impl(input, weight, *args, **kwargs)


class LinearMixer:
    """Base of linear blocks: decay parameters in fp32, and context parallelism.

    The parameters ``fp32_names`` stay fp32 in a 16-bit model. Rounding A_log or dt_bias to bf16 changes the decay, and
    -inf in A_log has killed runs. ``Float16Module`` casts the complete model; ``_apply`` keeps the parameters out of
    the cast.

    ``across_ranks``: the mixer's own kernels with states that pass between ranks, by their names in ``kernels.Ops``.
    Sets ``kernels``, which chooses kernels by tensor, and ``chunks``, the parts of a sequence that a rank has: 2 where
    states are passed, else 1.

    ``mix`` of a mixer returns the block's output, to which that of ``window`` is added where the model has one.
    """

    fp32_names: tuple[str, ...] = ()
    across_ranks: ClassVar[dict[str, Callable]] = {}

    def __init__(self, config, *args, pg_collection=None, linear_cp: str = "auto", rotary: Rotary | None = None,
                 window: Callable | None = None, **kwargs):  # fmt: skip
        cp = pg_collection.cp.size()
        states = ParallelLayout(cp=cp, linear_cp=linear_cp).passes_states
        groups = without_context_parallelism(pg_collection) if states else pg_collection
        super().__init__(config, *args, pg_collection=groups, **kwargs)
        self.chunks, self.kernels, self.rotary, self.ranks = 1, ops_for, rotary, (1, 0)
        if states:
            self.ranks = cp, pg_collection.cp.rank()
            self.chunks, self.kernels = 2, kernels_across(pg_collection.cp, self.across_ranks)
            self.sharers = pg_collection.cp
        for module in self.modules():
            if isinstance(module, AlignedColumnParallelLinear):
                module.exact_width = cp > 1 and not states
        for name in self.fp32_names:
            getattr(self, name).data = wide(getattr(self, name).data)
        self.window = window and window(config, layer_number=kwargs["layer_number"], pg_collection=pg_collection)

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        out_SBD, bias = self.mix(hidden_states, *args, **kwargs)
        if self.window is None:
            return out_SBD, bias
        if kwargs.get("packed_seq_params") is not None:
            raise HyLoError("packed sequences: a window reads one sequence a row; use --window off")
        return out_SBD + self.window(hidden_states), bias

    def _apply(self, fn, recurse=True):
        kept = {name: getattr(self, name).data for name in self.fp32_names}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            parameter = getattr(self, name)
            if parameter.dtype != before.dtype:
                parameter.data = before.to(parameter.device)
        return self

    def rotate(self, *parts_BSHK: Tensor) -> tuple[Tensor, ...]:
        """Rotate queries and keys ``[B,S,H,K]`` at the positions of this rank's rows, if the model does so."""
        return parts_BSHK if self.rotary is None else tuple(map(self._rotated, parts_BSHK))

    def _rotated(self, x_BSHK: Tensor) -> Tensor:
        table = self.rotary.table(self.chunks * x_BSHK.shape[1], *self.ranks, x_BSHK.device)
        rows = zip(x_BSHK.chunk(self.chunks), *(side.chunk(self.chunks) for side in table), strict=True)
        turned = [ops_for(x).rotate(x.transpose(0, 1), cos, sin).transpose(0, 1) for x, cos, sin in rows]
        return torch.cat(turned) if self.chunks > 1 else turned[0]

    def cut_recurrence(self, length: int) -> None:
        """Let the recurrence of what this rank has of a sequence run in segments of ``length`` tokens, if it can."""
        own = {name: run for name, run in self.across_ranks.items() if name in RECURRENCES}
        if own and self.chunks > 1:
            cut = {name: partial(run, segment=length) for name, run in own.items()}
            self.kernels = kernels_across(self.sharers, cut)
        elif own:
            self.kernels = segmented(own, length)

    def start_from(self, mode: str, seed: int) -> InitialStates:
        """Let the recurrence start from other states than zero in training, and return what makes these states."""
        if self.chunks > 1 or self.kernels is not ops_for or getattr(self, "recompute_norm_out", False):
            raise HyLoError(f"--hylo-initial-states {mode}: split sequences or recomputed norms have none")
        states = InitialStates(mode, self.across_ranks, seed)
        self.kernels = lambda x: states.kernels(x) if self.training else ops_for(x)
        return states

    def refuse_packed(self, packed_seq_params) -> None:
        if packed_seq_params is not None:
            if self.rotary is not None:
                raise HyLoError("packed sequences: linear_rope rotates by the place in a row; use --linear-rope off")
            raise HyLoError("packed sequences under context parallelism need --hylo-linear-cp a2a")
