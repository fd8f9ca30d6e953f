"""Gated DeltaNet in vLLM: the sizes that it runs, and settings that fit. No torch or vLLM in here.

vLLM's kernel takes heads with as many value as key dimensions. A wider value head becomes several that share key, beta
and decay, which computes the same numbers.
"""

from dataclasses import replace
from importlib.util import find_spec

from hylo_megatron.errors import HyLoError
from hylo_megatron.mixers.gdn.geometry import GDNGeometry
from hylo_megatron.mixers.serving import ServedPart, Target

KEY_LIMIT = 256
FLASHINFER_HEAD = 128


def served(gdn: GDNGeometry, target: Target) -> ServedPart:
    """Return what vLLM runs for ``gdn``. A CPU runs all sizes."""
    if not target.on_gpu or (runs := split(gdn)) == gdn:
        return ServedPart(geometry=gdn)
    note = (
        f"Gated DeltaNet's {gdn.num_value_heads} value heads of {gdn.value_head_dim} run as"
        f" {runs.num_value_heads} of {runs.value_head_dim} that share keys; its states keep their size"
    )
    return ServedPart(geometry=runs, notes=(note,))


def split(gdn: GDNGeometry) -> GDNGeometry:
    """Return value heads as wide as key heads. Raises ``HyLoError`` where they cannot be split, or are too wide."""
    key, value = gdn.key_head_dim, gdn.value_head_dim
    if key > KEY_LIMIT or value % key:
        raise HyLoError(
            f"Gated DeltaNet's heads of {key} key and {value} value dimensions: vLLM's kernel takes as many"
            f" value as key dimensions, at most {KEY_LIMIT}, and {value} is not a multiple of"
            f" {key}; serve it on a CPU"
        )
    return replace(gdn, num_value_heads=gdn.num_value_heads * (value // key), value_head_dim=key)


def settings(vllm_config, *, on_gpu: bool) -> None:
    """Choose the kernel for prompts, unless the user did."""
    if isinstance(vllm_config.additional_config, dict):
        kernel = prompt_kernel(vllm_config.model_config.hf_config.geometry().gdn)
        vllm_config.additional_config.setdefault("gdn_prefill_backend", kernel)


def prompt_kernel(gdn: GDNGeometry) -> str:
    """Return ``auto``, with which vLLM uses FlashInfer on Hopper, or ``triton``.

    vLLM checks neither that FlashInfer is installed nor that it takes these heads, and fails at the first request.
    """
    heads = {gdn.key_head_dim, gdn.value_head_dim}
    installed = all(find_spec(name) for name in ("flashinfer", "cutlass"))
    return "auto" if heads == {FLASHINFER_HEAD} and installed else "triton"
