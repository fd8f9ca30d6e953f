"""Reads of checkpoints and of caches of sample indices run no code: see ``checkpoint/safe_pickles.py``.

The child processes of a training inherit the two environment variables.
"""

from hylo_megatron.checkpoint.safe_pickles import load_array, read_metadata
from hylo_megatron.engine.patch import MISSING, entries, instead

_MODULES = ("safe_globals", "datasets.gpt_dataset", "datasets.blended_dataset", "datasets.masked_dataset")
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
      for module in _MODULES),
)  # fmt: skip
