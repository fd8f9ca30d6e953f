"""Documents out of wheels: one function a file layout, ``(archive, member) -> texts`` in a stable order."""

import bz2
import csv
import fnmatch
import html
import io
import json
import re
import zipfile
from collections.abc import Iterator
from xml.etree import ElementTree

from hylo_megatron.errors import HyLoError

SKIPPED_PARTS = ("/tests/", "/testing/", "/locale/", "/_vendor/", "/migrations/")  # repetitive, tables or copies


def first_of_variants(archive: zipfile.ZipFile, member: str) -> Iterator[str]:
    """JSON lines {"0": text, "1": ...} where all keys but "0" are the same sentences shuffled."""
    for line in archive.read(member).decode("utf-8").splitlines():
        yield json.loads(line)["0"]


def zipped_csv(archive: zipfile.ZipFile, member: str) -> Iterator[str]:
    """The column "text" of the one CSV file inside a zip file, under its title where it has one."""
    with zipfile.ZipFile(io.BytesIO(archive.read(member))) as inner:
        rows = csv.DictReader(io.StringIO(inner.read(inner.namelist()[0]).decode("utf-8")))
        for row in rows:
            title = _mend_quotes(row.get("title") or "")
            text = _mend_quotes(row["text"] or "")
            yield f"{title}\n\n{text}" if title else text


def files(archive: zipfile.ZipFile, member: str) -> Iterator[str]:
    """Every file whose path matches the pattern ``member``, without tests, vendored copies and the like."""
    for name in sorted(fnmatch.filter(archive.namelist(), member)):
        if not any(part in f"/{name}" for part in SKIPPED_PARTS):
            yield archive.read(name).decode("utf-8", "replace")


def wikipedia_dump(archive: zipfile.ZipFile, member: str) -> Iterator[str]:
    """Articles of a bzip2-packed (possibly truncated) MediaWiki export as plain text, without redirects and lists."""
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


READERS = {reader.__name__: reader for reader in (first_of_variants, zipped_csv, files, wikipedia_dump)}


def read_source(reader: str, archive: zipfile.ZipFile, member: str) -> Iterator[str]:
    """Documents of ``member`` in ``archive``; HyLoError if it is not there or does not look as expected."""
    try:
        for text in READERS[reader](archive, member):
            yield text.replace("\r\n", "\n").replace("\x00", "").strip()
    except (KeyError, ValueError, csv.Error, zipfile.BadZipFile) as error:
        raise HyLoError(
            f"{archive.filename}: cannot read {member} as {reader} ({error}): the table in sources.py "
            "does not fit this file"
        ) from error


def _mend_quotes(text: str) -> str:
    """The news file lost its non-ASCII characters: an apostrophe became ``"``, a no-break space or a dash ``"?``."""
    text = re.sub(r'(?<=\w)"(?=(?:s|t|d|m|re|ve|ll)\b)', "'", text)
    text = re.sub(r'(?<=\w)"\?(?=\w)', " ", text)
    return text.replace('"?', '" ')


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
    """Running text of a MediaWiki page: templates, tables, media, notes and the back matter are dropped."""
    text = _DROPPED.sub("", html.unescape(text))
    while True:  # templates nest: take the innermost until none is left
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
