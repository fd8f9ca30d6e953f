"""What linear mixers for transformers share: parameters that stay fp32, the convolution and the recurrence of a call,
and what Gated DeltaNet and Kimi Delta Attention have in common.

Legend: B batch, S sequence, D model, C convolution channels, W its width, K key dim, V value dim.
"""

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from hylo_megatron import kernels
from hylo_megatron.kernels.rope import Angles
from hylo_megatron.mixers.hf_layers import HyLoConv1d, held, rotate


class States:
    """The states that a linear mixer starts from and leaves behind in its layer of a ``HyLoCache``, if it has one.

    ``turn``: cosines and sines that rotate queries and keys, or a pair of None.
    """

    def __init__(self, x_BSD: Tensor, cache: Cache | None, layer: int, angles: Angles | None = None):
        self.ops = kernels.ops_for(x_BSD)
        self.cache, self.layer = cache, layer
        self.past = {} if cache is None else cache[layer]
        self.turn = (None, None) if angles is None else (angles.linear_cos, angles.linear_sin)
        self.decoding = "state" in self.past and x_BSD.shape[1] == 1

    def convolve(self, x_BSC: Tensor, weight_CW: Tensor, bias_C: Tensor | None = None) -> Tensor:
        out_BSC, self.window = self.ops.causal_conv1d(
            x_BSC, weight_CW, bias_C, "silu",
            initial_state=self.past.get("conv"), output_final_state=self.cache is not None,
        )  # fmt: skip
        return out_BSC

    def scan(self, chunk, step, *inputs: Tensor, **kwargs) -> Tensor:
        """Run the kernel ``step`` for one token behind a state, and ``chunk`` for all other inputs."""
        out, state = (step if self.decoding else chunk)(
            *inputs, initial_state=self.past.get("state"), output_final_state=self.cache is not None, **kwargs
        )
        if self.cache is not None:
            self.cache.keep(self.layer, self.window, state)
        return out


class LinearMixer(nn.Module):
    """Base of linear mixers: ``mix`` of a mixer returns the layer's output for ``x``, which is 0 at padding.

    Parameters in ``fp32_names`` stay fp32 in ``.to(bfloat16)``, because rounding them changes decays. The output of
    ``window`` (``hf_window.py``) is added where the model has one.
    """

    fp32_names: tuple[str, ...] = ()

    def __init__(self):
        super().__init__()
        self.window: nn.Module | None = None

    def initial_values(self) -> None:
        """Fill the parameters in ``fp32_names`` through ``transformers.initialization``, for a model that is new."""
        init.copy_(self.A_log, torch.empty(self.A_log.shape).uniform_(1, 16).log_())
        init.ones_(self.dt_bias)

    def forward(
        self,
        x_BSD: Tensor,
        angles: Angles | None = None,
        allowed: Tensor | None = None,
        real_BS1: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """``real_BS1``: True at tokens that are no padding. ``allowed`` is not read."""
        x_BSD = x_BSD if real_BS1 is None else x_BSD * real_BS1
        out_BSD = self.mix(x_BSD, real_BS1, States(x_BSD, cache, self.layer, angles))
        return out_BSD if self.window is None else out_BSD + self.window(x_BSD, real_BS1, cache)

    def _apply(self, fn, recurse=True):
        kept = {id(getattr(self, name)) for name in self.fp32_names}

        def apply(tensor):
            moved = fn(tensor)
            if id(tensor) not in kept or moved.dtype == tensor.dtype:
                return moved
            return tensor.to(moved.device)

        return super()._apply(apply, recurse)


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def fp32_parameter(size: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(size, dtype=torch.float32))


class DeltaRuleMixer(LinearMixer):
    """Queries, keys and values with a convolution each, beta from ``b_proj``, and the gated norm ``o_norm``.

    A mixer adds ``key_dim``, ``value_dim``, ``o_norm``, the ``gate`` of this norm, and ``delta_rule``, which computes
    the decay (1 at padding) and runs a kernel. ``keys`` and ``values`` are widths of all heads, ``heads`` the number
    of value heads, ``decays`` the number of values in ``dt_bias``.
    """

    def __init__(self, layer: int, hidden: int, *, keys: int, values: int, heads: int, decays: int, conv_kernel: int):
        super().__init__()
        self.layer, self.conv_sizes = layer, [keys, keys, values]
        self.q_proj, self.k_proj, self.v_proj = (linear(hidden, size) for size in self.conv_sizes)
        self.q_conv1d, self.k_conv1d, self.v_conv1d = (HyLoConv1d(n, conv_kernel, False) for n in self.conv_sizes)
        self.b_proj = linear(hidden, heads)
        self.A_log, self.dt_bias = fp32_parameter(heads), fp32_parameter(decays)
        self.o_proj = linear(values, hidden)

    def mix(self, x_BSD: Tensor, real_BS1: Tensor | None, states: States) -> Tensor:
        projected = torch.cat([self.q_proj(x_BSD), self.k_proj(x_BSD), self.v_proj(x_BSD)], -1)
        weight = torch.cat([held(conv)[0] for conv in (self.q_conv1d, self.k_conv1d, self.v_conv1d)])
        q, k, v = states.convolve(projected, weight).split(self.conv_sizes, -1)
        # Not in the kernel: fla compiles its own norm anew for every size of batch, and prompts come in all sizes.
        q, k = (kernels.l2norm(rotate(t.unflatten(-1, (-1, self.key_dim)), *states.turn)) for t in (q, k))
        v, gate = (t.unflatten(-1, (-1, self.value_dim)) for t in (v, self.gate(x_BSD)))
        out = self.delta_rule(states, x_BSD, real_BS1, q, k, v, beta=self.b_proj(x_BSD).sigmoid())
        return self.o_proj(self.o_norm(out, gate).flatten(-2))
