"""Triton kernels for a GPU, fla's and ours, with the signatures of the torch references. ``ops`` chooses.

Legend as in the references: B batch, S sequence, M key heads, H value heads, K key dim, V value dim, C channels.
"""

import torch
import torch.nn.functional as F
from fla.modules.activations import swiglu
from fla.modules.convolution import causal_conv1d as fla_conv1d
from fla.modules.fused_norm_gate import rms_norm_gated
from fla.modules.layernorm_gated import rmsnorm_fn
from fla.ops.common.chunk_h import chunk_bwd_dh, chunk_fwd_h
from fla.ops.common.chunk_o import chunk_bwd_dqkwg, chunk_bwd_dv, chunk_fwd_o
from fla.ops.gated_delta_rule import chunk_gated_delta_rule
from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule as step_gated_delta_rule
from fla.ops.kda import chunk_kda as fla_chunk_kda
from fla.ops.kda import fused_recurrent_kda
from fla.ops.utils import chunk_local_cumsum
from fla.ops.utils.constant import RCP_LN2

from hylo_megatron.config.decisions import CHUNK
from hylo_megatron.kernels import conv, norm, triton_pointwise
from hylo_megatron.kernels.ssd import skip
from hylo_megatron.kernels.triton_attention import join_attention
from hylo_megatron.kernels.triton_conv import split_convolve
from hylo_megatron.kernels.triton_fp8 import quantise_rows
from hylo_megatron.kernels.triton_pointwise import distance, rotate, swiglu_packed

__all__ = [
    "causal_conv1d",
    "chunk_gated_delta_rule",
    "chunk_kda",
    "chunk_ssd",
    "distance",
    "gated_rms_norm",
    "join_attention",
    "quantise_rows",
    "rms_norm",
    "rotate",
    "split_convolve",
    "step_gated_delta_rule",
    "step_kda",
    "swiglu",
    "swiglu_packed",
]


def causal_conv1d(x, weight, bias=None, activation="silu", initial_state=None, output_final_state=False, **kwargs):
    """Compute ``conv.causal_conv1d``, which runs itself where there is a state (one token at a time)."""
    if initial_state is not None:
        return conv.causal_conv1d(x, weight, bias, activation, initial_state, output_final_state, **kwargs)
    y, _ = fla_conv1d(x=x, weight=weight, bias=bias, activation=activation)
    before = weight.shape[1] - 1
    state = F.pad(x, (0, 0, max(0, before - x.shape[1]), 0))[:, -before:] if output_final_state else None
    return y, state


def rms_norm(x, weight, eps):
    """Compute ``norm.rms_norm`` with torch's own kernels, but for the gradient of a trained weight, which is slow."""
    trained = weight is not None and weight.requires_grad and torch.is_grad_enabled()
    return (triton_pointwise if trained and weight.dtype == x.dtype else norm).rms_norm(x, weight, eps)


def gated_rms_norm(x, z, weight, eps, group_size=None, norm_before_gate=True, activation="silu"):
    """Compute ``norm.gated_rms_norm``.

    Training repeats one shape and uses the kernel that is tuned for the shape. Inference has many shapes and uses the
    other kernel, which supports only SiLU.
    """
    tuned = torch.is_grad_enabled() and z is not None and norm_before_gate and group_size in (None, x.shape[-1])
    if tuned:
        return rms_norm_gated(x, z, weight, None, {"silu": "swish"}.get(activation, activation), eps=eps)
    if activation != "silu":
        return norm.gated_rms_norm(x, z, weight, eps, group_size, norm_before_gate, activation)
    return rmsnorm_fn(x, weight, None, z, eps, group_size, norm_before_gate)


def chunk_kda(q, k, v, g, beta, *, A_log=None, **kwargs):
    """Compute ``gated_delta.chunk_kda``. fla's kernel also computes the decay, whose inputs alone it saves."""
    return fla_chunk_kda(q, k, v, g, beta, A_log=A_log, use_gate_in_kernel=A_log is not None, **kwargs)


def step_kda(q, k, v, g, beta, *, A_log=None, **kwargs):
    """Compute ``gated_delta.recurrent_kda``, without a gradient."""
    return fused_recurrent_kda(q, k, v, g, beta, A_log=A_log, use_gate_in_kernel=A_log is not None, **kwargs)


class _GatedLinearAttention(torch.autograd.Function):
    """fla's ``chunk_simple_gla`` with 16-bit states in the backward pass too, as in fla's gated delta rule.

    With fp32 states fla has no backward kernel for Hopper before Triton 3.7.1. (q, k [B,S,H,K], v [B,S,H,V], log decay
    g [B,S,H], state [B,H,K,V] | None) -> (out like v, last state | None).
    """

    @staticmethod
    def forward(ctx, q, k, v, g, state, output_final_state):
        q, k, v = (x.contiguous() for x in (q, k, v))
        g = chunk_local_cumsum(g.contiguous(), chunk_size=CHUNK, scale=RCP_LN2)  # the kernels use exp2
        h, last = chunk_fwd_h(k=k, v=v, g=g, h0=state, output_final_state=output_final_state, chunk_size=CHUNK)
        ctx.save_for_backward(q, k, v, g, state)
        return chunk_fwd_o(q=q, k=k, v=v, g=g, h=h, scale=1.0, chunk_size=CHUNK), last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, d_last):
        q, k, v, g, state = ctx.saved_tensors
        d_out, common = d_out.contiguous(), dict(q=q, k=k, v=v, g=g, scale=1.0, chunk_size=CHUNK)
        h, _ = chunk_fwd_h(k=k, v=v, g=g, h0=state, output_final_state=False, chunk_size=CHUNK)
        d_last = None if d_last is None else d_last.contiguous()  # fla reads the memory, whatever the strides are
        d_h, d_state = chunk_bwd_dh(**common, do=d_out, h0=state, dht=d_last)
        d_q, d_k, _, d_g = chunk_bwd_dqkwg(**common, h=h, do=d_out, dh=d_h)
        del common["v"]
        d_v = chunk_bwd_dv(**common, do=d_out, dh=d_h)
        d_g = chunk_local_cumsum(d_g, chunk_size=CHUNK, reverse=True)
        return d_q, d_k, d_v, d_g, d_state, None


def chunk_ssd(x, dt, A, B, C, chunk_size=64, D=None, initial_state=None, output_final_state=False):
    """Compute ``ssd.ssd_chunk_scan``, which is gated linear attention with one decay for each head and scale 1."""
    heads = x.shape[2] // B.shape[2]
    if heads > 1:
        B, C = B.repeat_interleave(heads, 2), C.repeat_interleave(heads, 2)
    values = (x * dt.unsqueeze(-1)).to(x.dtype)
    state = None if initial_state is None else initial_state.mT.contiguous()
    out, state = _GatedLinearAttention.apply(
        C.to(x.dtype), B.to(x.dtype), values, (dt * A).float(), state, output_final_state
    )
    return skip(out, x, D).to(x.dtype), state.mT if output_final_state else None
