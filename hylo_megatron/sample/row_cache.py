"""A cache of fixed size whose rows are at different positions, and the attention that reads it, for transformers.

Any model of transformers works whose layers all keep keys and values and call the attention interface. Legend: B rows,
L positions, K key heads, G query heads per key head, D width of a head.
"""

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from hylo_megatron.errors import HyLoError, first_line

ATTENTION = "hylo_rows"
CHECKED = 16  # tokens by which a model over the cache is compared with itself
TOLERANCE = 0.05  # ‖difference of logits‖ / ‖logits‖; rounding to bf16 gives about 0.01
FLASH_TYPES = (torch.bfloat16, torch.float16)
FLASH_WIDTH = 256  # widest heads that FlashAttention takes


class RowLayer(CacheLayerMixin):
    """Keys and values ``[B, L, K, D]`` of one layer. ``position`` [B] is where the next ones go, for each row."""

    def __init__(self, length: int, position: Tensor):
        super().__init__()
        self.length, self.position = length, position
        self.rows = torch.arange(len(position), device=position.device)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (
            torch.zeros(x.shape[0], self.length, x.shape[1], x.shape[3], dtype=x.dtype, device=x.device)
            for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Store one position of each row (``[B, K, 1, D]``), and return everything."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys[self.rows, self.position] = key_states[:, :, 0]
        self.values[self.rows, self.position] = value_states[:, :, 0]
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.length


def row_cache(layers: int, length: int, position: Tensor) -> Cache:
    return Cache(layers=[RowLayer(length, position) for _ in range(layers)])


@functools.lru_cache(8)
def _starts(rows: int, step: int, device: torch.device) -> Tensor:
    return torch.arange(0, (rows + 1) * step, step, dtype=torch.int32, device=device)


def attend_plain(query: Tensor, keys: Tensor, values: Tensor, position: Tensor, scale: float) -> Tensor:
    """Return the output ``[B, K, G, D]`` of queries of that shape, which see the positions up to their row's own."""
    visible = torch.arange(keys.shape[1], device=keys.device) <= position[:, None]
    return F.scaled_dot_product_attention(
        query, keys.transpose(1, 2), values.transpose(1, 2), visible[:, None, None, :], scale=scale
    )


def attend_flash(query: Tensor, keys: Tensor, values: Tensor, position: Tensor, scale: float) -> Tensor:
    """Return the same from FlashAttention, which reads no position beyond a row's own.

    The query heads of a key head are the queries of its sequence, so that keys and values are read once.
    """
    from torch.nn.attention.varlen import varlen_attn

    rows, length, heads, _ = keys.shape
    group = query.shape[2]
    out = varlen_attn(
        query.transpose(1, 2).reshape(rows * group, heads, -1), keys.flatten(0, 1), values.flatten(0, 1),
        _starts(rows, group, keys.device), _starts(rows, length, keys.device), group, length,
        scale=scale, seqused_k=(position + 1).int(), num_splits=1,
    )  # fmt: skip
    return out.view(rows, group, heads, -1).transpose(1, 2)


def _attention(module, query, keys, values, attention_mask, scaling=None, position_ids=None, **kwargs):
    rows, heads, _, width = query.shape
    groups = query.view(rows, keys.shape[2], heads // keys.shape[2], width)
    flash = flash_serves(query.device, query.dtype, width, values.shape[-1])
    attend = attend_flash if flash else attend_plain
    out = attend(groups, keys, values, position_ids[:, 0], width**-0.5 if scaling is None else scaling)
    return out.reshape(rows, 1, heads, -1), None


@functools.cache
def flash_serves(device: torch.device, dtype: torch.dtype, width: int, value_width: int) -> bool:
    """Return whether torch's FlashAttention runs here and agrees with the plain one on heads of this width."""
    if device.type != "cuda" or dtype not in FLASH_TYPES or width != value_width or width > FLASH_WIDTH:
        return False
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (
        torch.randn(shape, generator=generator).to(device, dtype)
        for shape in ((4, 3, 3, width), (4, 96, 3, width), (4, 96, 3, width))
    )
    position = torch.tensor([0, 17, 40, 95], device=device)
    try:
        fast = attend_flash(query, keys, values, position, width**-0.5).float()
    except (ImportError, RuntimeError, TypeError) as error:
        print(f"sampling without FlashAttention, which does not run here: {first_line(error)}", flush=True)
        return False
    plain = attend_plain(query, keys, values, position, width**-0.5).float()
    agrees = bool((fast - plain).norm() < 0.02 * plain.norm())
    if not agrees:
        print("sampling without FlashAttention, which disagrees with the plain attention here", flush=True)
    return agrees


def refusal(config, length: int) -> str | None:
    """Return why rows of ``length`` tokens of such a model cannot be held in a ``row_cache``; None if they can."""
    if config.model_type == "hylo":
        return "a hybrid, whose linear layers keep states"
    if set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        return "a model with layers that are no attention"
    if reason := _unsteady_rope(config, length):
        return reason
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True) and window < length:
        return f"a model with a sliding window of {window} tokens, fewer than --length {length}"
    return None


def _unsteady_rope(config, length: int) -> str | None:
    """Return why the rotary frequencies would change with the longest row of a batch; None if they do not."""
    rope = getattr(config, "rope_parameters", None) or {}
    for found in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        kind = str(found.get("rope_type"))
        trained = found.get("original_max_position_embeddings") or 0
        if "dynamic" in kind:
            return f"a model whose rotary frequencies depend on the longest row (rope_type {kind})"
        if kind == "longrope" and length > trained:
            return f"a model whose rotary frequencies change at {trained} tokens (rope_type {kind}), below --length"
    return None


@torch.inference_mode()
def use_rows(model: PreTrainedModel, length: int) -> PreTrainedModel:
    """Make ``model`` attend over a ``row_cache``, and compare its logits with those it gave before.

    Raises ``HyLoError`` for models that cannot, and if the logits differ.
    """
    name, reason = model.config.name_or_path, refusal(model.config, length)
    if reason or not model._supports_attention_backend:
        reason = reason or "a model whose attention transformers does not let us replace"
        raise HyLoError(f"{name}: {reason}: sample it with --engine vllm")
    tokens = min(CHECKED, length)
    ids = (7 * torch.arange(tokens, device=model.device) + 1)[None] % model.get_input_embeddings().weight.shape[0]
    plain = model(input_ids=ids, use_cache=False).logits[0].float()
    if not plain.isfinite().all():
        raise HyLoError(f"{name}: logits are not finite: the weights are broken, or overflow in {model.dtype}")
    AttentionInterface.register(ATTENTION, _attention)
    model.set_attn_implementation(ATTENTION)
    worst = max(float((row - plain).norm() / plain.norm()) for row in _stepwise(model, ids))
    if not worst < TOLERANCE:
        raise HyLoError(
            f"{name}: logits of single tokens over the cache differ by {worst:.1%} from those of the whole text,"
            f" expected less than {TOLERANCE:.0%}: sample it with --engine vllm, and report the model's type"
        )
    return model


def _stepwise(model: PreTrainedModel, ids: Tensor) -> Iterator[Tensor]:
    """Yield the logits ``[tokens, vocabulary]`` of two rows that read ``ids``, the second a token behind the first."""
    tokens = ids.shape[1]
    position = torch.zeros(2, dtype=torch.int64, device=ids.device)
    cache, logits = row_cache(model.config.num_hidden_layers, tokens, position), []
    for at in range(tokens + 1):
        position[0], position[1] = min(at, tokens - 1), max(at - 1, 0)
        row = ids[0, position][:, None]
        out = model(input_ids=row, position_ids=position[:, None], past_key_values=cache, use_cache=True)
        logits.append(out.logits[:, -1].float())
    yield torch.stack([step[0] for step in logits[:-1]])
    yield torch.stack([step[1] for step in logits[1:]])
