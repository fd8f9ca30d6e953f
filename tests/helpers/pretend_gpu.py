"""Kernels of a GPU that do nothing, on a CPU. Tensors have the shapes that they would have, and no values."""

import contextlib
import types

import torch
import torch.nn.functional as F


class _RMSNorm(torch.autograd.Function):
    """torch's on a GPU saves its input and the statistics; on a CPU it is made of several functions."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, d_y):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None, None


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, *mask):
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32), *mask)
        return out

    @staticmethod
    def backward(ctx, d_out):
        return *(torch.empty_like(x) for x in ctx.saved_tensors[:3]), *[None for _ in ctx.saved_tensors[5:]]


def _attention(q, k, v, mask=None, **_):
    masks = [] if mask is None else [mask]  # with which another kernel runs, for which nothing is padded
    missing = 0 if masks else max(0, q.shape[-1] - v.shape[-1])  # as CoreAttention pads on a GPU
    return _FlashAttention.apply(q, k, F.pad(v, (0, missing)) if missing else v, *masks)


def _attend(q, k, v, *_):
    """Return output in the layout of ``q``, and denominators. One width is as ``attend`` pads on a GPU."""
    batch, heads, length, key = q.shape
    out = q.new_empty(length, batch, heads, max(key, v.shape[-1])).permute(1, 2, 0, 3)
    return out[..., : v.shape[-1]], q.new_empty(q.shape[:3], dtype=torch.float32)


def pretend_gpu() -> None:
    """GPU paths of the layers, with kernels that do nothing."""
    from fla.modules.convolution import causal_conv1d
    from megatron.core.ssm.gated_delta_net import gdn
    from megatron.core.tensor_parallel import random
    from triton.runtime import jit

    from hylo_megatron.distill import kl_fused
    from hylo_megatron.kernels import attention, choose, norm, window
    from hylo_megatron.mixers import megatron_attention, megatron_layers

    jit.KernelInterface.__getitem__ = lambda self, grid: lambda *args, **kwargs: None
    choose.ops = lambda *_: choose._fused()
    gdn.causal_conv1d = causal_conv1d
    norm.rms_norm = megatron_layers.rms_norm = _RMSNorm.apply
    megatron_attention.F = window.F = types.SimpleNamespace(**vars(F) | {"scaled_dot_product_attention": _attention})
    attention.attend = _attend
    kl_fused.fits = lambda *_: True
    kl_fused._kernels = lambda: [type("Kernel", (), {"__getitem__": lambda *_: lambda *args, **kwargs: None})()] * 2
    # random states have values, which the tensors of whole steps have not
    random.CudaRNGStatesTracker.fork = lambda *_: contextlib.nullcontext()
    random._fork_rng, random._get_all_rng_states = contextlib.nullcontext, tuple
    random._set_all_rng_states = lambda *_: None
