"""Sampled text on the disk: numbered JSON-lines files, and ``sampled.json`` with their origin and their counts.

A shard counts once ``sampled.json`` lists it. Files that an interrupted run left beyond are overwritten.
"""

import datetime
import json
from collections import Counter
from pathlib import Path

from hylo_megatron.errors import HyLoError
from hylo_megatron.files import write_json, write_lines
from hylo_megatron.json_file import read_json
from hylo_megatron.sample.keep import Keeper

SIDECAR = "sampled.json"


def to_check(line: dict) -> tuple[str, str | None]:
    """Return what ``Keeper.refusal`` checks: a text, or a chat's last message and the complete chat."""
    if "text" in line:
        return line["text"], None
    contents = [message["content"] for message in line["messages"]]
    return contents[-1], "\n".join(contents)


class Shards:
    """The shards of folder ``out``. ``settings``: everything on which the text depends, as JSON has it."""

    def __init__(self, out: Path, settings: dict, origin: dict):
        self.out, self.path = out, out / SIDECAR
        settings = json.loads(json.dumps(settings))
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.about = {"kind": "text sampled from a teacher", **origin, "date": now, "settings": settings, "shards": []}
        if self.path.is_file():
            self.about = found = self.read(out)
            for key, value in settings.items():
                if found["settings"].get(key) != value:
                    raise HyLoError(
                        f"{self.path}: {key} is {found['settings'].get(key)!r}, this command has {value!r}:"
                        " use the same flags to go on, or another --out"
                    )

    @staticmethod
    def read(out: Path) -> dict:
        found = read_json(out / SIDECAR, advice="choose another --out, or remove the folder")
        if not isinstance(found.get("settings"), dict) or not isinstance(found.get("shards"), list):
            raise HyLoError(f"{out / SIDECAR}: not written by hylo sample-text: choose another --out")
        return found

    @property
    def tokens(self) -> int:
        return sum(shard["tokens"] for shard in self.about["shards"])

    @property
    def rows(self) -> int:
        return sum(shard["rows"] for shard in self.about["shards"])

    def replay(self, keeper: Keeper) -> None:
        """Add the texts of all shards to ``keeper``. Raises ``HyLoError`` if a shard is not as it was written."""
        for shard in self.about["shards"]:
            path = self.out / shard["file"]
            try:  # as bytes: text would break at U+2028 and its like, which JSON leaves as they are
                lines = [json.loads(line) for line in path.read_bytes().splitlines()]
            except (OSError, ValueError) as error:
                raise HyLoError(f"{path}: cannot be read ({error}): remove {self.out} and begin again") from None
            refused = [line for line in lines if keeper.refusal(*to_check(line))]
            if refused or len(lines) != shard["kept"]:
                raise HyLoError(
                    f"{path}: {len(lines)} texts, expected {shard['kept']} as {SIDECAR} says and none twice: remove"
                    f" {self.out} and begin again"
                )

    def add(self, lines: list[dict], rows: int, tokens: int, dropped: dict[str, int]) -> None:
        """Write the next shard, then list it. ``rows``: all rows that were sampled for it."""
        name = f"sampled-{len(self.about['shards']):05d}.jsonl"
        self.out.mkdir(parents=True, exist_ok=True)
        write_lines(self.out / name, (json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        shard = {"file": name, "rows": rows, "kept": len(lines), "tokens": tokens, "dropped": dropped}
        self.about["shards"].append(shard)
        self.about |= {"rows": self.rows, "tokens": self.tokens, "dropped": dict(self.dropped())}
        write_json(self.path, self.about)

    def dropped(self) -> Counter:
        """Return how many rows were dropped for each reason."""
        return sum((Counter(shard["dropped"]) for shard in self.about["shards"]), Counter())
