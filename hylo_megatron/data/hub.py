"""Data sets that the package ``datasets`` opens: names of a hub, folders of ``save_to_disk``, Arrow files."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hylo_megatron import packages
from hylo_megatron.errors import HyLoError, first_line

PREFIX = "hf://"
SAVED = ("state.json", "dataset_dict.json")  # one of them is in a folder of save_to_disk
SPLIT = "train"
OLDEST = 4  # older versions of datasets run loading scripts


@dataclass(frozen=True)
class HubDataset:
    """A data set by name or path. ``config``: its configuration (subset), if it has several."""

    name: str
    config: str | None = None
    split: str = SPLIT

    @classmethod
    def parse(cls, text: str) -> "HubDataset":
        """Return the data set of ``NAME[:CONFIG][@SPLIT]``. Raises ``HyLoError``."""
        rest, _, split = text.removeprefix(PREFIX).removeprefix("datasets/").partition("@")
        name, _, config = rest.partition(":")
        if not name or ("@" in text and not split):
            raise HyLoError(
                f"{text}: expected a data set such as {PREFIX}OWNER/NAME, with :CONFIG and @SPLIT if needed"
            )
        return cls(name, config or None, split or SPLIT)

    def __str__(self) -> str:
        return f"{PREFIX}{self.name}{f':{self.config}' if self.config else ''}@{self.split}"

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows in order, streamed. Raises ``HyLoError`` with what ``datasets`` says."""
        library = packages.load("datasets", str(self))
        if int(library.__version__.split(".")[0]) < OLDEST:
            raise HyLoError(
                f"{self}: datasets {library.__version__} may run code that a data set brings, expected {OLDEST} or"
                f" newer: pip install 'datasets>={OLDEST}'"
            )
        number = 0
        try:
            for row in self._opened(library):
                number += 1
                yield row
        except HyLoError:
            raise
        except Exception as error:  # scripts, networks, and file formats may raise anything
            raise HyLoError(
                f"{self}: row {number + 1} cannot be read ({first_line(error)}): check the name, :CONFIG and @SPLIT,"
                " and whether this machine reaches the hub"
            ) from error

    def _opened(self, library):
        path = Path(self.name)
        if is_saved(path):
            found = library.load_from_disk(self.name)
            return found[self.split] if isinstance(found, dict) else self._whole(found)
        if path.suffix == ".arrow" and path.is_file():
            self._whole(path)
            return library.load_dataset("arrow", data_files=self.name, split=SPLIT, streaming=True)
        return library.load_dataset(self.name, self.config, split=self.split, streaming=True)

    def _whole(self, found):
        if self.split != SPLIT:
            raise HyLoError(f"{self}: {self.name} has no splits: leave @{self.split} out")
        return found


def is_saved(path: Path) -> bool:
    return path.is_dir() and any((path / name).is_file() for name in SAVED)


def text_input(text: str) -> Path | HubDataset:
    """Return the input that a user names: a file, or a data set of ``datasets``."""
    path = Path(text)
    if text.startswith(PREFIX):
        return HubDataset.parse(text)
    return HubDataset(text) if is_saved(path) or path.suffix == ".arrow" and path.is_file() else path


def size_of(source: Path | HubDataset) -> int:
    """Return the bytes of a file, for the progress display; 0 for a data set, whose size is not known."""
    return 0 if isinstance(source, HubDataset) else source.stat().st_size
