"""Mamba-2 as vLLM's own layer runs it, with what differs in ours."""

from torch import Tensor
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateDtypeCalculator, MambaStateShapeCalculator

from hylo_megatron.engine.register import install
from hylo_megatron.kernels.rope import Angles
from hylo_megatron.mixers.mamba2 import MIXER
from hylo_megatron.mixers.mamba2.geometry import NORM_EPS, Mamba2Geometry
from hylo_megatron.mixers.vllm_states import Mamba2Backend
from hylo_megatron.mixers.vllm_weights import keep_fp32
from hylo_megatron.mixers.vllm_window import WithWindow

VLLM_NAMES = {"A_log": "A"}


class HyLoMamba2(WithWindow, MambaMixer2):
    """vLLM's Mamba-2 with ``dt_bias`` and ``D`` in fp32."""

    def __init__(self, config, vllm_config, prefix: str):
        install("vllm model")
        mamba2 = config.geometry().mamba2
        super().__init__(
            hidden_size=config.hidden_size,
            ssm_state_size=mamba2.state_size,
            conv_kernel_size=mamba2.conv_kernel,
            intermediate_size=mamba2.num_heads * mamba2.head_dim,
            use_conv_bias=True,
            use_bias=False,
            n_groups=mamba2.num_groups,
            num_heads=mamba2.num_heads,
            head_dim=mamba2.head_dim,
            rms_norm_eps=NORM_EPS,
            activation="silu",
            model_config=vllm_config.model_config,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=prefix,
        )
        keep_fp32(self, (VLLM_NAMES.get(name, name) for name in MIXER.fp32))

    def get_attn_backend(self):
        return Mamba2Backend

    def mix(self, hidden_TD: Tensor, angles: Angles) -> Tensor:
        return self(hidden_TD)


state_dtypes = MambaStateDtypeCalculator.mamba2_state_dtype


def state_shapes(tp: int, mamba2: Mamba2Geometry):
    """Return the shapes of a request's states on one rank: the window of the convolution, the recurrent state."""
    heads, dim = mamba2.num_heads, mamba2.head_dim
    return MambaStateShapeCalculator.mamba2_state_shape(
        tp, heads * dim, mamba2.num_groups, heads, dim, mamba2.state_size, mamba2.conv_kernel
    )


LAYER = HyLoMamba2
