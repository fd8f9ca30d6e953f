"""Which geometry the engine runs for a trained one: pure arithmetic, no vLLM import.

GPU kernels take few sizes. A smaller one is padded with zeros, a wide Gated DeltaNet value head becomes several that
share key, beta and decay: both compute the same numbers. What neither reaches is refused.
"""

from dataclasses import dataclass, replace

from hylo_megatron.config import GDNGeometry, Geometry, MLAGeometry
from hylo_megatron.errors import HyLoError

LATENT_RANKS, ROPE = (256, 512), 64  # latent caches of 320 and 576 values
PREFILL = ((64, 128), (128, 128), (192, 256))  # (nope, v) beside a rope of 64 that flash attention has on Hopper
HEAD_SIZES = (64, 96, 128, 192, 256)  # of attention whose keys and values are cached
GDN_KEY_LIMIT = 256


@dataclass(frozen=True)
class Served:
    """``geometry`` as the engine sees it. ``expanded``: MLA keeps keys and values of every head of that size, because
    a norm on its keys cannot be moved behind the latent (Qwen3's); None: it keeps latents. ``notes`` for the log."""

    geometry: Geometry
    expanded: int | None = None
    notes: tuple[str, ...] = ()


def _smallest(choices, what: str, fits):
    for choice in choices:
        if fits(choice):
            return choice
    raise HyLoError(f"{what}: no kernel of the engine is that wide, the widest is {choices[-1]}")


def served_mla(mla: MLAGeometry) -> MLAGeometry:
    rank = _smallest(LATENT_RANKS, f"MLA's kv_lora_rank {mla.kv_lora_rank}", lambda r: r >= mla.kv_lora_rank)
    rope = _smallest((ROPE,), f"MLA's qk_rope_head_dim {mla.qk_rope_head_dim}", lambda r: r >= mla.qk_rope_head_dim)
    nope, value = _smallest(
        PREFILL, f"MLA's heads of {mla.qk_nope_head_dim} nope and {mla.v_head_dim} value dimensions",
        lambda size: size[0] >= mla.qk_nope_head_dim and size[1] >= mla.v_head_dim,
    )  # fmt: skip
    return replace(mla, kv_lora_rank=rank, qk_rope_head_dim=rope, qk_nope_head_dim=nope, v_head_dim=value)


def served_gdn(gdn: GDNGeometry) -> GDNGeometry:
    key, value = gdn.key_head_dim, gdn.value_head_dim
    if key > GDN_KEY_LIMIT or value % key:
        raise HyLoError(
            f"Gated DeltaNet's heads of {key} key and {value} value dimensions: the engine's kernel takes as many"
            f" value as key dimensions, at most {GDN_KEY_LIMIT}, and {value} is not a multiple of"
            f" {key}; serve it on a CPU"
        )
    return replace(gdn, num_value_heads=gdn.num_value_heads * (value // key), value_head_dim=key)


def serve(geometry: Geometry, kinds: set[str], heads: int, qk_norm: bool, on_gpu: bool, itemsize: int = 2) -> Served:
    """``kinds``: the mixers that the model has; ``heads``: MLA's; ``itemsize``: bytes of a cached value.

    A CPU runs every geometry as it is; only a norm on MLA's keys makes it keep them expanded, as a GPU does.
    """
    mla, gdn, notes, expanded = geometry.mla, geometry.gdn, [], None
    latent = mla.kv_lora_rank + mla.qk_rope_head_dim
    if "mla" in kinds and qk_norm:
        wide = max(mla.qk_nope_head_dim + mla.qk_rope_head_dim, mla.v_head_dim)
        expanded = _smallest(HEAD_SIZES, f"MLA's heads of {wide}", lambda size: size >= wide)
        notes.append(
            f"MLA with a norm on its keys keeps them expanded: {2 * heads * expanded * itemsize:,} bytes of cache a"
            f" token and layer where latents would take {latent * itemsize:,}"
        )
    elif "mla" in kinds and on_gpu and (wide := served_mla(mla)) != mla:
        row = wide.kv_lora_rank + wide.qk_rope_head_dim
        cost = f"{row * itemsize:,} bytes of cache a token and layer instead of {latent * itemsize:,}"
        notes.append(
            f"MLA of latent {mla.kv_lora_rank}+{mla.qk_rope_head_dim}, heads {mla.qk_nope_head_dim}/"
            f"{mla.qk_rope_head_dim}/{mla.v_head_dim} runs padded with zeros as {wide.kv_lora_rank}+"
            f"{wide.qk_rope_head_dim}, {wide.qk_nope_head_dim}/{wide.qk_rope_head_dim}/{wide.v_head_dim}:"
            f" {cost if row > latent else 'its cache keeps its size'}"
        )
        mla = wide
    if "gdn" in kinds and on_gpu and (split := served_gdn(gdn)) != gdn:
        notes.append(
            f"Gated DeltaNet's {gdn.num_value_heads} value heads of {gdn.value_head_dim} run as"
            f" {split.num_value_heads} of {split.value_head_dim} that share keys; its states keep their size"
        )
        gdn = split
    return Served(Geometry(mla, gdn, geometry.mamba2), expanded, tuple(notes))
