"""Readers of prose: novels, an encyclopedia of countries, recipes, and the stories that games tell.

They have the interface of the readers in ``readers.py``.
"""

import html
import json
import re
from collections.abc import Iterator
from statistics import median
from typing import Any

from hylo_megatron.corpus.archive import Archive, decoded, in_reading_order, matching
from hylo_megatron.corpus.r_data import text_vectors

_GUTENBERG = re.compile(r"^.*?\*\*\* ?START OF[^\n]*\*\*\*\n|\*\*\* ?END OF[^\n]*\*\*\*.*$", re.DOTALL)
_GUTENBERG_NOTE = re.compile(r"^(?:Produced by|End of (?:the )?Project Gutenberg)[^\n]*(?:\n[^\n]+)*", re.MULTILINE)
_ILLUSTRATION = re.compile(r"\[(?:Illustration|Sidenote|Footnote)[^\[\]]*\]")
_LONG_LINE = 45  # characters; a paragraph whose lines are shorter is verse, a list or a heading
_SENTENCE_END = (".", "!", "?", '"', "”", "’", "'", ")", "…")
_PLACEHOLDER = re.compile(r"[<>$|{}%&]")  # of a value that a game fills in
_ENOUGH = 40  # characters of a game's text that is a sentence and not a label


def novels(archive: Archive, member: str) -> Iterator[str]:
    """Read every book that ``member`` names, without Project Gutenberg's frame and with a line a paragraph."""
    for name in in_reading_order(matching(archive.namelist(), member)):
        yield plain_book(decoded(archive.read(name), name))


def r_novels(archive: Archive, member: str) -> Iterator[str]:
    """Read character vectors of an R package as one document. ``member``: the data's path without its ending, then
    the names of the vectors, which have a line in each element.
    """
    path, *names = member.split()
    vectors = text_vectors(archive.read(f"{path}.rdx"), archive.read(f"{path}.rdb"))
    yield "\n\n\n".join(plain_book("\n".join(vectors[name])) for name in names)


def scripture(archive: Archive, member: str) -> Iterator[str]:
    """Read the first string in triple quotes of a Python file, without the brackets of added words."""
    text = decoded(archive.read(member), member).split('"""')[1]
    yield re.sub(r"\[([^\[\]]*)\]", r"\1", text).strip().replace("\n", "\n\n")


def countries(archive: Archive, member: str) -> Iterator[str]:
    """Read the running text of the World Factbook's countries, a JSON file each, without its figures."""
    for name in matching(archive.namelist(), member):
        country = json.loads(archive.read(name))
        title = _country_name(country)
        entries = [f"{field}\n{text}" for field, text in _fields(country) if _is_running_text(field, text)]
        if title and entries:
            yield "\n\n".join([title, *entries])


def recipes(archive: Archive, member: str) -> Iterator[str]:
    """Read recipes of a JSON object: title, ingredients and the steps in order."""
    for recipe in json.loads(archive.read(member)).values():
        if len(recipe["steps"]) > 1 and recipe["ingredients"]:
            things = [f"- {_without_gaps(item)}" for item in recipe["ingredients"]]
            steps = [f"{at}. {_without_gaps(step)}" for at, step in enumerate(recipe["steps"], 1)]
            text = "\n".join([recipe["title"], "", *things, "", *steps])
            if not re.search(r"[<>]|https?:", text):  # markup that the package has left
                yield text


def campaigns(archive: Archive, member: str) -> Iterator[str]:
    """Read what is told and said in each file of the Battle for Wesnoth, with the speakers' names."""
    told = re.compile(r'\[message\]|\bspeaker=([^\n]*)|\b(message|story|text)\s*=\s*_\s*"((?:[^"]|"")*)"')
    for name in in_reading_order(matching(archive.namelist(), member)):
        parts, speaker = [], ""
        for who, key, text in told.findall(decoded(archive.read(name), name)):
            if not key:
                speaker = who.strip()
                continue
            text = _told(text.replace('""', '"'))
            if _is_said(text):
                named = key == "message" and re.fullmatch(r"[A-Z][\w' -]*", speaker)
                parts.append(f"{speaker.replace('_', ' ')}: {text}" if named else text)
        yield "\n\n".join(parts)


def conversations(archive: Archive, member: str) -> Iterator[str]:
    """Read the passages of each data file of Endless Sky: strings in backquotes, and long ones in quotation marks."""
    quoted = re.compile(r"`([^`\n]+)`|\"([^\"\n]{60,})\"")
    for name in in_reading_order(matching(archive.namelist(), member)):
        found = quoted.findall(decoded(archive.read(name), name).replace("Captain <last>", "Captain"))
        texts = [_told(passage or label) for passage, label in found]
        yield "\n\n".join(dict.fromkeys(text for text in texts if len(text) >= _ENOUGH and _is_said(text)))


def descriptions(archive: Archive, member: str) -> Iterator[str]:
    """Read the sentences of each JSON file of a game, with the names of the things that they describe."""
    seen: set[str] = set()
    for name in in_reading_order(matching(archive.namelist(), member)):
        parts = []
        for heading, text in _sentences(json.loads(archive.read(name))):
            text = _told(text)
            if text not in seen and len(text) >= _ENOUGH and _is_said(text):
                seen.add(text)
                parts.append(f"{heading}: {text}" if heading else text)
        yield "\n\n".join(parts)


ALL = (novels, r_novels, scripture, countries, recipes, campaigns, conversations, descriptions)


def plain_book(text: str) -> str:
    """Return a book's text with a line a paragraph. Verse and other short or indented lines stay as they are."""
    text = text.lstrip("\ufeff").replace("\r\n", "\n").replace("\xa0", " ")
    text = _ILLUSTRATION.sub("", _GUTENBERG_NOTE.sub("", _GUTENBERG.sub("", text)))
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    paragraphs = (_whole(paragraph) for paragraph in re.split(r"\n{2,}", text) if paragraph.strip())
    return re.sub(r"_([^_\n]{1,200})_", r"\1", "\n\n".join(paragraphs))


def _whole(paragraph: str) -> str:
    lines = paragraph.strip("\n").split("\n")
    indented = any(re.match(r"\s{2,}", line) for line in lines[1:])
    if indented or (len(lines) > 1 and median(len(line) for line in lines[:-1]) < _LONG_LINE):
        return "\n".join(line.strip() for line in lines)
    return re.sub(r"\s+", " ", " ".join(lines)).strip()


def _country_name(country: dict[str, Any]) -> str:
    names = country.get("Government", {}).get("Country name", {})
    for key in ("conventional short form", "conventional long form"):
        name = _plain(names.get(key, {}).get("text", ""))
        if name and name != "none":
            return name
    return ""


def _fields(value: dict[str, Any], field: str = "") -> Iterator[tuple[str, str]]:
    for key, inner in value.items():
        if key == "text" and isinstance(inner, str):
            yield field, _plain(inner)
        elif isinstance(inner, dict):
            yield from _fields(inner, key)


def _plain(text: str) -> str:
    text = html.unescape(re.sub(r"<[^<>]*>", "", re.sub(r"<(?:br|p|/p)[^<>]*>", "\n", text)))
    return re.sub(r" ?\n[ \n]*", "\n", re.sub(r"[ \t\xa0]+", " ", text)).strip()


def _is_running_text(field: str, text: str) -> bool:
    if field.startswith("Major "):  # lists of rivers, lakes and the like
        return False
    digits = sum(letter.isdigit() for letter in text)
    return len(text) >= 200 and text.count(". ") + text.count("; ") >= 2 and digits < 0.06 * len(text)


def _without_gaps(text: str) -> str:
    """Return ``text`` without the brackets of values that are missing."""
    text = re.sub(r"\s*/\s*\)", ")", text)
    return re.sub(r"\s+", " ", re.sub(r"\(\s*\)", "", text)).strip()


def _told(text: str) -> str:
    """Return a game's text in one line, without the marks for italics and the like."""
    text = re.sub(r"</?(?:i|b|span|ref|italic|bold)\b[^<>]*>", "", text)
    return re.sub(r"\s+", " ", text.replace("\\n", " ").replace('\\"', '"')).strip()


def _is_said(text: str) -> bool:
    return len(text) > 1 and text.endswith(_SENTENCE_END) and not _PLACEHOLDER.search(text)


def _sentences(value: Any, heading: str = "") -> Iterator[tuple[str, str]]:
    """Yield the strings of JSON data that may be sentences, in order, each with the name of what it describes."""
    if isinstance(value, str):
        yield "", value
    elif isinstance(value, list):
        for inner in value:
            yield from _sentences(inner)
    elif isinstance(value, dict):
        name = value.get("name", "")
        name = name.get("str", name.get("str_sp", "")) if isinstance(name, dict) else name
        for key, inner in value.items():
            if key == "description" and isinstance(inner, str):
                yield (name if isinstance(name, str) else ""), inner
            elif key not in ("id", "//", "//2", "name"):
                yield from _sentences(inner)
