"""megatron-core's generators of random numbers on a machine without a CUDA device."""

from functools import partial

import torch

from hylo_megatron.engine.cpu import without_cuda
from hylo_megatron.engine.patch import Patch, instead

_RANDOM = "megatron.core.tensor_parallel.random"
_random = partial(
    Patch, group="megatron", package="megatron-core", versions="==0.19.2", needed=without_cuda,
    why="megatron-core reads and sets the generator of the CUDA device",
)  # fmt: skip

PATCHES = (
    _random(
        target=f"{_RANDOM}:_get_cuda_rng_state",
        replacement=instead(lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()),
        expects="(device, clone, graph_safe)",
    ),
    _random(
        target=f"{_RANDOM}:_set_cuda_rng_state",
        replacement=instead(lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)),
        expects="(new_state, device, graph_safe)",
    ),
)
