"""Micro-batches through NVIDIA DALI (``--dataloader dali``): read in a thread, copied to the GPU ahead of their step.

The samples and their order are those of the default loader: the same data set, asked for the same indices.
"""

import queue
import threading
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hylo_megatron import packages

DEPTH = 3  # micro-batches that wait on the GPU, and as many that wait for it
PURPOSE = "--dataloader dali"


class DaliLoader:
    """Iterates over micro-batches, as dictionaries of ``keys`` with ``[B, S]``.

    ``batches`` has the indices of each micro-batch, all ``rows`` long. ``device`` is a GPU's number, or None for
    tensors on the CPU. ``keys`` that the data set's samples lack are left out. An error of the data set is raised a
    few micro-batches early, because they are read ahead.
    """

    def __init__(
        self, dataset: Dataset, batches: Iterable[list[int]], keys: tuple[str, ...], rows: int, device: int | None
    ):
        dali = packages.load("nvidia-dali", PURPOSE)
        self.reads = dataset  # the guard's events name samples of it
        self._copy = packages.load("nvidia-dali", PURPOSE, "nvidia.dali.plugin.pytorch").feed_ndarray
        first = dataset[0]
        self.types = {key: first[key].dtype for key in keys if key in first}
        self.device = torch.device("cpu" if device is None else f"cuda:{device}")
        self._read: queue.Queue = queue.Queue(DEPTH)
        threading.Thread(target=self._fill, args=(dataset, batches), daemon=True).start()
        fn = packages.load("nvidia-dali", PURPOSE, "nvidia.dali.fn")
        self._pipeline = dali.Pipeline(rows, num_threads=1, device_id=device, prefetch_queue_depth=DEPTH)
        with self._pipeline:
            parts = fn.external_source(source=self._next_read, num_outputs=len(self.types), batch=True)
            self._pipeline.set_outputs(*(parts if device is None else [part.gpu() for part in parts]))
        self._pipeline.build()

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        outputs, batch = self._pipeline.run(), {}
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        for (key, dtype), output in zip(self.types.items(), outputs, strict=True):
            found = output.as_tensor()
            batch[key] = torch.empty(found.shape(), dtype=dtype, device=self.device)
            self._copy(found, batch[key], cuda_stream=stream)  # DALI writes into its own tensors again
        return batch

    def _fill(self, dataset: Dataset, batches: Iterable[list[int]]) -> None:
        try:
            for indices in batches:
                samples = [dataset[index] for index in indices]
                self._read.put([np.stack([sample[key].numpy() for sample in samples]) for key in self.types])
            self._read.put(StopIteration())
        except BaseException as error:  # raised in the thread that trains
            self._read.put(error)

    def _next_read(self) -> list[np.ndarray]:
        found = self._read.get()
        if isinstance(found, BaseException):
            self._read.put(found)  # it is the last: the next call gets it too
            raise found
        return found
