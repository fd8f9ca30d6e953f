"""Small hybrids with every setting that a conversion has to keep."""

from helpers import tiny

HYBRIDS = {
    "gdn": tiny.hybrid("gdn"),
    "mamba2": tiny.hybrid("mamba2", tie_word_embeddings=False),
    "kda": tiny.hybrid("kda"),
    "positions": tiny.hybrid("gdn", mla_rope=False, linear_rope=True, log_scale=tiny.LOG_SCALE),
    "window": tiny.hybrid("mamba2", model_type="qwen2", attention_bias=True, window=tiny.WINDOW),
    "windows": tiny.hybrid("gdn", model_type="qwen3", qk_norm=True, mla_qk_norm=True, window=tiny.WINDOWS),
    "q_lora": tiny.hybrid("gdn", geometry=tiny.GEOMETRY_Q_LORA, rope_parameters=tiny.YARN),
    "qk_norm": tiny.hybrid("mamba2", model_type="qwen3", qk_norm=True, mla_qk_norm=True),
}
