"""Gated DeltaNet and Mamba-2 as vLLM's own layers run them, with what differs in ours."""

from torch import Tensor, nn
from vllm.model_executor.layers.layernorm import RMSNormGated
from vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn import QwenGatedDeltaNetAttention
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
from vllm.platforms import current_platform

from hylo_megatron.engine.register import install
from hylo_megatron.hf.mamba2 import NORM_EPS
from hylo_megatron.serve.config import trained_geometry
from hylo_megatron.serve.versions import GDNBackend, Mamba2Backend
from hylo_megatron.serve.weights import conv_loader


def keep_fp32(module: nn.Module, *names: str) -> None:
    """vLLM makes them in the model's dtype; rounding them changes every decay."""
    for name in names:
        parameter = getattr(module, name)
        wide = nn.Parameter(parameter.data.float(), requires_grad=False)
        wide.weight_loader = parameter.weight_loader
        setattr(module, name, wide)


class HyLoGatedDeltaNet(QwenGatedDeltaNetAttention):
    """Norm and gate span the trained value heads, also where the kernel runs several in the place of one."""

    def __init__(self, config, vllm_config, prefix: str):
        super().__init__(config, vllm_config, prefix=prefix, gqa_interleaved_layout=False)
        keep_fp32(self, "dt_bias")
        parts = [self.key_dim, self.key_dim, self.value_dim]
        self.conv1d.weight.weight_loader = conv_loader(parts, self.tp_size, self.tp_rank)
        self.norm_dim = trained_geometry(config).gdn.value_head_dim
        eps = config.linear_norm_eps or self.layer_norm_epsilon
        if (self.norm_dim, eps) != (self.head_v_dim, self.layer_norm_epsilon):
            self.layer_norm_epsilon = eps  # the engine's fused norm takes it from here
            self.norm = RMSNormGated(
                self.norm_dim, eps=eps, group_size=None, norm_before_gate=True,
                device=current_platform.current_device(),
            )  # fmt: skip
        if current_platform.is_cpu():
            self._forward_method = self._forward_plain

    def get_attn_backend(self):
        return GDNBackend

    def _output_projection(self, core_attn_out: Tensor, z: Tensor) -> Tensor:
        tokens = z.shape[0]
        out = self.norm(core_attn_out.reshape(-1, self.norm_dim), z.reshape(-1, self.norm_dim))
        return self.out_proj(out.reshape(tokens, -1))[0]

    def _forward_plain(self, hidden_TD: Tensor) -> Tensor:
        from hylo_megatron.serve.cpu import gated_delta_net

        values = self.value_dim // self.tp_size
        qkvz, ba = self.in_proj_qkvz(hidden_TD)[0], self.in_proj_ba(hidden_TD)[0]
        qkv, z = qkvz.split([qkvz.shape[-1] - values, values], -1)
        beta, decay = ba.chunk(2, -1)
        out = hidden_TD.new_zeros(len(hidden_TD), values // self.head_v_dim, self.head_v_dim)
        gated_delta_net(self, qkv, beta, decay, out)
        return self._output_projection(out, z)


class HyLoMamba2(MambaMixer2):
    def __init__(self, config, vllm_config, prefix: str):
        install("vllm model")
        super().__init__(
            hidden_size=config.hidden_size, ssm_state_size=config.mamba_state_size,
            conv_kernel_size=config.mamba_conv_kernel,
            intermediate_size=config.mamba_num_heads * config.mamba_head_dim, use_conv_bias=True, use_bias=False,
            n_groups=config.mamba_num_groups, num_heads=config.mamba_num_heads, head_dim=config.mamba_head_dim,
            rms_norm_eps=NORM_EPS, activation="silu", model_config=vllm_config.model_config,
            cache_config=vllm_config.cache_config, quant_config=vllm_config.quant_config, prefix=prefix,
        )  # fmt: skip
        keep_fp32(self, "dt_bias", "D")

    def get_attn_backend(self):
        return Mamba2Backend


def linear_block(config, vllm_config, prefix: str) -> nn.Module:
    return (HyLoMamba2 if config.linear_type == "mamba2" else HyLoGatedDeltaNet)(config, vllm_config, prefix)
