"""Initial states of linear blocks beside a checkpoint, a file for each rank, so that a resumed run goes on exactly.

The files are ``SAVE/initial_states/iter_0000100-00003.safetensors`` for iteration 100 and rank 3. They are no part of
the checkpoint: their sizes follow from micro-batch and layout, and a run with other ones starts from zero states.
"""

import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hylo_megatron.checkpoint.beside import drop_orphans, file_beside
from hylo_megatron.files import whole_file

FOLDER = "initial_states"


def _ending(rank: int) -> str:
    return f"-{rank:05d}.safetensors"


def write(save_folder: Path, iteration: int, rank: int, states: dict[str, Tensor], layout: str) -> None:
    """Write this rank's states before the checkpoint of ``iteration``; delete those of checkpoints that are gone."""
    path = file_beside(save_folder, FOLDER, iteration, _ending(rank))
    drop_orphans(path, _ending(rank))
    tensors = {name: state.cpu().contiguous() for name, state in states.items()}
    with whole_file(path) as scratch, scratch.open("wb") as file:
        file.write(save(tensors, {"layout": layout}))
        file.flush()
        os.fsync(file.fileno())


def read(save_folder: Path, iteration: int, rank: int, layout: str) -> dict[str, Tensor] | None:
    """Return this rank's states of ``iteration``; None if the run had none, or another layout."""
    path = file_beside(save_folder, FOLDER, iteration, _ending(rank))
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            same = (file.metadata() or {}).get("layout") == layout
            return {name: file.get_tensor(name) for name in file.keys()} if same else None  # noqa: SIM118
    except SafetensorError:  # damaged
        return None
