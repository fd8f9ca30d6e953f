"""Layer-wise distillation: each student layer reads the teacher's hidden state, and its output is compared.

Layers do not depend on one another. Training the hybrid's own plan therefore gives the same layers as training an
all-MLA and an all-linear student and taking each layer from the one with its mixer. Legend: S sequence, B batch,
D model width, L layers of this rank.
"""

import torch
from torch import Tensor

from hylo_megatron.kernels import ops_for


def run_layer(layer, hidden_SBD: Tensor) -> Tensor:
    """Run one layer of a ``HybridStack``. Transformer layers return a tuple, Mamba's a tensor."""
    out = layer(hidden_states=hidden_SBD, attention_mask=None)
    return out[0] if isinstance(out, tuple) else out


class HiddenStates:
    """Records the input of a stack's first layer and the output of each layer during a forward pass."""

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
    """Return ``[L, 2]``: for each layer of the plan the sums over tokens of ``‖a_s - a_t‖₂`` and ``‖h_s - h_t‖₂``,
    divided by ``norms_L2``.

    a is the mixer's output, h the hidden state after the layer. ``teacher_states[j]`` is the input of layer j of the
    stack, where a mixer and an MLP make one layer of the plan.
    """
    losses = []
    for index in range(0, len(student_layers), 2):
        before, mixed, after = teacher_states[index : index + 3]
        student_mixed = run_layer(student_layers[index], before)
        student_after = run_layer(student_layers[index + 1], student_mixed)
        # Both sides contain ``before``, so their difference is the difference of the mixers' outputs.
        pairs = ((student_mixed, mixed), (student_after, after))
        losses.append(torch.stack([(ops_for(s).distance(s, t) * mask_SB).sum() for s, t in pairs]))
    return torch.stack(losses) / norms_L2
