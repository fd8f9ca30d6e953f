"""Files that a training keeps beside its checkpoints, in a folder of their own, and deletes with them.

A file's name begins with that of the checkpoint: ``SAVE/guard/iter_0000100.json``. Such files are no part of the
checkpoint: one without them loads.
"""

from pathlib import Path

from hylo_megatron.checkpoint.iterations import iteration_folder


def file_beside(save_folder: Path, kind: str, iteration: int, ending: str) -> Path:
    """Return the file of ``kind`` that belongs to the checkpoint of ``iteration``."""
    return save_folder / kind / f"{iteration_folder(save_folder, iteration).name}{ending}"


def drop_orphans(path: Path, ending: str) -> None:
    """Make the folder of ``path``, and delete files with this ending in it whose checkpoints are gone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for older in path.parent.glob(f"iter_*{ending}"):
        if not (path.parent.parent / older.name.removesuffix(ending)).exists():
            older.unlink(missing_ok=True)
