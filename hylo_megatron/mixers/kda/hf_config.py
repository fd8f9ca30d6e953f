"""Fields of ``config.json`` for Kimi Delta Attention. No torch in here."""

from hylo_megatron.mixers.kda.geometry import KDAGeometry

FIELDS = {
    "kda_num_heads": "num_heads",
    "kda_head_dim": "head_dim",
    "kda_conv_kernel": "conv_kernel",
    "kda_norm_eps": "norm_eps",
}
DEFAULTS = KDAGeometry(num_heads=18, head_dim=64)
