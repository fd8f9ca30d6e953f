"""megatron's Gated DeltaNet and Mamba-2 mixers: decay parameters in fp32, kernels through ``kernels.ops``."""

import torch.nn.functional as F
from megatron.core.ssm.gated_delta_net import GatedDeltaNet
from megatron.core.ssm.mamba_mixer import MambaMixer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor

from hylo_megatron.kernels import ops_for
from hylo_megatron.kernels.norm import wide


class _FP32Decay:
    """Rounding A_log or dt_bias to bf16 changes the decay, and -inf in A_log has killed runs: they stay fp32.

    ``Float16Module`` casts the whole model; overriding ``_apply`` keeps the named parameters out of it.
    """

    fp32_names: tuple[str, ...] = ()

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for name in self.fp32_names:
            getattr(self, name).data = wide(getattr(self, name).data)

    def _apply(self, fn, recurse=True):
        kept = {name: getattr(self, name).data for name in self.fp32_names}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            parameter = getattr(self, name)
            if parameter.dtype != before.dtype:
                parameter.data = before.to(parameter.device)
        return self


class AlignedColumnParallelLinear(ColumnParallelLinear):
    """Its output ends in zeros that make its width a multiple of 16: tensor cores need aligned rows, and the
    projection of a linear block has two odd columns a head. (SmolLM2's took 50 of 320 ms a step without.)

    Under context parallelism the engine cuts the projection itself, by sizes without the zeros.
    """

    def _forward_impl(self, input, weight, *args, **kwargs):
        missing = -len(weight) % 16 if self.config.context_parallel_size == 1 else 0
        return super()._forward_impl(input, F.pad(weight, (0, 0, 0, missing)) if missing else weight, *args, **kwargs)


class GDNMixer(_FP32Decay, GatedDeltaNet):
    """Gated DeltaNet (arXiv 2412.06464), ``hidden_SBD -> (out_SBD, None)``.

    The engine's own forward pass copies between layouts at every step, writes out repeated key heads and fp32 copies,
    and compiles its helpers anew in every process; this one goes straight to the kernels. Context parallelism takes
    the engine's, with the same kernels. Legend: M key heads, H value heads, K key dim, V value dim.
    """

    fp32_names = ("A_log", "dt_bias")

    def __init__(self, config, *args, pp_layer_offset=None, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.gated_delta_rule = _normed_delta_rule

    def forward(self, hidden_states: Tensor, attention_mask=None, **kwargs):
        if self.cp_size > 1 or self.recompute_norm_out or kwargs.get("packed_seq_params") is not None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        x_SBC, _ = self.in_proj(hidden_states)
        sections = ops_for(x_SBC).split_convolve(
            x_SBC.transpose(0, 1), self.conv1d.weight.squeeze(1), self.conv1d.bias, self.in_proj_split_sections
        )
        q_BSMK, k_BSMK = (x.unflatten(-1, (-1, self.key_head_dim)) for x in sections[:2])
        v_BSHV, gate_BSHV = (x.unflatten(-1, (-1, self.value_head_dim)) for x in sections[2:4])
        beta_BSH, alpha_BSH = sections[4:]
        g_BSH, beta_BSH = self._compute_g_and_beta(self.A_log, self.dt_bias, alpha_BSH, beta_BSH)
        out_BSHV, _ = self.gated_delta_rule(q_BSMK, k_BSMK, v_BSHV, g=g_BSH, beta=beta_BSH)
        out_BSV = self._apply_gated_norm(out_BSHV, gate_BSHV).flatten(2)
        if self.config.sequence_parallel:  # scatters along the first dimension
            return self.out_proj(out_BSV.transpose(0, 1).contiguous())
        out_BSD, bias = self.out_proj(out_BSV)
        return out_BSD.transpose(0, 1).contiguous(), bias

    def _prepare_input_for_gated_delta_rule(self, qkv, gate, batch, seq_len, *gate_feats):
        qk, v = self.qk_dim_local_tp // self.cp_size, self.v_dim_local_tp // self.cp_size
        q, k, v = qkv.split([qk, qk, v], -1)
        q_BSMK, k_BSMK = (x.unflatten(-1, (-1, self.key_head_dim)) for x in (q, k))
        return q_BSMK, k_BSMK, v.unflatten(-1, (-1, self.value_head_dim)), gate, *gate_feats

    def _compute_g_and_beta(self, A_log_H: Tensor, dt_bias_H: Tensor, alpha_BSH: Tensor, beta_BSH: Tensor):
        return -A_log_H.exp() * F.softplus(wide(alpha_BSH) + dt_bias_H), beta_BSH.sigmoid()

    def _apply_gated_norm(self, x_BSHV: Tensor, gate_BSHV: Tensor) -> Tensor:
        weight = self.out_norm.shared_weight()
        return ops_for(x_BSHV).gated_rms_norm(x_BSHV, gate_BSHV, weight, self.out_norm.eps)


def _normed_delta_rule(q_BSMK: Tensor, k_BSMK: Tensor, v_BSHV: Tensor, use_qk_l2norm_in_kernel=False, **kwargs):
    """Normalises queries and keys inside the kernel, which then need not be kept in both forms."""
    rule = ops_for(v_BSHV).chunk_gated_delta_rule
    return rule(q_BSMK, k_BSMK, v_BSHV, use_qk_l2norm_in_kernel=True, **kwargs)


class Mamba2Mixer(_FP32Decay, MambaMixer):
    """Mamba-2 (arXiv 2405.21060), ``hidden_SBD -> (out_SBD, None)``; gated norm per group."""

    fp32_names = ("A_log", "dt_bias", "D")
