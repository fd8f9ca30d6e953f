"""MLA in vLLM: the sizes that it runs, the bytes that it caches, and settings that fit. No torch or vLLM in here.

GPU kernels take few sizes. A smaller one is padded with zeros, which computes the same numbers.
"""

from collections.abc import Callable
from dataclasses import replace

from hylo_megatron.errors import HyLoError
from hylo_megatron.mixers.mla.geometry import MLAGeometry
from hylo_megatron.mixers.mla.memory import row_values
from hylo_megatron.mixers.serving import ServedPart, Target

LATENT_RANKS, ROPE = (256, 512), 64  # latent caches of 320 and 576 values
PREFILL = ((64, 128), (128, 128), (192, 256))  # (nope, v) beside a rope of 64 that flash attention has on Hopper
HEAD_SIZES = (64, 96, 128, 192, 256)  # of attention whose keys and values are cached
VALUE = 2  # bytes of a cached value, for the notes

DEFAULT_SPLITS = 32  # vLLM's flash_attn_max_num_splits_for_cuda_graph
SPLITS, SPLITS_SPACE = 128, 1 << 30  # about a GPU's multiprocessors; bytes
FP8_ROW = 576  # 512 + 64


def served(mla: MLAGeometry, target: Target) -> ServedPart:
    """Return what vLLM runs for ``mla``. A CPU runs all sizes; a norm on keys expands the cache everywhere."""
    if target.qk_norm:
        return _expanded(mla, target)
    wide = padded(mla) if target.on_gpu else mla
    if wide == mla:
        return ServedPart(geometry=mla)
    latent, row = row_values(mla), row_values(wide)
    cost = f"{row * VALUE:,} bytes of cache a token and layer instead of {latent * VALUE:,}"
    note = (
        f"MLA of latent {mla.kv_lora_rank}+{mla.qk_rope_head_dim}, heads {mla.qk_nope_head_dim}/"
        f"{mla.qk_rope_head_dim}/{mla.v_head_dim} runs padded with zeros as {wide.kv_lora_rank}+"
        f"{wide.qk_rope_head_dim}, {wide.qk_nope_head_dim}/{wide.qk_rope_head_dim}/{wide.v_head_dim}:"
        f" {cost if row > latent else 'its cache keeps its size'}"
    )
    return ServedPart(geometry=wide, notes=(note,))


def padded(mla: MLAGeometry) -> MLAGeometry:
    """Return the smallest sizes of a GPU's kernels that hold ``mla``. Raises ``HyLoError`` where there are none."""
    rank = _smallest(LATENT_RANKS, f"MLA's kv_lora_rank {mla.kv_lora_rank}", lambda r: r >= mla.kv_lora_rank)
    rope = _smallest((ROPE,), f"MLA's qk_rope_head_dim {mla.qk_rope_head_dim}", lambda r: r >= mla.qk_rope_head_dim)
    nope, value = _smallest(
        PREFILL,
        f"MLA's heads of {mla.qk_nope_head_dim} nope and {mla.v_head_dim} value dimensions",
        lambda size: size[0] >= mla.qk_nope_head_dim and size[1] >= mla.v_head_dim,
    )
    return replace(mla, kv_lora_rank=rank, qk_rope_head_dim=rope, qk_nope_head_dim=nope, v_head_dim=value)


def _expanded(mla: MLAGeometry, target: Target) -> ServedPart:
    wide = max(mla.qk_nope_head_dim + mla.qk_rope_head_dim, mla.v_head_dim)
    size = _smallest(HEAD_SIZES, f"MLA's heads of {wide}", lambda size: size >= wide)
    note = (
        "MLA with a norm on its keys keeps them expanded:"
        f" {2 * target.heads * size * VALUE:,} bytes of cache a token and layer where latents would take"
        f" {row_values(mla) * VALUE:,}"
    )
    return ServedPart(geometry=mla, expanded=size, notes=(note,))


def _smallest(choices, what: str, fits: Callable):
    for choice in choices:
        if fits(choice):
            return choice
    raise HyLoError(f"{what}: no kernel of vLLM is that wide, the widest is {choices[-1]}")


def row_bytes(mla: MLAGeometry, expanded: int | None, heads: int, itemsize: int) -> int:
    """Bytes of one position of one layer on a rank with ``heads``. Latents are on every rank, heads are shared out."""
    return (2 * heads * expanded if expanded else row_values(mla)) * itemsize


def expanded_row_bytes(mla: MLAGeometry, heads: int, itemsize: int) -> int:
    """Bytes of the keys and values of one position, written out for ``heads``."""
    return heads * (mla.qk_nope_head_dim + mla.v_head_dim) * itemsize


# ---- settings of vLLM ----


def settings(vllm_config, *, on_gpu: bool) -> None:
    """Change settings of vLLM for latents on a GPU. Raises ``HyLoError``."""
    if on_gpu and not vllm_config.model_config.hf_config.expanded_head_size:
        spread_attention(vllm_config)
        refuse_fp8(vllm_config)


def spread_attention(vllm_config) -> None:
    """Let decoding split the cache further than vLLM's default bound for CUDA graphs, unless the user chose a bound.

    With latents all heads of a request share one tile, so that decoding fills a GPU only by splitting the cache.
    The partial outputs, fp32, may take ``SPLITS_SPACE``.
    """
    config, attention = vllm_config.model_config.hf_config, vllm_config.attention_config
    heads = config.num_attention_heads // vllm_config.parallel_config.tensor_parallel_size
    each = 4 * heads * config.kv_lora_rank * vllm_config.scheduler_config.max_num_seqs
    if attention.flash_attn_max_num_splits_for_cuda_graph == DEFAULT_SPLITS:
        attention.flash_attn_max_num_splits_for_cuda_graph = max(DEFAULT_SPLITS, min(SPLITS, SPLITS_SPACE // each))


def refuse_fp8(vllm_config) -> None:
    """Raise ``HyLoError`` for 8-bit caches with which vLLM would choose FlashMLA and fail at the first request."""
    config, dtype = vllm_config.model_config.hf_config, str(vllm_config.cache_config.cache_dtype)
    row = config.kv_lora_rank + config.qk_rope_head_dim
    if dtype.startswith("fp8") and row != FP8_ROW and vllm_config.attention_config.backend is None:
        raise HyLoError(
            f"--kv-cache-dtype {dtype}: FlashMLA keeps rows of {FP8_ROW} values in 8 bits, this model's have {row};"
            " leave it out (caches in bf16), or choose a kernel with --attention-backend"
        )
