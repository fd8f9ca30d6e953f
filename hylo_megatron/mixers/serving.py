"""What the mixers' ``serving.py`` share: what they are told, and what they return. No torch in here.

A mixer's ``serving.py`` has

    served      what vLLM runs for trained dimensions and a ``Target``
    settings    changes settings of vLLM to fit the dimensions
"""

import functools
from dataclasses import dataclass
from typing import Any

from hylo_megatron.config.geometry import Geometry


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a mixer has to know about the model and the machine to choose the dimensions that vLLM runs.

    ``heads`` is the number of attention heads.
    """

    heads: int
    qk_norm: bool
    on_gpu: bool


@dataclass(frozen=True, kw_only=True)
class ServedPart:
    """One mixer's dimensions in vLLM, with ``notes`` for the log.

    ``expanded`` is the head size of keys and values that are cached for every head, None where they are not.
    """

    geometry: Any
    expanded: int | None = None
    notes: tuple[str, ...] = ()


def trained_geometry(config) -> Geometry:
    """Return the geometry of the exported weights; ``config`` holds the served one in its own fields."""
    return Geometry.from_dict(config.trained_geometry)


def stages(vllm_config) -> tuple[range, ...]:
    """Return the layers of each pipeline stage of vLLM."""
    from vllm import envs

    layers, count = vllm_config.model_config.hf_config.mixers, vllm_config.parallel_config.pipeline_parallel_size
    return _stages(len(layers), count, envs.VLLM_PP_LAYER_PARTITION)


@functools.lru_cache  # vLLM logs uneven stages each time
def _stages(layers: int, count: int, partition: str | None) -> tuple[range, ...]:
    from vllm.distributed.utils import get_pp_indices

    return tuple(range(*get_pp_indices(layers, stage, count)) for stage in range(count))


def as_trained(geometry, target: Target) -> ServedPart:
    """Return the trained dimensions."""
    return ServedPart(geometry=geometry)


def no_settings(vllm_config, *, on_gpu: bool) -> None:
    """Change nothing."""
