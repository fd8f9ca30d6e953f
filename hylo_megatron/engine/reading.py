"""Reads of checkpoints and of caches of sample indices run no code: see ``checkpoint/safe_pickles.py``.

The child processes of a training inherit the two environment variables.
"""

from types import ModuleType

import numpy as np

from hylo_megatron.checkpoint.safe_pickles import load_array, read_metadata
from hylo_megatron.engine.patch import MISSING, entries, instead
from hylo_megatron.files import whole_file


class _WholeArrays(ModuleType):
    """numpy for the datasets of megatron-core: ``save`` writes a whole file, or none when it is interrupted.

    Trainings that start side by side share the cache: one reads an index as soon as another has made its file.
    """

    def __getattr__(self, name):
        return getattr(np, name)

    @staticmethod
    def save(path, array, **_) -> None:
        with whole_file(path, shared=True) as scratch, scratch.open("wb") as file:
            np.save(file, array, allow_pickle=False)


_READERS = ("safe_globals", "datasets.gpt_dataset", "datasets.blended_dataset", "datasets.masked_dataset")
_WRITERS = _READERS[1:]
PATCHES = entries(
    "reading", "torch",
    ("os:environ[TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD]", instead(MISSING), "missing", "would win over the next one"),
    ("os:environ[TORCH_FORCE_WEIGHTS_ONLY_LOAD]", instead("1"), "missing or str",
     "torch's planner of checkpoints asks for weights_only=False (torch/distributed/checkpoint/default_planner.py)"),
    ("torch.distributed.checkpoint:FileSystemReader.read_metadata", instead(read_metadata), "(self, *args, **kwargs)",
     "reads .metadata as a plain pickle (torch/distributed/checkpoint/filesystem.py)"),
) + entries(
    "reading", "megatron-core",
    *((f"megatron.core.{module}:safe_numpy_load", instead(load_array), "(path, **kwargs)",
       "takes pickles: indices of samples are numbers and hold none (megatron/core/safe_globals.py:70)")
      for module in _READERS),
    *((f"megatron.core.{module}:numpy", instead(_WholeArrays("numpy")), "module",
       "saves the cache of indices in place, where another training may read half of it"
       " (megatron/core/datasets/gpt_dataset.py:608)")
      for module in _WRITERS),
)  # fmt: skip
