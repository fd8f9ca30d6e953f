"""Fields of ``config.json`` for MLA, named as DeepSeek's. No torch in here."""

from hylo_megatron.mixers.mla.geometry import MLAGeometry

FIELDS = {
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
}
DEFAULTS = MLAGeometry(kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=64)
