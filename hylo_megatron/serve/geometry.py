"""Choose the geometry that vLLM runs for a trained one. Pure arithmetic: no import of vLLM or torch.

Kernels of a GPU take few sizes. What each mixer does about it, exactly, is in its ``serving.py``.
"""

from dataclasses import dataclass, replace

from hylo_megatron.config import Geometry
from hylo_megatron.mixers import MIXERS
from hylo_megatron.mixers.serving import ServedPart, Target


@dataclass(frozen=True)
class Served:
    """``geometry`` as vLLM sees it, with ``notes`` for the log.

    ``expanded`` is the head size of keys and values that are cached for every head, since a norm on keys (Qwen3's)
    cannot be moved behind the latent. It is None where latents are cached.
    """

    geometry: Geometry
    expanded: int | None = None
    notes: tuple[str, ...] = ()


def serve(geometry: Geometry, kinds: set[str], heads: int, qk_norm: bool, on_gpu: bool) -> Served:
    """Return what vLLM runs for a model with the mixers ``kinds``. Raises ``HyLoError`` for what no kernel runs."""
    target = Target(heads=heads, qk_norm=qk_norm, on_gpu=on_gpu)
    expanded, notes = None, []
    for entry in MIXERS.values():
        if entry.geometry and entry.name in kinds:
            part: ServedPart = entry.part("serving").served(entry.dimensions(geometry), target)
            geometry = replace(geometry, **{entry.name: part.geometry})
            expanded = expanded or part.expanded
            notes += part.notes
    return Served(geometry, expanded, tuple(notes))
