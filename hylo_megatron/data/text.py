"""Writes train.jsonl, eval_prose.jsonl, eval_code.jsonl and SOURCES.md from the packages in ``sources.py``."""

import argparse
import json
import os
import time
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from hylo_megatron.data.download import cache_folder, fetch_wheel
from hylo_megatron.data.readers import read_source
from hylo_megatron.data.sources import SOURCES, Source
from hylo_megatron.errors import HyLoError, command_line

ROLES = ("train", "eval_prose", "eval_code")
LONGEST_EVAL = 30_000  # characters
SHINGLE = 30  # words; a training document with this run of an evaluation document may be seen as a copy
STRIDE = 10  # training documents are probed every STRIDE words: shared runs of SHINGLE + STRIDE are always found


@dataclass(frozen=True)
class Document:
    text: str
    source: Source

    def line(self) -> str:
        value = {"text": self.text, "source": self.source.name, "licence": self.source.licence}
        return json.dumps(value, ensure_ascii=False) + "\n"


def _digest(text: str) -> bytes:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _words(text: str) -> list[str]:
    return text.lower().split()


def shingles(text: str, stride: int = 1) -> set[bytes]:
    """Digests of the runs of SHINGLE words that begin at every ``stride``-th word; of all words if there are fewer."""
    words = _words(text)
    starts = range(0, max(1, len(words) - SHINGLE + 1), stride)
    return {_digest(" ".join(words[start : start + SHINGLE])) for start in starts}


def cut_at_line(text: str, longest: int) -> str:
    """``text`` up to the last line end within ``longest`` characters."""
    if len(text) <= longest:
        return text
    return text[: text.rfind("\n", 0, longest) + 1 or longest].rstrip()


def select(
    source: Source, texts: Iterable[str], seen: set[bytes], forbidden: set[bytes]
) -> tuple[list[Document], int]:
    """The documents to keep of one source, and how many were dropped as duplicates or for touching evaluation.

    The order, and so the choice under the limit, is that of the texts' digests: stable and spread over the source.
    ``seen`` collects what was kept, over all sources.
    """
    training, kept, used, dropped = source.role == "train", [], 0, 0
    for text in sorted(texts, key=_digest):
        if not training:
            text = cut_at_line(text, LONGEST_EVAL)
        if len(text) < source.shortest or (training and used + len(text) > source.limit):
            continue
        identity = _digest(" ".join(_words(text)))
        if identity in seen or (training and not forbidden.isdisjoint(shingles(text, STRIDE))):
            dropped += 1
            continue
        if not training and len(kept) == source.limit:
            break
        seen.add(identity)
        kept.append(Document(text, source))
        used += len(text)
    return kept, dropped


def collect(cache: Path, sources: tuple[Source, ...] = SOURCES) -> tuple[dict[str, list[Document]], list[dict]]:
    """Documents by role, and one summary row a source. Evaluation is read first: training must keep clear of it."""
    by_role: dict[str, list[Document]] = {role: [] for role in ROLES}
    seen: set[bytes] = set()
    forbidden: set[bytes] = set()
    rows = []
    for source in sorted(sources, key=lambda item: item.role == "train"):
        with zipfile.ZipFile(fetch_wheel(source.wheel, cache)) as archive:
            kept, dropped = select(source, read_source(source.reader, archive, source.member), seen, forbidden)
        if source.role != "train":
            for document in kept:
                forbidden |= shingles(document.text)
        by_role[source.role] += kept
        characters = sum(len(document.text) for document in kept)
        rows.append({"source": source, "documents": len(kept), "characters": characters, "dropped": dropped})
        print(
            f"{source.name} ({source.role}): {len(kept)} documents, {characters / 1e6:.2f}M characters"
            + (f", {dropped} dropped as copies" if dropped else ""),
            flush=True,
        )
    for documents in by_role.values():  # sources well mixed, the same way every time
        documents.sort(key=lambda document: _digest(document.text))
    return by_role, rows


def sources_page(rows: list[dict]) -> str:
    """SOURCES.md: where each document came from and what its licence is."""
    lines = [
        "# Where this text comes from",
        "",
        "`eval_*` documents are for evaluation: never train on them. No training document shares a run of "
        f"{SHINGLE + STRIDE} words with them.",
        "",
        "| file | source | package | licence of the text | documents | characters | sha256 of the package |",
        "|---|---|---|---|---:|---:|---|",
    ]
    for row in rows:
        source = row["source"]
        lines.append(
            f"| {source.role}.jsonl | {source.name} | {source.wheel.package} {source.wheel.version} | "
            f"{source.licence} | {row['documents']} | {row['characters']} | `{source.wheel.sha256}` |"
        )
    return "\n".join(lines) + "\n"


def _write(path: Path, lines: Iterable[str]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(partial, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(lines)
        os.replace(partial, path)
    except OSError as error:
        raise HyLoError(f"cannot write {path} ({error.strerror}): free space, or choose another --out") from error
    finally:
        partial.unlink(missing_ok=True)


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line of ``tools/fetch_text.py``."""
    parser = argparse.ArgumentParser(description="Write training and evaluation text from pinned packages.")
    parser.add_argument("--out", required=True, type=Path, help="folder for the .jsonl files and SOURCES.md")
    parser.add_argument("--cache", help="folder for downloads (default $HYLO_CACHE or ~/.cache/hylo_megatron)")
    arguments = parser.parse_args(argv)
    began = time.monotonic()
    arguments.out.mkdir(parents=True, exist_ok=True)
    by_role, rows = collect(cache_folder(arguments.cache))
    contents = {f"{role}.jsonl": (document.line() for document in by_role[role]) for role in ROLES}
    contents["SOURCES.md"] = (sources_page(rows),)
    for name, lines in contents.items():
        _write(arguments.out / name, lines)
    counts = [
        f"{role} {len(kept)} documents {sum(len(document.text) for document in kept) / 1e6:.1f}M characters"
        for role, kept in by_role.items()
    ]
    print(f"{arguments.out}: {', '.join(counts)}, in {time.monotonic() - began:.1f} s")
