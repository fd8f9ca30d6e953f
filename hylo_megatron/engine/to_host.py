"""Copies numbers from the GPU to the host without a wait for the GPU."""

from typing import Any

import torch
from torch import Tensor


class ToHost:
    """Numbers by name, and tables of numbers, of which tensors may be on a GPU. ``get`` waits until the GPU has them.

    The copy into pinned memory begins at once, behind what the GPU has to do.
    """

    def __init__(self, values: dict[str, Any]):
        self._values = values
        self._tensors = {name: value.detach() for name, value in values.items() if isinstance(value, Tensor)}
        self._event = None
        if any(tensor.is_cuda for tensor in self._tensors.values()):
            self._copy()

    def _copy(self) -> None:
        here = torch.cat([tensor.reshape(-1) for tensor in self._tensors.values() if tensor.is_cuda])
        there = torch.empty(here.shape, dtype=here.dtype, pin_memory=True)
        there.copy_(here, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()
        parts = iter(there.split([tensor.numel() for tensor in self._tensors.values() if tensor.is_cuda]))
        for name, tensor in self._tensors.items():
            if tensor.is_cuda:
                self._tensors[name] = next(parts).view(tensor.shape)

    def get(self) -> dict[str, Any]:
        """Return the values, with numbers and lists of numbers in place of tensors."""
        if self._event is not None:
            self._event.synchronize()
        found = {
            name: tensor.tolist() if tensor.dim() == 2 else tensor.item() for name, tensor in self._tensors.items()
        }
        return self._values | found
