"""Megatron distributed checkpoints without a process group: written and read one tensor at a time.

Layout of a checkpoint folder (what ``--load`` expects, and two additions of ours)::

    CKPT/latest_checkpointed_iteration.txt    "release", or an iteration
    CKPT/release | CKPT/iter_0000100          torch distributed checkpoint + metadata.json
    CKPT/hylo.json                            the Architecture
    CKPT/hf/                                  tokenizer files of the base model
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItemType

from hylo_megatron.checkpoint import disk
from hylo_megatron.checkpoint.iterations import TRACKER, hold_latest
from hylo_megatron.checkpoint.safe_pickles import SafeReader, check_parts, check_pickles
from hylo_megatron.config import Architecture
from hylo_megatron.errors import HyLoError
from hylo_megatron.files import fresh_partial, only_writer

FINITE = "take an earlier iteration: write its number into the tracker"

FILE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class LazyTensor:
    """A tensor with known shape and dtype, whose values are computed when they are written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]


class _StreamingPlanner(DefaultSavePlanner):
    """Computes a tensor when the writer asks for it, so that only one is in memory."""

    def __init__(self, tensors: dict[str, LazyTensor], progress: Callable[[int], None]):
        super().__init__(flatten_state_dict=False)
        self.tensors, self.progress = tensors, progress

    def resolve_data(self, write_item):
        if write_item.type == WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        name = write_item.index.fqn
        wanted, tensor = self.tensors[name], self.tensors[name].load()
        if tuple(tensor.shape) != tuple(wanted.shape):
            raise HyLoError(f"{name}: has shape {list(tensor.shape)}, expected {list(wanted.shape)}")
        self.progress(tensor.numel() * tensor.element_size())
        return tensor.to(wanted.dtype).detach().contiguous()


class _BoundedFiles(dcp.FileSystemWriter):
    """Writes files of at most ``FILE_BYTES`` (or one tensor): torch's writer keeps tensors until a file ends."""

    def _write_data(self, planner, file_queue):
        _, name, items = file_queue.get_nowait()
        prefix, parts, held = name.removesuffix(f"0{DEFAULT_SUFFIX}"), [[]], 0
        for item in items:
            data = item.tensor_data  # None if the item is not a tensor
            size = math.prod(data.size) * data.properties.dtype.itemsize if data else 0
            if parts[-1] and held + size > FILE_BYTES:
                parts.append([])
                held = 0
            parts[-1].append(item)
            held += size
        for number, part in enumerate(parts):
            name = f"{prefix}{number}{DEFAULT_SUFFIX}"
            file_queue.put((self.fs.concat_path(self.path, name), name, part))
        return super()._write_data(planner, file_queue)


def check_empty(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise HyLoError(f"{folder} exists and is not empty: choose another --out, or remove it")


@contextlib.contextmanager
def _begun(out: Path, need: int) -> Iterator[Path]:
    """Yield an empty folder beside ``out`` that no other process fills. It is removed if the block raises."""
    check_empty(out)
    disk.check(out, need)
    out.parent.mkdir(parents=True, exist_ok=True)
    with only_writer(out.with_name(f".{out.name}.writing"), str(out)):
        check_empty(out)
        scratch = fresh_partial(out)
        try:
            yield scratch
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise


def _end(scratch: Path, out: Path) -> None:
    if out.exists():
        out.rmdir()
    os.replace(scratch, out)


@contextlib.contextmanager
def whole_folder(out: Path, need: int | None = None) -> Iterator[Path]:
    """Yield a folder to fill. It gets the name ``out`` when the block ends, and is removed if the block raises.

    ``need``: size in bytes for which there must be room. Raises ``HyLoError`` if there is not.
    """
    try:
        with _begun(out, need or 0) as scratch:
            yield scratch
            _end(scratch, out)
    except BaseException as error:
        raise _said(error, out, need) from None


def write_checkpoint(folder: str | os.PathLike, arch: Architecture, tensors: dict[str, LazyTensor],
                     companions: Callable[[Path], None] | None = None,
                     progress: Callable[[int], None] = lambda _: None,
                     verify: Callable[[Path], object] = lambda _: None) -> None:  # fmt: skip
    """Write ``folder`` as a release checkpoint, which gets its final name only when it is complete.

    ``verify`` gets the complete checkpoint's folder before the renaming, and may raise.
    """
    folder = Path(folder)
    need = sum(prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors.values())
    try:
        with _begun(folder, need) as scratch:
            _fill(scratch, tensors, progress)
            if companions:
                companions(scratch / "hf")
            arch.save(scratch)
            verify(scratch)
            _end(scratch, folder)
    except BaseException as error:
        # torch wraps the planner's error; the message that tells the user what to do is inside.
        said = _said(_cause(error, (HyLoError, OSError)) or error, folder, need)
        if said is not error:
            disk.drop_tracebacks(error)
        raise said from None


def _fill(folder: Path, tensors: dict[str, LazyTensor], progress: Callable[[int], None]) -> None:
    """Write ``tensors`` as the release of the checkpoint ``folder``."""
    release = folder / "release"
    release.mkdir()
    state = {key: torch.empty(t.shape, dtype=t.dtype, device="meta") for key, t in tensors.items()}
    # megatron-core keeps everything that is not a tensor under this one key.
    state["common_state/shard_0_1"] = [{"checkpoint_version": 3.0, "iteration": 0}]
    files = _BoundedFiles(release, thread_count=1, single_file_per_rank=True)
    dcp.save(state, storage_writer=files, planner=_StreamingPlanner(tensors, progress), no_dist=True)
    described = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (release / "metadata.json").write_text(json.dumps(described))
    (folder / TRACKER).write_text("release")


def _said(error: BaseException, folder: Path, need: int | None) -> BaseException:
    """Return ``error``, or one line that says how much ``folder`` needs and how much space is free."""
    if isinstance(error, HyLoError) or not isinstance(error, Exception):
        return error
    return disk.explained(error, folder, need) or error


def _cause(error: BaseException, kinds: tuple) -> BaseException | None:
    """Return the first of ``kinds`` in the failures that torch collected or in their causes."""
    failures = getattr(error, "failures", None) or {}
    for failure in failures.values():
        inner = failure[0] if isinstance(failure, tuple) else failure
        while inner is not None:
            if isinstance(inner, kinds):
                return inner
            inner = inner.__cause__ or inner.__context__
    return None


class _KnownMetadata(SafeReader):
    """Avoids reading the list of all tensors again for each tensor: the list of a trained checkpoint is long."""

    def __init__(self, path: Path, metadata):
        super().__init__(path)
        self.metadata = metadata

    def read_metadata(self, *args, **kwargs):
        return self.metadata


class CheckpointReader:
    """Model tensors of a checkpoint of any parallel layout, read one at a time.

    ``finite``: advice for the error about a tensor with NaN or Inf; None accepts such tensors.
    """

    def __init__(self, folder: str | os.PathLike, finite: str | None = None):
        self.finite = finite
        self.path, self._held = hold_latest(folder)  # the lock is released with this object
        self.metadata = metadata = check_pickles(self.path)
        self.entries = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not key.startswith(("optimizer.", "rng_state", "rerun"))
        }

    @property
    def iteration(self) -> int | None:
        """The iteration that is read; None for a checkpoint that no training wrote."""
        return None if self.path.name == "release" else int(self.path.name.removeprefix("iter_"))

    def __contains__(self, key: str) -> bool:
        return key in self.entries

    def _entry(self, key: str) -> TensorStorageMetadata:
        if key not in self.entries:
            raise HyLoError(f"{self.path}: tensor {key} is missing; the checkpoint does not fit its hylo.json")
        return self.entries[key]

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._entry(key).size)

    def dtype(self, key: str) -> torch.dtype:
        return self._entry(key).properties.dtype

    def __getitem__(self, key: str) -> Tensor:
        out = {key: torch.empty(self.shape(key), dtype=self.dtype(key))}
        try:
            dcp.load(
                out, storage_reader=_KnownMetadata(self.path, self.metadata), no_dist=True,
                planner=DefaultLoadPlanner(flatten_state_dict=False),
            )  # fmt: skip
        except dcp.api.CheckpointException:
            check_parts(self.path, self.metadata, [key])
            raise HyLoError(
                f"{self.path}: tensor {key} cannot be read, a data file is truncated or damaged; copy it again"
            ) from None
        tensor = out[key]
        if self.finite and tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
            raise HyLoError(f"{self.path}: tensor {key} holds NaN or Inf; {self.finite}")
        return tensor
