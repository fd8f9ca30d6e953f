"""Which values a hybrid's ``config.json`` may have. No torch in here."""

from typing import Any, Literal

from pydantic import ConfigDict
from typing_extensions import TypedDict

from hylo_megatron.config.architecture import MODEL_TYPES, Extra
from hylo_megatron.errors import HyLoError
from hylo_megatron.json_file import AtLeastZero, Dimension, PartDimension, Positive, check

MIXERS = ("mla", "gdn", "mamba2")
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# Left out, these would take defaults that are another model's, and the weights would fit all the same.
NEEDED = ("mixers", "num_attention_heads", "rms_norm_eps", "max_position_embeddings", "rope_parameters")


class Values(TypedDict):
    __pydantic_config__ = ConfigDict(extra="forbid")

    vocab_size: Dimension
    hidden_size: Dimension
    intermediate_size: Dimension
    num_hidden_layers: Dimension | None
    num_attention_heads: Dimension
    num_key_value_heads: Dimension | None
    head_dim: Dimension | None
    hidden_act: Literal["silu"]
    rms_norm_eps: Positive
    max_position_embeddings: Dimension
    rope_parameters: dict[str, Any]
    tie_word_embeddings: bool
    mixers: list[Literal[MIXERS]] | None
    linear_type: Literal["gdn", "mamba2"] | None
    q_lora_rank: Dimension | None
    kv_lora_rank: Dimension
    qk_nope_head_dim: PartDimension
    qk_rope_head_dim: Dimension
    v_head_dim: Dimension
    qk_norm: bool
    linear_num_key_heads: Dimension
    linear_num_value_heads: Dimension
    linear_key_head_dim: Dimension
    linear_value_head_dim: Dimension
    linear_conv_kernel_dim: Dimension
    linear_norm_eps: Positive | None
    mamba_num_heads: Dimension
    mamba_head_dim: Dimension
    mamba_state_size: Dimension
    mamba_num_groups: Dimension
    mamba_conv_kernel: Dimension
    base_model_type: Literal[MODEL_TYPES]
    base_qk_norm: bool
    attention_bias: bool
    architecture_extra: Extra | None
    initializer_range: AtLeastZero
    use_cache: bool


def check_values(values: dict) -> None:
    """Raises ``HyLoError`` that names the first field that is of another type or out of range."""
    check(values, Values, "config.json")


def check_complete(config: dict) -> None:
    if missing := [name for name in NEEDED if name not in config]:
        raise HyLoError(f"config.json: field {missing[0]} is missing; export the checkpoint again")
