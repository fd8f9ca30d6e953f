"""Reads the pickles of a checkpoint without running code that a stranger may have put into them.

torch's ``.metadata`` is a plain pickle. Everything but tensors lies as pickles inside ``*.distcp``: arguments, states
of random numbers, the optimizer's groups. ``check_pickles`` looks through all of them before anything else does.
``engine/reading.py`` makes torch's and megatron-core's own reads as strict. This module imports no megatron.
"""

import os
import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from math import prod
from pathlib import Path, PosixPath
from typing import NoReturn

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as names
from torch.distributed.checkpoint import planner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.utils import _create_file_view
from torch.serialization import _get_layout, get_unsafe_globals_in_checkpoint

from hylo_megatron.errors import HyLoError

REMEDY = "copy the checkpoint again"
_CLASSES = (
    names.Metadata, names.TensorStorageMetadata, names.BytesStorageMetadata, names.ChunkStorageMetadata,
    names.TensorProperties, names.MetadataIndex, names.StorageMeta, names._MEM_FORMAT_ENCODING, _StorageInfo,
    planner.SavePlan, planner.WriteItem, planner.WriteItemType, planner.TensorWriteData, planner.BytesIOWriteData,
)  # fmt: skip
# Classes that a .metadata file holds beside plain containers; each does nothing but keep its arguments.
KNOWN = {f"{known.__module__}.{known.__qualname__}": known for known in _CLASSES} | {
    "torch.Size": torch.Size, "torch.serialization._get_layout": _get_layout, "collections.OrderedDict": OrderedDict,
    "pathlib.PosixPath": PosixPath, "pathlib._local.PosixPath": PosixPath,
}  # fmt: skip
# Classes that megatron-core's list of safe classes adds to torch's (megatron/core/safe_globals.py). Tools that run
# without megatron-core need this copy.
MEGATRON = {
    "_io.BytesIO", "argparse.Namespace", "megatron.core.enums.ModelType",
    "megatron.core.optimizer.optimizer_config.OptimizerConfig", "megatron.core.rerun_state_machine.RerunDiagnostic",
    "megatron.core.rerun_state_machine.RerunMode", "megatron.core.rerun_state_machine.RerunState",
    "megatron.core.transformer.enums.AttnBackend", "megatron.core.transformer.enums.CudaGraphModule",
    "megatron.core.transformer.enums.CudaGraphScope", "megatron.core.transformer.enums.InferenceCudaGraphScope",
    "numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct", "numpy.dtype",
    "numpy.dtypes.UInt32DType", "numpy.ndarray", "pathlib.PosixPath", "pathlib._local.PosixPath", "signal.Signals",
    "torch._C.Generator", "types.SimpleNamespace",
}  # fmt: skip


def _refused(where: str | os.PathLike, found: str) -> HyLoError:
    return HyLoError(
        f"{where}: holds {_shown(found)}, which no checkpoint needs and which may run code: refused;"
        " use a checkpoint from a source that you trust"
    )


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, file, where: str):
        super().__init__(file)
        self.where = where

    def find_class(self, module: str, name: str):
        if (found := KNOWN.get(f"{module}.{name}")) is not None:
            return found
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise _refused(self.where, f"{module}.{name}")


@contextmanager
def _unchanged_classes(where: str) -> Iterator[None]:
    """Undo and refuse changes to classes: a pickle can set attributes of the classes that it names."""
    classes = [known for known in KNOWN.values() if isinstance(known, type)]
    shared = classes + [member for known in classes if issubclass(known, Enum) for member in known]
    before, changed = [dict(vars(known)) for known in shared], []
    try:
        yield
    finally:
        for known, was in zip(shared, before, strict=True):
            if (now := dict(vars(known))) != was:
                changed.append(known)
                for name in now.keys() - was.keys():
                    delattr(known, name)
                for name in [name for name, value in was.items() if now.get(name) is not value]:
                    setattr(known, name, was[name])
    if changed:
        raise _refused(where, f"changes to {changed[0]}")


def load_metadata(file, where: str) -> names.Metadata:
    """Read torch's ``.metadata``. Raises ``HyLoError`` for classes that do not belong there, and for damage."""
    try:
        with _unchanged_classes(where):
            metadata = _MetadataUnpickler(file, where).load()
    except HyLoError:
        raise
    except Exception as error:  # a damaged pickle raises whatever its bytes make of it
        raise HyLoError(f"{where}: damaged ({type(error).__name__}: {_line(error)}): {REMEDY}") from None
    if type(metadata) is not names.Metadata:
        raise HyLoError(f"{where}: holds {type(metadata).__name__}, expected torch's Metadata: {REMEDY}")
    return metadata


def read_metadata(self: dcp.FileSystemReader, *args, **kwargs) -> names.Metadata:
    """Read as ``FileSystemReader.read_metadata`` of torch 2.13 does, with ``load_metadata`` for ``pickle.load``."""
    path = self._get_metadata_path(kwargs.get("rank"))
    with self.fs.create_stream(path, "rb") as file:
        metadata = load_metadata(file, str(path))
    if getattr(metadata, "storage_meta", None) is None:
        metadata.storage_meta = names.StorageMeta()
    metadata.storage_meta.load_id = self.load_id
    return metadata


class SafeReader(dcp.FileSystemReader):
    read_metadata = read_metadata


# ---- the whole folder of an iteration ----


def check_pickles(iteration: str | os.PathLike) -> names.Metadata:
    """Return ``.metadata`` of this folder after a look through every pickle in the folder. None is run.

    Raises ``HyLoError`` that names the class which does not belong there, or the file that is damaged.
    """
    iteration = Path(iteration)
    path = iteration / ".metadata"
    if not path.is_file():
        raise HyLoError(f"{path} not found: expected a checkpoint that megatron-core saved as torch_dist; {REMEDY}")
    with path.open("rb") as file:
        metadata = load_metadata(file, str(path))
    try:
        _check_metadata(metadata, iteration)
    except (TypeError, AttributeError, ValueError) as error:  # a field of another type
        raise HyLoError(f"{path}: damaged ({_line(error)}): {REMEDY}") from None
    objects = [key for key, entry in metadata.state_dict_metadata.items() if type(entry) is names.BytesStorageMetadata]
    check_parts(iteration, metadata, objects)
    for legacy in sorted(iteration.glob("*.pt")):  # common.pt of older checkpoints
        with legacy.open("rb") as file:
            check_torch_file(file, str(legacy))
    return metadata


def check_parts(iteration: Path, metadata: names.Metadata, keys: Iterable[str]) -> None:
    """Apply ``check_torch_file`` to everything that was saved under ``keys``.

    torch itself reads tensors as weights only. Tensors are checked when one cannot be read, to name the reason.
    """
    keys = set(keys)
    for index, info in metadata.storage_data.items():
        if index.fqn in keys:
            path = iteration / info.relative_path
            with path.open("rb") as file:
                check_torch_file(_create_file_view(file, info.offset, info.length), f"{path}: {index.fqn}")


def explain(iteration: Path, error: BaseException, what: str = "cannot be loaded") -> NoReturn:
    """Raise ``HyLoError`` with the reason why ``iteration`` could not be loaded. ``what`` follows its name."""
    metadata = check_pickles(iteration)
    check_parts(iteration, metadata, metadata.state_dict_metadata)
    reason = [repr(error), *str(error).strip().splitlines()][-1]  # a whole traceback may lie before it
    raise HyLoError(f"{iteration} {what}: {reason}") from error


def check_torch_file(file, where: str) -> None:
    """Raise ``HyLoError`` for a ``torch.save`` file with classes that torch and megatron-core do not call safe."""
    try:
        unsafe = set(get_unsafe_globals_in_checkpoint(file)) - MEGATRON
    except Exception as error:  # no zip file, or an operation of pickles that torch.save never writes
        raise HyLoError(f"{where}: cannot be read ({_line(error)}): {REMEDY}") from None
    if unsafe:
        raise _refused(where, min(unsafe))


def _line(error: Exception) -> str:
    return _shown((str(error).splitlines() or [type(error).__name__])[0])


def _shown(text: str, limit: int = 200) -> str:
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= limit else text[:limit] + "..."


def _check_metadata(metadata: names.Metadata, folder: Path) -> None:
    path, sizes = folder / ".metadata", {}

    def expect(holds: bool, what: str) -> None:
        if not holds:
            raise HyLoError(f"{path}: damaged ({what}): {REMEDY}")

    expect(isinstance(metadata.storage_meta, names.StorageMeta | None), "storage_meta")
    expect(isinstance(metadata.state_dict_metadata, dict), "no list of tensors")
    expect(isinstance(metadata.storage_data, dict), "no list of places")
    for key in metadata.state_dict_metadata:
        expect(isinstance(key, str) and key.isprintable(), f"the name {_shown(repr(key))}")
    for index, info in metadata.storage_data.items():
        expect(type(index) is names.MetadataIndex and type(info) is _StorageInfo, "a place of another type")
        expect(index.fqn in metadata.state_dict_metadata, f"a place of the unknown {_shown(repr(index.fqn))}")
        name, offset, length = info.relative_path, info.offset, info.length
        plain = isinstance(name, str) and name.isprintable() and Path(name).name == name
        expect(plain, f"a file outside the folder, {_shown(repr(name))}")
        expect(type(offset) is int and type(length) is int and min(offset, length) >= 0, f"place of {index.fqn}")
        if name not in sizes:
            sizes[name] = _size(folder / name)
        if offset + length > sizes[name]:
            raise HyLoError(
                f"{folder / name}: has {sizes[name]} bytes, {index.fqn} ends at {offset + length}: it is truncated;"
                f" {REMEDY}"
            )
    chunks = defaultdict(list)
    for index in metadata.storage_data:
        chunks[index.fqn].append(index.offset)
    for key, entry in metadata.state_dict_metadata.items():
        if type(entry) is names.BytesStorageMetadata:
            expect(chunks[key] == [None], f"{key} is not there once")
            continue
        expect(type(entry) is names.TensorStorageMetadata, f"{key} is neither a tensor nor bytes")
        expect(isinstance(entry.properties.dtype, torch.dtype), f"dtype of {key}")
        expect(_covers(entry, chunks[key]), f"the parts of {key} are not the whole tensor")


def _covers(entry: names.TensorStorageMetadata, places: list) -> bool:
    """Return whether the chunks of a tensor fill the tensor, and each has a place in a file."""
    size = tuple(entry.size)
    offsets = [tuple(chunk.offsets) for chunk in entry.chunks]
    if sorted(offsets) != sorted(map(tuple, places)) or len(set(offsets)) != len(offsets):
        return False
    volume = 0
    for chunk, offset in zip(entry.chunks, offsets, strict=True):
        lengths = tuple(chunk.sizes)
        if not len(size) == len(offset) == len(lengths):
            return False
        if any(at < 0 or length < 0 or at + length > whole
               for at, length, whole in zip(offset, lengths, size, strict=True)):  # fmt: skip
            return False
        volume += prod(lengths)
    return volume == prod(size)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        raise HyLoError(f"{path} is missing: .metadata names it; {REMEDY}") from None


# ---- megatron-core's own reads ----


def load_array(path, mmap_mode=None, **_) -> np.ndarray:
    """Read an index of samples, which holds numbers. ``safe_numpy_load`` of megatron-core would also take pickles."""
    try:
        return np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except (ValueError, EOFError) as error:  # an empty file
        raise HyLoError(f"{path}: no array of numbers ({_line(error)}): remove the file, it is made again") from None
