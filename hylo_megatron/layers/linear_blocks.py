"""megatron's Gated DeltaNet and Mamba-2 mixers, their decay parameters kept in fp32."""

from megatron.core.ssm.gated_delta_net import GatedDeltaNet
from megatron.core.ssm.mamba_mixer import MambaMixer


class _FP32Decay:
    """Rounding A_log or dt_bias to bf16 changes the decay, and -inf in A_log has killed runs: they stay fp32.

    ``Float16Module`` casts the whole model; overriding ``_apply`` keeps the named parameters out of it.
    """

    fp32_names: tuple[str, ...] = ()

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for name in self.fp32_names:
            getattr(self, name).data = getattr(self, name).data.float()

    def _apply(self, fn, recurse=True):
        kept = {name: getattr(self, name).data for name in self.fp32_names}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            parameter = getattr(self, name)
            if parameter.dtype != before.dtype:
                parameter.data = before.to(parameter.device)
        return self


class GDNMixer(_FP32Decay, GatedDeltaNet):
    """Gated DeltaNet (arXiv 2412.06464), ``hidden_SBD -> (out_SBD, None)``."""

    fp32_names = ("A_log", "dt_bias")

    def __init__(self, config, *args, pp_layer_offset=None, **kwargs):
        super().__init__(config, *args, **kwargs)


class Mamba2Mixer(_FP32Decay, MambaMixer):
    """Mamba-2 (arXiv 2405.21060), ``hidden_SBD -> (out_SBD, None)``; gated norm per group."""

    fp32_names = ("A_log", "dt_bias", "D")
