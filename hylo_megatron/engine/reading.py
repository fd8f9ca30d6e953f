"""Reads of checkpoints and of caches of sample indices run no code: see ``checkpoint/safe_pickles.py``.

The child processes of a training inherit the two environment variables.
"""

from functools import partial

from hylo_megatron.checkpoint.safe_pickles import load_array, read_metadata
from hylo_megatron.engine.patch import MISSING, Patch, instead

_torch = partial(Patch, group="reading", package="torch", versions=">=2.11")
_MODULES = ("safe_globals", "datasets.gpt_dataset", "datasets.blended_dataset", "datasets.masked_dataset")

PATCHES = (
    _torch(
        target="os:environ[TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD]",
        replacement=instead(MISSING),
        why="would win over the next one",
        expects="missing",
    ),
    _torch(
        target="os:environ[TORCH_FORCE_WEIGHTS_ONLY_LOAD]",
        replacement=instead("1"),
        why="torch's planner of checkpoints asks for weights_only=False",
        upstream="torch/distributed/checkpoint/default_planner.py",
        expects="missing or str",
    ),
    _torch(
        target="torch.distributed.checkpoint:FileSystemReader.read_metadata",
        replacement=instead(read_metadata),
        why="reads .metadata as a plain pickle",
        upstream="torch/distributed/checkpoint/filesystem.py",
        expects="(self, *args, **kwargs)",
    ),
    *(
        Patch(
            group="reading",
            package="megatron-core",
            versions="==0.19.2",
            target=f"megatron.core.{module}:safe_numpy_load",
            replacement=instead(load_array),
            why="takes pickles: indices of samples are numbers and hold none",
            upstream="megatron/core/safe_globals.py:70",
            expects="(path, **kwargs)",
        )
        for module in _MODULES
    ),
)
