"""Code planted in checkpoints: every file of one that is, or holds, a pickle."""

import io
import os
import pickle
import shutil
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex


class Touch:
    """Unpickled by ``pickle`` it makes the file ``marker``."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


NAMED = "posix.mkdir"


def saved(value) -> bytes:
    torch.save(value, file := io.BytesIO())
    return file.getvalue()


def read(iteration: Path) -> Metadata:
    return pickle.loads((iteration / ".metadata").read_bytes())


def write(iteration: Path, metadata) -> None:
    (iteration / ".metadata").write_bytes(pickle.dumps(metadata))


def replace_part(iteration: Path, key: str, data: bytes) -> None:
    """``data`` in place of what was saved under ``key``; an object of that name is added where there is none."""
    metadata = read(iteration)
    found = [index for index in metadata.storage_data if index.fqn == key]
    if not found:
        metadata.state_dict_metadata[key] = BytesStorageMetadata()
        found = [MetadataIndex(key)]
    path = iteration / "__0_0.distcp"
    metadata.storage_data[found[0]] = _StorageInfo(path.name, path.stat().st_size, len(data))
    with path.open("ab") as file:
        file.write(data)
    write(iteration, metadata)


def in_metadata(iteration: Path, code: Touch) -> None:
    metadata = read(iteration)
    metadata.planner_data = code
    write(iteration, metadata)


def as_metadata(iteration: Path, code: Touch) -> None:
    write(iteration, code)


def in_common_state(iteration: Path, code: Touch) -> None:
    replace_part(iteration, "common_state/shard_0_1", saved([{"checkpoint_version": 3.0, "iteration": 4, "x": code}]))


def in_random_state(iteration: Path, code: Touch) -> None:
    replace_part(iteration, "rng_state/shard_0.0_1.1", saved([code]))


def in_plain_pickle(iteration: Path, code: Touch) -> None:
    """torch.load takes files from before its zip format too."""
    replace_part(iteration, "common_state/shard_0_1", pickle.dumps(code))


def in_legacy_common(iteration: Path, code: Touch) -> None:
    (iteration / "common.pt").write_bytes(saved({"args": code}))


def in_a_tensor(iteration: Path, code: Touch) -> None:
    replace_part(iteration, "embedding.word_embeddings.weight", saved(code))


KINDS = {
    plant.__name__: plant
    for plant in (in_metadata, as_metadata, in_common_state, in_random_state, in_plain_pickle, in_legacy_common,
                  in_a_tensor)
}  # fmt: skip


def plant(source: Path, target: Path, kind: str, marker: Path) -> Path:
    """A copy of the checkpoint ``source`` whose latest iteration would make ``marker``."""
    from hylo_megatron.checkpoint.iterations import latest

    shutil.copytree(source, target)
    KINDS[kind](latest(target), Touch(marker))
    return target
