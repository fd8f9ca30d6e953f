"""The rotation of queries and keys in Gated DeltaNet on a GPU, between vLLM's convolution and its recurrence.

Tokens that continue a request one by one come first in a batch. vLLM passes their queries and keys through
``rearrange_mixed_qkv`` and those of prompts, normed already, to the layer's ``chunk_gated_delta_rule``. A rotation
keeps the norm, so both places rotate. vLLM's packed kernel for decoding passes neither and is switched off.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context

from hylo_megatron import kernels
from hylo_megatron.errors import HyLoError
from hylo_megatron.mixers.vllm_operators import register, split_at

OP = "hylo_rotated_gated_delta_net"
PLACES = ("_forward_core", "rearrange_mixed_qkv", "split_ba", "enable_packed_recurrent_decode")


@dataclass(kw_only=True)
class Rotating:
    """Cosines and sines ``[T, P]`` of a pass, of factor 1, and the number of tokens that were rotated so far."""

    cos: Tensor
    sin: Tensor
    done: int = 0

    def turn(self, q: Tensor, k: Tensor, first: int) -> tuple[Tensor, ...]:
        """Rotate ``[1, t, heads, 2 P]``, of which the first token is number ``first`` of the batch."""
        tokens = slice(first, first + q.shape[1])
        self.done += q.shape[1]
        cos, sin = self.cos[tokens], self.sin[tokens]
        return tuple(kernels.ops_for(x).rotate(x.transpose(0, 1), cos, sin).transpose(0, 1) for x in (q, k))


class RotatedRule(nn.Module):
    """vLLM's rule for prompts on rotated queries and keys; a pass that measures memory has no ``rotating``."""

    def __init__(self, rule: nn.Module):
        super().__init__()
        self.rule, self.gdn_prefill_backend = rule, rule.gdn_prefill_backend
        self.rotating: Rotating | None = None

    def forward(self, q: Tensor, k: Tensor, **kwargs):
        if self.rotating is not None:
            q, k = self.rotating.turn(q, k, len(self.rotating.cos) - q.shape[1])
        return self.rule(q=q, k=k, **kwargs)


class RotatedQueriesAndKeys:
    """Part of a Gated DeltaNet layer of vLLM that rotates queries and keys. ``rotate`` prepares the layer."""

    rotates = False

    def rotate(self, vllm_config) -> None:
        """Let the layer rotate. Raises ``HyLoError`` if vLLM's layer lacks a place where this happens."""
        if missing := [name for name in PLACES if not hasattr(self, name)]:
            raise HyLoError(
                f"linear_rope in config.json: vLLM's Gated DeltaNet here has no {', '.join(missing)}; install another"
                " version of vLLM that hylo doctor lists, or use transformers"
            )
        self.rotates, self.enable_packed_recurrent_decode = True, False
        self.chunk_gated_delta_rule = RotatedRule(self.chunk_gated_delta_rule)
        split_at(OP, vllm_config)

    def rearrange_mixed_qkv(self, mixed_qkv: Tensor | None) -> tuple:
        q, k, v = super().rearrange_mixed_qkv(mixed_qkv)
        if q is None or not self.rotates:
            return q, k, v
        return *self.chunk_gated_delta_rule.rotating.turn(q, k, 0), v

    def forward_rotated(self, hidden_TD: Tensor, cos_T1P: Tensor, sin_T1P: Tensor) -> Tensor:
        """Return the layer's output, as vLLM's ``forward_cuda`` does."""
        values = self.value_dim // self.tp_size
        qkvz, ba = self.in_proj_qkvz(hidden_TD)[0], self.in_proj_ba(hidden_TD)[0]
        qkv, z = qkvz.split([qkvz.shape[-1] - values, values], -1)
        z_THV = z.reshape(len(z), -1, self.head_v_dim)
        b, a = (x.contiguous() for x in self.split_ba(ba))
        out_THV = torch.zeros_like(z_THV)
        getattr(torch.ops.vllm, OP)(qkv, b, a, cos_T1P.squeeze(1), sin_T1P.squeeze(1), out_THV, self.prefix)
        return self._output_projection(out_THV, z_THV)

    def core_rotated(self, qkv: Tensor, b: Tensor, a: Tensor, cos_TP: Tensor, sin_TP: Tensor, out: Tensor) -> None:
        """Fill ``out`` with vLLM's ``_forward_core``. Raises ``HyLoError`` if some token was not rotated."""
        metadata = get_forward_context().attn_metadata
        metadata = None if metadata is None else metadata.get(self.prefix)
        if metadata is None:
            self._forward_core(mixed_qkv=qkv, b=b, a=a, core_attn_out=out)
            return
        tokens = metadata.num_actual_tokens
        rotating = Rotating(cos=cos_TP[:tokens].contiguous(), sin=sin_TP[:tokens].contiguous())
        self.chunk_gated_delta_rule.rotating = rotating
        try:
            self._forward_core(mixed_qkv=qkv, b=b, a=a, core_attn_out=out)
        finally:
            self.chunk_gated_delta_rule.rotating = None
        if rotating.done != tokens:
            raise HyLoError(
                f"linear_rope in config.json: vLLM's Gated DeltaNet here read {tokens} tokens and let {rotating.done}"
                " of them be rotated; install vLLM 0.26 or 0.32, or use transformers"
            )


def _run(qkv: Tensor, b: Tensor, a: Tensor, cos_TP: Tensor, sin_TP: Tensor, out_THV: Tensor, layer: str) -> None:
    get_forward_context().no_compile_layers[layer].core_rotated(qkv, b, a, cos_TP, sin_TP, out_THV)


register(OP, _run, "out_THV")
