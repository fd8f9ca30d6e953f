"""megatron-core's Mamba-2 with fp32 decay parameters and kernels through ``kernels.ops``."""

from typing import ClassVar

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.ssm import mamba_mixer
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from hylo_megatron.config import Architecture
from hylo_megatron.kernels import mamba_split_conv1d_scan_combined, ops_for
from hylo_megatron.mixers.mamba2 import MIXER
from hylo_megatron.mixers.megatron_layers import Backend
from hylo_megatron.mixers.megatron_linear import LinearMixer, sharing
from hylo_megatron.mixers.state_passing import chunk_ssd
from hylo_megatron.parallel.zigzag import from_rows, to_rows

TRANSFORMER_FIELDS = {
    "mamba_num_heads": "num_heads",
    "mamba_head_dim": "head_dim",
    "mamba_state_dim": "state_size",
    "mamba_num_groups": "num_groups",
}


def layer_spec(backend: Backend, arch: Architecture, linear_cp: str = "auto") -> ModuleSpec:
    """Return the spec of the layer that holds this mixer. ``linear_cp``: ``--hylo-linear-cp``."""
    ours = mamba_mixer.mamba_split_conv1d_scan_combined is mamba_split_conv1d_scan_combined
    projection = backend.projection if ours else backend.column_linear  # mamba-ssm's own kernel wants the exact width
    mixer = ModuleSpec(
        module=Mamba2Mixer,
        params=sharing(MIXER, arch, linear_cp, backend),
        submodules=MambaMixerSubmodules(in_proj=projection, out_proj=backend.row_linear),
    )
    return ModuleSpec(
        module=MambaLayer,
        submodules=MambaLayerSubmodules(norm=backend.norm, mixer=mixer, mamba_bda=get_bias_dropout_add),
    )


class Mamba2Mixer(LinearMixer, MambaMixer):
    """Mamba-2 (arXiv 2405.21060), ``hidden_SBD -> (out_SBD, None)``; gated norm per group."""

    fp32_names = MIXER.fp32
    across_ranks: ClassVar = {"chunk_ssd": chunk_ssd}

    def mix(self, hidden_states: Tensor, *args, packed_seq_params=None, **kwargs):
        if self.chunks == 1 and self.kernels is ops_for:
            return MambaMixer.forward(self, hidden_states, *args, packed_seq_params=packed_seq_params, **kwargs)
        self.refuse_packed(packed_seq_params)
        x_SBC, _ = self.in_proj(hidden_states)
        y_BSV = mamba_split_conv1d_scan_combined(
            to_rows(x_SBC, self.chunks), self.conv1d_weight.squeeze(1), self.conv1d_bias, self.dt_bias,
            -self.A_log.exp(), self.D, self.chunk_size, headdim=self.headdim, ngroups=self.ngroups_local_tp,
            kernels=self.kernels,
        )  # fmt: skip
        return self.out_proj(self.norm(from_rows(y_BSV, self.chunks).contiguous()))
