"""The mark of a training that has diverged, in the folder that it saves to."""

from pathlib import Path

from hylo_megatron.json_file import read_json

DIVERGED = "diverged.json"  # at which step and why the training was stopped


def why_diverged(folder: Path) -> str | None:
    """Return why the training of ``folder`` was stopped, or None if it has not diverged."""
    marker = folder / DIVERGED
    return str(read_json(marker).get("why", "for an unknown reason")) if marker.is_file() else None
