"""megatron-core's Gated DeltaNet with fp32 decay parameters and kernels through ``kernels.ops``."""

from functools import partial
from typing import ClassVar

from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from hylo_megatron.config import Architecture
from hylo_megatron.kernels import log_decay, ops_for
from hylo_megatron.mixers.gdn import MIXER
from hylo_megatron.mixers.megatron_layers import Backend, HeadRMSNorm, transformer_layer
from hylo_megatron.mixers.megatron_linear import LinearMixer, sharing
from hylo_megatron.mixers.state_passing import chunk_delta_rule
from hylo_megatron.parallel.zigzag import from_rows, to_rows

TRANSFORMER_FIELDS = {
    "linear_conv_kernel_dim": "conv_kernel",
    "linear_key_head_dim": "key_head_dim",
    "linear_value_head_dim": "value_head_dim",
    "linear_num_key_heads": "num_key_heads",
    "linear_num_value_heads": "num_value_heads",
}


def layer_spec(backend: Backend, arch: Architecture, linear_cp: str = "auto") -> ModuleSpec:
    """Return the spec of the layer that holds this mixer. ``linear_cp``: ``--hylo-linear-cp``."""
    mixer = ModuleSpec(
        module=GDNMixer,
        params={"norm_eps": arch.geometry.gdn.norm_eps, **sharing(MIXER, arch, linear_cp, backend)},
        submodules=GatedDeltaNetSubmodules(
            in_proj=backend.projection, out_norm=HeadRMSNorm, out_proj=backend.row_linear
        ),
    )
    return transformer_layer(backend, mixer)


class GDNMixer(LinearMixer, GatedDeltaNet):
    """Gated DeltaNet (arXiv 2412.06464), ``hidden_SBD -> (out_SBD, None)``.

    megatron-core's forward pass copies between layouts at every step, writes out repeated key heads and fp32 copies,
    and compiles its helpers anew in every process; this one goes straight to the kernels. Only the all-to-all of
    context parallelism takes megatron-core's, with the same kernels. Legend: M key heads, H value heads, K key dim,
    V value dim; B sequences, or their chunks.
    """

    fp32_names = MIXER.fp32
    across_ranks: ClassVar = {"chunk_gated_delta_rule": partial(chunk_delta_rule, "chunk_gated_delta_rule")}

    def __init__(self, config, *args, pp_layer_offset=None, norm_eps: float | None = None, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.gated_delta_rule = self._normed_delta_rule
        self.out_norm.eps = norm_eps or self.out_norm.eps

    def mix(self, hidden_states: Tensor, attention_mask=None, **kwargs):
        packed = kwargs.get("packed_seq_params")
        if self.chunks > 1 or self.rotary is not None:
            self.refuse_packed(packed)
        if self.chunks == 1 and (self.cp_size > 1 or self.recompute_norm_out or packed is not None):
            return GatedDeltaNet.forward(self, hidden_states, attention_mask, **kwargs)
        x_SBC, _ = self.in_proj(hidden_states)
        run = self.kernels(x_SBC)
        sections = run.split_convolve(
            to_rows(x_SBC, self.chunks), self.conv1d.weight.squeeze(1), self.conv1d.bias, self.in_proj_split_sections
        )
        del x_SBC  # of which the rows are a copy where states pass between ranks
        q_BSMK, k_BSMK = self.rotate(*(x.unflatten(-1, (-1, self.key_head_dim)) for x in sections[:2]))
        v_BSHV, gate_BSHV = (x.unflatten(-1, (-1, self.value_head_dim)) for x in sections[2:4])
        beta_BSH, alpha_BSH = sections[4:]
        g_BSH, beta_BSH = self._compute_g_and_beta(self.A_log, self.dt_bias, alpha_BSH, beta_BSH)
        out_BSHV, _ = run.chunk_gated_delta_rule(
            q_BSMK, k_BSMK, v_BSHV, g=g_BSH, beta=beta_BSH, use_qk_l2norm_in_kernel=True
        )
        out_BSV = self._apply_gated_norm(out_BSHV, gate_BSHV).flatten(2)
        if self.config.sequence_parallel:  # scatters along the first dimension
            return self.out_proj(from_rows(out_BSV, self.chunks).contiguous())
        out_BSD, bias = self.out_proj(out_BSV)
        return from_rows(out_BSD, self.chunks).contiguous(), bias

    def _prepare_input_for_gated_delta_rule(self, qkv, gate, batch, seq_len, *gate_feats):
        qk, v = self.qk_dim_local_tp // self.cp_size, self.v_dim_local_tp // self.cp_size
        q, k, v = qkv.split([qk, qk, v], -1)
        q_BSMK, k_BSMK = self.rotate(*(x.unflatten(-1, (-1, self.key_head_dim)) for x in (q, k)))
        return q_BSMK, k_BSMK, v.unflatten(-1, (-1, self.value_head_dim)), gate, *gate_feats

    def _compute_g_and_beta(self, A_log_H: Tensor, dt_bias_H: Tensor, alpha_BSH: Tensor, beta_BSH: Tensor):
        return log_decay(alpha_BSH, A_log_H, dt_bias_H), beta_BSH.sigmoid()

    def _apply_gated_norm(self, x_BSHV: Tensor, gate_BSHV: Tensor) -> Tensor:
        weight = self.out_norm.shared_weight()
        return ops_for(x_BSHV).gated_rms_norm(x_BSHV, gate_BSHV, weight, self.out_norm.eps)

    def _normed_delta_rule(self, q_BSMK: Tensor, k_BSMK: Tensor, v_BSHV: Tensor, **kwargs):
        """Normalise queries and keys inside the kernel, which then need not be kept in both forms."""
        rule = self.kernels(v_BSHV).chunk_gated_delta_rule
        return rule(q_BSMK, k_BSMK, v_BSHV, **kwargs | {"use_qk_l2norm_in_kernel": True})
