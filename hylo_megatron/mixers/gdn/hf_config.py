"""Fields of ``config.json`` for Gated DeltaNet, named as Qwen3-Next's. No torch in here."""

from hylo_megatron.mixers.gdn.geometry import GDNGeometry

FIELDS = {
    "linear_num_key_heads": "num_key_heads",
    "linear_num_value_heads": "num_value_heads",
    "linear_key_head_dim": "key_head_dim",
    "linear_value_head_dim": "value_head_dim",
    "linear_conv_kernel_dim": "conv_kernel",
    "linear_norm_eps": "norm_eps",
}
DEFAULTS = GDNGeometry(num_key_heads=9, num_value_heads=18, key_head_dim=64, value_head_dim=64)
