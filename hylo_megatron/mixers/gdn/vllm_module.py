"""Gated DeltaNet as vLLM's own layer runs it, with what differs in ours."""

from torch import Tensor
from vllm.model_executor.layers.layernorm import RMSNormGated
from vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn import QwenGatedDeltaNetAttention
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateDtypeCalculator, MambaStateShapeCalculator
from vllm.platforms import current_platform

from hylo_megatron.kernels import log_decay
from hylo_megatron.kernels.rope import Angles
from hylo_megatron.mixers.gdn import MIXER
from hylo_megatron.mixers.gdn.geometry import GDNGeometry
from hylo_megatron.mixers.gdn.vllm_rotation import RotatedQueriesAndKeys
from hylo_megatron.mixers.serving import trained_geometry
from hylo_megatron.mixers.vllm_states import GDNBackend
from hylo_megatron.mixers.vllm_weights import conv_loader, keep_fp32
from hylo_megatron.mixers.vllm_window import WithWindow


class HyLoGatedDeltaNet(WithWindow, RotatedQueriesAndKeys, QwenGatedDeltaNetAttention):
    """Norm and gate span the trained value heads, also where the kernel runs several in the place of one."""

    def __init__(self, config, vllm_config, prefix: str):
        super().__init__(config, vllm_config, prefix=prefix, gqa_interleaved_layout=False)
        keep_fp32(self, MIXER.fp32)
        parts = [self.key_dim, self.key_dim, self.value_dim]
        self.conv1d.weight.weight_loader = conv_loader(parts, self.tp_size, self.tp_rank)
        self.norm_dim = trained_geometry(config).gdn.value_head_dim
        eps = config.linear_norm_eps or self.layer_norm_epsilon
        if (self.norm_dim, eps) != (self.head_v_dim, self.layer_norm_epsilon):
            self.layer_norm_epsilon = eps  # vLLM's fused norm reads it
            device = current_platform.current_device()
            self.norm = RMSNormGated(self.norm_dim, eps=eps, group_size=None, norm_before_gate=True, device=device)
        if config.linear_rope and not current_platform.is_cpu():
            self.rotate(vllm_config)

    def get_attn_backend(self):
        return GDNBackend

    def mix(self, hidden_TD: Tensor, angles: Angles) -> Tensor:
        if current_platform.is_cpu():
            return self._forward_plain(hidden_TD, angles)
        if self.rotates:
            return self.forward_rotated(hidden_TD, angles.linear_cos, angles.linear_sin)
        return self(hidden_TD)

    def _output_projection(self, core_attn_out: Tensor, z: Tensor) -> Tensor:
        tokens = z.shape[0]
        out = self.norm(core_attn_out.reshape(-1, self.norm_dim), z.reshape(-1, self.norm_dim))
        return self.out_proj(out.reshape(tokens, -1))[0]

    def _forward_plain(self, hidden_TD: Tensor, angles: Angles) -> Tensor:
        from hylo_megatron.mixers.vllm_cpu import gated_delta_rule

        values = self.value_dim // self.tp_size
        qkvz, ba = self.in_proj_qkvz(hidden_TD)[0], self.in_proj_ba(hidden_TD)[0]
        qkv, z = qkvz.split([qkvz.shape[-1] - values, values], -1)
        beta, decay = ba.chunk(2, -1)
        out = hidden_TD.new_zeros(len(hidden_TD), values // self.head_v_dim, self.head_v_dim)
        decay = log_decay(decay, self.A_log, self.dt_bias)
        gated_delta_rule(self, qkv, decay, beta, out, angles, key_dim=self.head_k_dim, keys_last=True)
        return self._output_projection(out, z)


state_dtypes = MambaStateDtypeCalculator.gated_delta_net_state_dtype


def state_shapes(tp: int, gdn: GDNGeometry):
    """Return the shapes of a request's states on one rank: the window of the convolutions, the recurrent state."""
    heads, dims = (gdn.num_key_heads, gdn.num_value_heads), (gdn.key_head_dim, gdn.value_head_dim)
    return MambaStateShapeCalculator.gated_delta_net_state_shape(tp, *heads, *dims, gdn.conv_kernel)


LAYER = HyLoGatedDeltaNet
