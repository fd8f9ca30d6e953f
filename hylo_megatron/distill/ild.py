"""Enhanced intermediate-layer distillation (section "Stage 1" of the method's paper), fed by the teacher.

Each student layer gets the teacher's hidden state, so layers do not depend on one another: training the hybrid's own
plan gives the same layers as training an all-MLA and an all-linear student apart and taking each layer from its kind.
Legend: S sequence, B batch, D model, L layers of this rank.
"""

import torch
from torch import Tensor

from hylo_megatron.kernels import ops_for


def run_layer(layer, hidden_SBD: Tensor) -> Tensor:
    """One of ``HybridStack``'s layers; transformer layers return a tuple, Mamba's a tensor."""
    out = layer(hidden_states=hidden_SBD, attention_mask=None)
    return out[0] if isinstance(out, tuple) else out


class HiddenStates:
    """Records the input of a stack's first layer and the output of each, during a forward pass."""

    def __init__(self, stack):
        self.states: list[Tensor] = []
        stack.layers[0].register_forward_pre_hook(self._first, with_kwargs=True)
        for layer in stack.layers:
            layer.register_forward_hook(self._after)

    def _first(self, _, args, kwargs):
        self.states = [kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]]

    def _after(self, _, args, output):
        self.states.append(output[0] if isinstance(output, tuple) else output)

    def take(self) -> list[Tensor]:
        states, self.states = self.states, []
        return states


def layer_losses(student_layers, teacher_states: list[Tensor], mask_SB: Tensor, norms_L2: Tensor) -> Tensor:
    """``[L, 2]``: per base layer the token sums of ``‖a_s - a_t‖₂`` and ``‖h_s - h_t‖₂``, divided by ``norms_L2``.

    a: the mixer's output, h: the hidden state after the layer. ``teacher_states[j]`` is what enters stack layer j
    (two stack layers, mixer and MLP, make one base layer).
    """
    losses = []
    for index in range(0, len(student_layers), 2):
        before, mixed, after = teacher_states[index : index + 3]
        student_mixed = run_layer(student_layers[index], before)
        student_after = run_layer(student_layers[index + 1], student_mixed)
        # before + a is on both sides, so the difference of the sums is that of the mixers' outputs
        pairs = ((student_mixed, mixed), (student_after, after))
        losses.append(torch.stack([(ops_for(s).distance(s, t) * mask_SB).sum() for s, t in pairs]))
    return torch.stack(losses) / norms_L2
