"""Measurements kept in a folder, one file each, so that an interrupted selection can continue."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from hylo_megatron.errors import HyLoError
from hylo_megatron.files import write_json
from hylo_megatron.json_file import read_json
from hylo_megatron.select.judge import Measured

SETTINGS, FOLDER = "settings.json", "measured"
Layers = frozenset[int]


class Cache:
    """Results in a folder. ``measured/4+14.json`` is the result of the student with layers 4 and 14 restored."""

    def __init__(self, out: Path, settings: dict[str, Any]):
        self.folder = out / FOLDER
        self.folder.mkdir(parents=True, exist_ok=True)
        path = out / SETTINGS
        if path.is_file():
            _check_same(path, read_json(path), settings)
        else:
            write_json(path, settings)

    def read(self) -> dict[Layers, Measured]:
        """Return every measurement of the folder. Raises ``HyLoError`` for a damaged file."""
        advice = "remove the file to measure again"
        return {layers_of(path.stem): read_json(path, Measured, advice) for path in self.folder.glob("*.json")}

    def write(self, layers: Layers, measured: Measured) -> None:
        write_json(self.folder / f"{name_of(layers)}.json", asdict(measured))


def name_of(layers: Layers) -> str:
    return "+".join(map(str, sorted(layers))) or "none"


def layers_of(name: str) -> Layers:
    return frozenset() if name == "none" else frozenset(map(int, name.split("+")))


def _check_same(path: Path, found: dict, wanted: dict) -> None:
    for name in dict.fromkeys((*wanted, *found)):
        if found.get(name) != wanted.get(name):
            raise HyLoError(
                f"{path}: {name} is {found.get(name)!r}, this call has {wanted.get(name)!r}; expected the same"
                " settings to go on with the scores of this folder: give another --out"
            )
