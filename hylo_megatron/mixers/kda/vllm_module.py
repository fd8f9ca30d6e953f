"""Kimi Delta Attention as vLLM's own layer for Kimi Linear runs it, with what differs in ours."""

from inspect import signature
from types import SimpleNamespace

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateDtypeCalculator, MambaStateShapeCalculator
from vllm.platforms import current_platform

from hylo_megatron.errors import HyLoError
from hylo_megatron.kernels import gated_rms_norm, kda_decay
from hylo_megatron.kernels.rope import Angles
from hylo_megatron.mixers.kda.geometry import KDAGeometry
from hylo_megatron.mixers.vllm_operators import register, split_at
from hylo_megatron.mixers.vllm_states import GDNBackend
from hylo_megatron.mixers.vllm_weights import conv_loader
from hylo_megatron.mixers.vllm_window import WithWindow

try:
    from vllm.model_executor.layers.mamba.gdn.kimi_gdn_linear_attn import KimiGatedDeltaNetAttention
except ImportError as error:
    raise HyLoError(f"vLLM here has no layer for Kimi Delta Attention ({error}): install vLLM 0.32") from error


def check_layer(layer: type) -> None:
    """Raise ``HyLoError`` for a layer of vLLM that is not built as 0.32 builds it."""
    if "mixed_qkv" not in signature(layer._forward).parameters:  # 0.26 has a convolution and a projection for each
        raise HyLoError(
            "vLLM here keeps queries, keys and values of Kimi Delta Attention apart, as 0.26 does, where the plugin"
            " expects them in one tensor: install vLLM 0.32"
        )


check_layer(KimiGatedDeltaNetAttention)
OP = "hylo_kimi_delta_attention"


class HyLoKimiDeltaAttention(WithWindow, KimiGatedDeltaNetAttention):
    """vLLM's layer with our eps of the norm, in a model that is compiled.

    Kimi Linear is not compiled. A compiled model needs what reads vLLM's metadata, ``_forward``, in an operator at
    which vLLM splits the graph.
    """

    def __init__(self, config, vllm_config, prefix: str):
        kda: KDAGeometry = config.geometry().kda
        sizes = dict(num_heads=kda.num_heads, head_dim=kda.head_dim, short_conv_kernel_size=kda.conv_kernel)
        fields = ("hidden_size", "hidden_act", "rms_norm_eps")
        kimi = SimpleNamespace(**{name: getattr(config, name) for name in fields}, linear_attn_config=sizes)
        super().__init__(kimi, vllm_config, prefix)
        self.o_norm.eps = kda.norm_eps or config.rms_norm_eps
        self.conv1d.weight.weight_loader = conv_loader([self.projection_size] * 3, self.tp_size, self.tp_rank)
        split_at(OP, vllm_config)

    def _forward(self, mixed_qkv: Tensor, g1: Tensor, g2: Tensor, beta: Tensor, core_attn_out: Tensor) -> None:
        getattr(torch.ops.vllm, OP)(mixed_qkv, g1, g2, beta, core_attn_out, self.prefix)

    def get_attn_backend(self):
        return GDNBackend

    def mix(self, hidden_TD: Tensor, angles: Angles) -> Tensor:
        return self._forward_plain(hidden_TD, angles) if current_platform.is_cpu() else self(hidden_TD, None)

    def _forward_plain(self, hidden_TD: Tensor, angles: Angles) -> Tensor:
        from hylo_megatron.mixers.vllm_cpu import gated_delta_rule

        merged = self.in_proj_qkvgfab(hidden_TD)[0]
        qkv, beta, low = merged.split([3 * self.local_projection_size, self.local_num_heads, self.head_dim], -1)
        decay, gate = self.f_b_proj(low)[0], self.g_b_proj(self.g_a_proj(hidden_TD)[0])[0]
        decay, gate = (x.unflatten(-1, (-1, self.head_dim)) for x in (decay, gate))
        out = hidden_TD.new_zeros(gate.shape)
        decay = kda_decay(decay, self.A_log, self.dt_bias)
        gated_delta_rule(self, qkv, decay, beta, out, angles, key_dim=self.head_dim, keys_last=False)
        out = gated_rms_norm(out, gate, self.o_norm.weight, self.o_norm.eps, activation="sigmoid")
        return self.o_proj(out.flatten(1))[0]


def _run(qkv: Tensor, decay: Tensor, gate: Tensor, beta: Tensor, out: Tensor, layer: str) -> None:
    layer = get_forward_context().no_compile_layers[layer]
    states = getattr(layer, "kv_cache", ())
    layer.kv_cache = states[:2]  # vLLM's function expects no window's places behind its two
    try:
        KimiGatedDeltaNetAttention._forward(layer, mixed_qkv=qkv, g1=decay, g2=gate, beta=beta, core_attn_out=out)
    finally:
        layer.kv_cache = states


register(OP, _run, "out")


state_dtypes = MambaStateDtypeCalculator.kda_state_dtype


def state_shapes(tp: int, kda: KDAGeometry):
    """Return the shapes of a request's states on one rank: the window of the convolutions, the recurrent state."""
    return MambaStateShapeCalculator.kda_state_shape(tp, kda.num_heads, kda.head_dim, conv_kernel_size=kda.conv_kernel)


LAYER = HyLoKimiDeltaAttention
