"""megatron's Gated DeltaNet and Mamba-2 mixers: decay parameters in fp32, kernels through ``kernels.ops``.

Context parallelism: the engine's all-to-all, after which a rank has some heads of the whole sequence; or its own part
of the sequence with all heads and states that come from the part before (``state_passing.py``). In the second case the
engine's mixer is told of one rank.
"""

import torch.nn.functional as F
from megatron.core.ssm.gated_delta_net import GatedDeltaNet
from megatron.core.ssm.mamba_mixer import MambaMixer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor

from hylo_megatron.config.layout import passes_states
from hylo_megatron.errors import HyLoError
from hylo_megatron.kernels import mamba_split_conv1d_scan_combined, ops_for
from hylo_megatron.kernels.norm import wide
from hylo_megatron.parallel.state_passing import kernels_across, without_context_parallelism
from hylo_megatron.parallel.zigzag import from_rows, to_rows


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

    ``exact_width``: without them. The engine's all-to-all cuts the projection by its own sizes.
    """

    exact_width = False

    def _forward_impl(self, input, weight, *args, **kwargs):
        missing = 0 if self.exact_width else -len(weight) % 16
        return super()._forward_impl(input, F.pad(weight, (0, 0, 0, missing)) if missing else weight, *args, **kwargs)


class _SharedSequence:
    """Sets ``kernels``, which choose by tensor, and ``stretches``: 2 where states are passed, else 1."""

    def __init__(self, config, *args, pg_collection=None, linear_cp: str = "auto", **kwargs):
        tp, cp = pg_collection.tp.size(), pg_collection.cp.size()
        states = passes_states(linear_cp, self.heads_to_divide(config), tp, cp)
        groups = without_context_parallelism(pg_collection) if states else pg_collection
        super().__init__(config, *args, pg_collection=groups, **kwargs)
        self.stretches, self.kernels = (2, kernels_across(pg_collection.cp)) if states else (1, ops_for)
        self.in_proj.exact_width = cp > 1 and not states

    def refuse_packed(self, packed_seq_params) -> None:
        if packed_seq_params is not None:
            raise HyLoError("packed sequences under context parallelism need --hylo-linear-cp a2a")


class GDNMixer(_FP32Decay, _SharedSequence, GatedDeltaNet):
    """Gated DeltaNet (arXiv 2412.06464), ``hidden_SBD -> (out_SBD, None)``.

    The engine's own forward pass copies between layouts at every step, writes out repeated key heads and fp32 copies,
    and compiles its helpers anew in every process; this one goes straight to the kernels. Only the all-to-all of
    context parallelism takes the engine's, with the same kernels. Legend: M key heads, H value heads, K key dim,
    V value dim; B sequences, or their stretches.
    """

    fp32_names = ("A_log", "dt_bias")

    def __init__(self, config, *args, pp_layer_offset=None, norm_eps: float | None = None, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.gated_delta_rule = _normed_delta_rule
        self.out_norm.eps = norm_eps or self.out_norm.eps

    @staticmethod
    def heads_to_divide(config) -> int:
        return config.linear_num_key_heads

    def forward(self, hidden_states: Tensor, attention_mask=None, **kwargs):
        if self.stretches > 1:
            self.refuse_packed(kwargs.get("packed_seq_params"))
        elif self.cp_size > 1 or self.recompute_norm_out or kwargs.get("packed_seq_params") is not None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        x_SBC, _ = self.in_proj(hidden_states)
        run = self.kernels(x_SBC)
        sections = run.split_convolve(
            to_rows(x_SBC, self.stretches), self.conv1d.weight.squeeze(1), self.conv1d.bias,
            self.in_proj_split_sections,
        )  # fmt: skip
        q_BSMK, k_BSMK = (x.unflatten(-1, (-1, self.key_head_dim)) for x in sections[:2])
        v_BSHV, gate_BSHV = (x.unflatten(-1, (-1, self.value_head_dim)) for x in sections[2:4])
        beta_BSH, alpha_BSH = sections[4:]
        g_BSH, beta_BSH = self._compute_g_and_beta(self.A_log, self.dt_bias, alpha_BSH, beta_BSH)
        out_BSHV, _ = run.chunk_gated_delta_rule(
            q_BSMK, k_BSMK, v_BSHV, g=g_BSH, beta=beta_BSH, use_qk_l2norm_in_kernel=True
        )
        out_BSV = self._apply_gated_norm(out_BSHV, gate_BSHV).flatten(2)
        if self.config.sequence_parallel:  # scatters along the first dimension
            return self.out_proj(from_rows(out_BSV, self.stretches).contiguous())
        out_BSD, bias = self.out_proj(out_BSV)
        return from_rows(out_BSD, self.stretches).contiguous(), bias

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


class Mamba2Mixer(_FP32Decay, _SharedSequence, MambaMixer):
    """Mamba-2 (arXiv 2405.21060), ``hidden_SBD -> (out_SBD, None)``; gated norm per group."""

    fp32_names = ("A_log", "dt_bias", "D")

    @staticmethod
    def heads_to_divide(config) -> int:
        return config.mamba_num_groups

    def forward(self, hidden_states: Tensor, *args, packed_seq_params=None, **kwargs):
        if self.stretches == 1:
            return super().forward(hidden_states, *args, packed_seq_params=packed_seq_params, **kwargs)
        self.refuse_packed(packed_seq_params)
        x_SBC, _ = self.in_proj(hidden_states)
        y_BSV = mamba_split_conv1d_scan_combined(
            to_rows(x_SBC, self.stretches), self.conv1d_weight.squeeze(1), self.conv1d_bias, self.dt_bias,
            -self.A_log.exp(), self.D, self.chunk_size, headdim=self.headdim, ngroups=self.ngroups_local_tp,
            kernels=self.kernels,
        )  # fmt: skip
        return self.out_proj(self.norm(from_rows(y_BSV, self.stretches).contiguous()))
