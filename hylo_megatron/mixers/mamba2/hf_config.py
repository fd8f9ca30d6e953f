"""Fields of ``config.json`` for Mamba-2. No torch in here."""

from hylo_megatron.mixers.mamba2.geometry import Mamba2Geometry

FIELDS = {
    "mamba_num_heads": "num_heads",
    "mamba_head_dim": "head_dim",
    "mamba_state_size": "state_size",
    "mamba_num_groups": "num_groups",
    "mamba_conv_kernel": "conv_kernel",
}
DEFAULTS = Mamba2Geometry(num_heads=9, head_dim=64, state_size=64, num_groups=9)
