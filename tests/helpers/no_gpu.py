"""Triton's compiler for a GPU that is not there."""

from dataclasses import dataclass, field
from types import SimpleNamespace

from triton.backends.compiler import GPUTarget


@dataclass
class NoGPU:
    """A driver that names a Hopper GPU as target, and launches nothing."""

    launched: list = field(default_factory=list)

    def __post_init__(self):
        self.utils = SimpleNamespace(
            load_binary=lambda name, kernel, shared, device: (1, 1, 32, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 232448},
        )

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def launcher_cls(self, source, metadata):
        return lambda *arguments: self.launched.append(metadata.num_warps)
