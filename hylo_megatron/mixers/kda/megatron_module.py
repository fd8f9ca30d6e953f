"""Kimi Delta Attention (arXiv 2510.26692, section 3) for megatron-core, which has none.

Tensor parallelism splits heads. Of the two bottlenecks the narrow matrices are replicated, as MLA's are, and the wide
ones are split. Context parallelism passes states (``parallel/state_passing.py``) or deals heads out by all-to-all.

Legend: S sequence, B batch (with context parallelism its chunks), D model, H heads of this rank, K head dim,
V = H*K, C channels.
"""

from functools import partial
from typing import ClassVar

import torch
from megatron.core.ssm.gated_delta_net.common import get_parameter_local_cp, tensor_a2a_cp2hp, tensor_a2a_hp2cp
from megatron.core.ssm.mamba_mixer import _split_tensor_factory
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from torch import Tensor, nn

from hylo_megatron.config import Architecture
from hylo_megatron.errors import HyLoError
from hylo_megatron.mixers.kda import MIXER
from hylo_megatron.mixers.kda.geometry import KDAGeometry
from hylo_megatron.mixers.megatron_layers import Backend, HeadRMSNorm, ReplicatedLinear, transformer_layer
from hylo_megatron.mixers.megatron_linear import LinearMixer, sharing
from hylo_megatron.mixers.state_passing import chunk_delta_rule
from hylo_megatron.parallel.zigzag import from_rows, to_rows

TRANSFORMER_FIELDS = {  # by which megatron-core counts operations
    "linear_conv_kernel_dim": "conv_kernel",
    "linear_key_head_dim": "head_dim",
    "linear_value_head_dim": "head_dim",
    "linear_num_key_heads": "num_heads",
    "linear_num_value_heads": "num_heads",
}


def layer_spec(backend: Backend, arch: Architecture, linear_cp: str = "auto") -> ModuleSpec:
    """Return the spec of the layer that holds this mixer. ``linear_cp``: ``--hylo-linear-cp``."""
    params = {"geometry": arch.geometry.kda, "backend": backend, **sharing(MIXER, arch, linear_cp, backend)}
    return transformer_layer(backend, ModuleSpec(module=KDAMixer, params=params))


class _Parameters(MegatronModule):
    """Parameters of the mixer, and how they lie in distributed checkpoints."""

    def __init__(self, config, *, geometry: KDAGeometry, backend: Backend, layer_number: int, pg_collection, **_):
        super().__init__(config)
        self.layer_number, self.pg_collection, self.head_dim = layer_number, pg_collection, geometry.head_dim
        tp, width = pg_collection.tp.size(), geometry.num_heads * geometry.head_dim
        self.heads, self.width = geometry.num_heads // tp, width // tp
        column = partial(backend.column, config=config, tp_group=pg_collection.tp)
        self.in_proj = column(config.hidden_size, 3 * width + geometry.num_heads, kind=backend.projection)
        self.down = ReplicatedLinear(config.hidden_size, 2 * self.head_dim, config)
        self.decay_up = column(self.head_dim, width)
        self.gate_up = column(self.head_dim, width)
        self.out_proj = backend.row(width, config.hidden_size, config, pg_collection.tp)
        self.out_norm = HeadRMSNorm(config, self.head_dim, geometry.norm_eps or config.layernorm_epsilon)
        self.conv_weight = self._split_by_heads(3 * self.width, 1, geometry.conv_kernel)
        self.A_log, self.dt_bias = self._split_by_heads(self.heads), self._split_by_heads(self.width)
        if config.perform_initialization:
            with get_cuda_rng_tracker().fork():
                nn.init.uniform_(self.conv_weight, -(geometry.conv_kernel**-0.5), geometry.conv_kernel**-0.5)
                self.A_log.data.uniform_(1, 16).log_()
                nn.init.ones_(self.dt_bias)

    def _split_by_heads(self, *shape: int) -> nn.Parameter:
        """Return a parameter whose first dimension tensor-parallel ranks share."""
        values = torch.empty(*shape, dtype=self.config.params_dtype, device=torch.cuda.current_device())
        parameter = nn.Parameter(values)
        parameter.tensor_model_parallel, parameter.partition_dim = True, 0
        return parameter

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None, tp_group=None):
        """Return the state for distributed checkpoints, which have queries, keys and values apart."""
        metadata, tp = ensure_metadata_has_dp_cp_group(metadata), tp_group or self.pg_collection.tp
        own: dict = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        state = make_sharded_tensors_for_checkpoint(
            own, prefix, dict.fromkeys(("A_log", "dt_bias", "conv_weight"), 0), sharded_offsets, tp_group=tp,
            dp_cp_group=metadata["dp_cp_group"],
        )  # fmt: skip
        for name, module in self.named_children():
            state |= sharded_state_dict_default(module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=tp)
        names = ["query", "key", "value"]
        for key, sizes, sections in (
            ("conv_weight", [self.width] * 3, names),
            ("in_proj.weight", [self.width] * 3 + [self.heads], [*names, "beta"]),
        ):
            state[prefix + key] = _split_tensor_factory(state[prefix + key], sizes, sections, 0)
        return state


class KDAMixer(LinearMixer, _Parameters):
    """Kimi Delta Attention, ``hidden_SBD -> (out_SBD, None)``, a ``self_attention`` of megatron's layer."""

    fp32_names = MIXER.fp32
    across_ranks: ClassVar = {"chunk_kda": partial(chunk_delta_rule, "chunk_kda")}

    def mix(self, hidden_states: Tensor, attention_mask=None, packed_seq_params=None, **_):
        if packed_seq_params is not None:
            raise HyLoError("packed sequences: Kimi Delta Attention trains on one sequence a row; use --linear gdn")
        decay_SBK, gate_SBK = (x_SBK.contiguous() for x_SBK in self.down(hidden_states).chunk(2, -1))  # for NCCL
        rows = self._whole_sequence(
            self.in_proj(hidden_states)[0], self.decay_up(decay_SBK)[0], self.gate_up(gate_SBK)[0]
        )
        out_SBV = self._mix(*rows)
        out_SBV = tensor_a2a_hp2cp(out_SBV, 0, -1, self.pg_collection.cp)
        return self.out_proj(out_SBV)

    def _whole_sequence(self, x_SBC: Tensor, decay_SBV: Tensor, gate_SBV: Tensor) -> tuple[Tensor, ...]:
        """Return the inputs of ``_mix``, in rows: after an all-to-all, all positions and some heads.

        Where states pass between ranks, rows are copies. Nothing keeps what they are copies of.
        """
        group, sections = self.pg_collection.cp, [*[self.width] * 3, self.heads]
        if group.size() > 1:
            x_SBC = tensor_a2a_cp2hp(x_SBC, 0, -1, group, split_sections=sections)
            decay_SBV, gate_SBV = (tensor_a2a_cp2hp(x, 0, -1, group) for x in (decay_SBV, gate_SBV))
        own = [get_parameter_local_cp(parameter, 0, group) for parameter in (self.A_log, self.dt_bias)]
        taps = get_parameter_local_cp(self.conv_weight, 0, group, [self.width] * 3)
        rows = (to_rows(each, self.chunks) for each in (x_SBC, decay_SBV, gate_SBV))
        return *rows, taps.squeeze(1), *own

    def _mix(self, x_BSC, decay_BSV, gate_BSV, taps_CW, A_log_H, dt_bias_V) -> Tensor:
        """Return ``out_SBV``: convolution, recurrence, norm and gate."""
        run, width, heads = self.kernels(x_BSC), len(dt_bias_V), len(A_log_H)
        *qkv, beta_BSH = run.split_convolve(x_BSC, taps_CW, None, (*[width] * 3, heads))
        parts = (*qkv, decay_BSV, gate_BSV)
        q_BSHK, k_BSHK, v_BSHK, decay_BSHK, gate_BSHK = (x.unflatten(-1, (heads, -1)) for x in parts)
        q_BSHK, k_BSHK = self.rotate(q_BSHK, k_BSHK)
        out_BSHK, _ = run.chunk_kda(
            q_BSHK, k_BSHK, v_BSHK, g=decay_BSHK, beta=beta_BSH.sigmoid(), A_log=A_log_H, dt_bias=dt_bias_V,
            use_qk_l2norm_in_kernel=True,
        )  # fmt: skip
        weight, eps = self.out_norm.shared_weight(), self.out_norm.eps
        out_BSHK = run.gated_rms_norm(out_BSHK, gate_BSHK, weight, eps, activation="sigmoid")
        return from_rows(out_BSHK.flatten(2), self.chunks).contiguous()
