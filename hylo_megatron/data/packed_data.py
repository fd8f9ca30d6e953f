"""The data set of packed samples: sample i is sequence i, in an order that a seed decides.

Every sequence of ``PREFIX.bin/.idx`` has ``seq_length + 1`` tokens. Two more files are optional.
``PREFIX.answers.npy`` (uint8 of the same shape, from ``hylo make-retrieval``) has 1 for each token that answers a
question about the preceding text. ``PREFIX.learnt.bin`` (a byte per token, from ``hylo prepare-data --answers-only``)
is the loss mask: 0 leaves the token out of the loss.
"""

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset

from hylo_megatron.data.prepare import MASK
from hylo_megatron.data.token_files import read_answers
from hylo_megatron.errors import HyLoError

LIGHTEST, HEAVIEST = 1.0, 50.0  # limits of an answer token's weight; an ordinary token has 1


@dataclass
class PackedConfig(BlendedMegatronDatasetConfig):
    """Settings of a packed data set.

    ``answer_weight``: loss weight of all answers of a sample together, as a share of the sample's tokens. ``rows``:
    number of rows in the models' embeddings.
    """

    answer_weight: float = 0.0
    rows: int = 0


@dataclass
class DocumentConfig(GPTDatasetConfig):
    """Settings of a data set of documents. ``rows``: number of rows in the models' embeddings."""

    rows: int = 0


def check_ids(largest: int, rows: int, path: str) -> None:
    """Raise ``HyLoError`` for ids beyond the models' rows: tensor-parallel ranks would embed zeros."""
    if largest >= rows:
        raise HyLoError(f"{path}: token {largest}, the models have {rows}; make the tokens with their tokenizer")


class DocumentDataset(GPTDataset):
    """Megatron's data set, which cuts sequences from documents, with a check of every sequence's ids."""

    def __getitem__(self, index: int | None) -> dict[str, torch.Tensor]:
        sample = super().__getitem__(index)
        largest = max(int(sample[key].max()) for key in ("tokens", "labels"))
        check_ids(largest, self.config.rows, self.dataset_path)
        return sample


class PackedDataset(MegatronDataset):
    """Samples with ``tokens, labels, loss_mask, position_ids, answer_weight`` ``[S]``, shuffled anew in each epoch."""

    def __init__(self, dataset, dataset_path, indices, num_samples, index_split, config):
        super().__init__(dataset, dataset_path, indices, num_samples, index_split, config)
        self.seed = [config.random_seed, zlib.crc32(Path(dataset_path).name.encode())]
        shape = len(dataset), len(dataset[0])
        self.answers = read_answers(dataset_path, shape)
        self.learnt = self._read_mask(Path(f"{dataset_path}{MASK}"), shape)
        self._epoch, self._order = -1, indices

    @staticmethod
    def _read_mask(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
        if not path.is_file():
            return None
        if path.stat().st_size != shape[0] * shape[1]:
            raise HyLoError(f"{path}: {path.stat().st_size} bytes, expected {shape[0]} sequences of {shape[1]}")
        return np.memmap(path, np.uint8, "r", shape=shape)

    @staticmethod
    def numel_low_level_dataset(low_level_dataset) -> int:
        return len(low_level_dataset)

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config) -> IndexedDataset:
        return IndexedDataset(dataset_path, multimodal=False, mmap=config.mmap_bin_files)

    def __len__(self) -> int:
        return self.num_samples or len(self.indices)

    def sequence(self, index: int) -> int:
        """Return the number of a sample's sequence in the file."""
        epoch, position = divmod(int(index), len(self.indices))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([*self.seed, epoch]).permutation(self.indices)
        return int(self._order[position])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sequence = self.sequence(index)
        ids = torch.from_numpy(self.dataset[sequence].astype(np.int64))
        check_ids(int(ids.max()), self.config.rows, self.dataset_path)
        length = len(ids) - 1
        mask = torch.ones(length)
        if self.learnt is not None:  # the mask of the predicted token
            mask = torch.from_numpy(self.learnt[sequence, 1:].astype(np.float32))
        return {
            "tokens": ids[:-1], "labels": ids[1:], "loss_mask": mask,
            "position_ids": torch.arange(length), "answer_weight": self._answer_weight(sequence, length),
        }  # fmt: skip

    def _answer_weight(self, sequence: int, length: int) -> torch.Tensor:
        if self.answers is None or not self.config.answer_weight:
            return torch.zeros(length)
        is_answer = torch.from_numpy(self.answers[sequence, 1:].astype(np.float32))
        share = self.config.answer_weight * length / is_answer.sum().clamp_min(1)
        return is_answer * share.clamp(LIGHTEST, HEAVIEST)
