"""Plain text of HTML documentation: paragraphs, lists, tables and <pre>, without navigation."""

import re
from collections import Counter
from html.parser import HTMLParser
from typing import NamedTuple

_BLOCK = re.compile(
    "address|article|aside|blockquote|body|br|caption|center|dd|details|div|dl|dt|figcaption|figure|h[1-6]|hr|li|main|ol|"
    "p|pre|section|summary|table|tbody|thead|title|tr|ul"
)
_SPACED = re.compile("blockquote|dl|h[1-6]|hr|ol|p|pre|table|title|ul")  # blocks with an empty line around them
_DROPPED = re.compile("button|footer|form|head|info|nav|noscript|script|select|style|svg")
_VOID = re.compile("area|base|br|col|embed|hr|img|input|link|meta|source|track|wbr")
_NAVIGATION = re.compile(
    r"(?:^|[\s_-])(?:nav\w*|toc\w*|contents|breadcrumbs?|sidebar|sphinxsidebar|related|footer|header-?link|indexterm|"
    r"genindex|mark|permalink|search\w*|menu\w*|copyright|legalnotice)(?:$|[\s_-])",
    re.IGNORECASE,
)
# elements that are dropped if more than this share of their letters is in links
_LINK_LISTS = {"ul": 0.7, "ol": 0.7, "dl": 0.7, "table": 0.7, "p": 0.9, "div": 0.9}
_LINKS_PAGE = 0.5  # a page with a larger share of its letters in links is an index or a table of contents
_EDGE = 12  # lines at each end of a page that may be a site's header or footer


class _Open(NamedTuple):
    """An open element that may turn out to be a list of links, with the text before it."""

    tag: str
    pieces: int
    letters: int
    linked: int


class _Extractor(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self.letters = self.linked = 0
        self._in_link = self._in_pre = False
        self._open: list[_Open] = []
        # the outermost dropped element, and the number of open elements of that name
        self._dropping, self._depth = "", 0

    def handle_starttag(self, tag, attrs):
        if self._dropping:
            self._depth += tag == self._dropping
        elif not _VOID.fullmatch(tag) and (_DROPPED.fullmatch(tag) or _is_navigation(tag, attrs)):
            self._dropping, self._depth = tag, 1
        elif tag == "a":
            self._in_link = any(name == "href" for name, _ in attrs)
        elif tag in ("td", "th"):
            self.pieces.append("" if self._at_gap() else "  ")
        elif _BLOCK.fullmatch(tag):
            if tag in _LINK_LISTS:
                self._open.append(_Open(tag, len(self.pieces), self.letters, self.linked))
            self._in_pre |= tag == "pre"
            self.pieces.append("\n\n" if _SPACED.fullmatch(tag) else "\n- " if tag == "li" else "\n")

    def handle_endtag(self, tag):
        if self._dropping:
            self._depth -= tag == self._dropping
            if not self._depth:
                self._dropping = ""
        elif tag == "a":
            self._in_link = False
        elif _BLOCK.fullmatch(tag):
            self._in_pre &= tag != "pre"
            if tag in _LINK_LISTS:
                self._close(tag)
            self.pieces.append("\n\n" if _SPACED.fullmatch(tag) else "\n")

    def handle_data(self, data):
        if self._dropping:
            return
        letters = len(data.strip())
        self.letters += letters
        self.linked += letters if self._in_link else 0
        if not self._in_pre:
            data = re.sub(r"\s+", " ", data)
            data = data.lstrip(" ") if self._at_gap() else data
        self.pieces.append(data)

    def _at_gap(self) -> bool:
        """Return whether a space at this point would follow another space or begin a line."""
        before = next((piece for piece in reversed(self.pieces) if piece), "\n")
        return before[-1] in " \n"

    def _close(self, tag: str) -> None:
        """Leave the innermost open ``tag``, and drop its text if most of it is links."""
        at = next((i for i in range(len(self._open) - 1, -1, -1) if self._open[i].tag == tag), None)
        if at is None:
            return
        begin = self._open[at]
        del self._open[at:]
        letters, linked = self.letters - begin.letters, self.linked - begin.linked
        if linked > _LINK_LISTS[tag] * letters:
            del self.pieces[begin.pieces :]


def _is_navigation(tag: str, attrs: list[tuple[str, str | None]]) -> bool:
    return tag not in ("html", "body") and any(
        name in ("class", "id", "role") and value and _NAVIGATION.search(value) for name, value in attrs
    )


def plain_html(page: str) -> str:
    """Return the running text of an HTML page; empty if most of the page is links."""
    extractor = _Extractor()
    extractor.feed(page)
    extractor.close()
    if extractor.linked > _LINKS_PAGE * extractor.letters:
        return ""
    text = "".join(extractor.pieces).replace("¶", "")
    text = re.sub(r"^ *\d+\xa0", "", text, flags=re.MULTILINE).replace("\xa0", " ")  # removes line numbers of listings
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    # removes makeinfo's navigation
    text = re.sub(r"^(?:Next|Previous|Up): .{0,300}\[Index\]$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^-\n+(?=\S)", "- ", text, flags=re.MULTILINE)  # joins a list item's mark with its first paragraph
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def without_frame(pages: list[str]) -> list[str]:
    """Return the pages without the lines near their ends that recur on many pages: a site's header and footer."""
    edges = Counter()
    for page in pages:
        lines = page.splitlines()
        edges.update({line for line in (*lines[:_EDGE], *lines[-_EDGE:]) if line})
    common = {line for line, count in edges.items() if count >= max(4, 0.3 * len(pages))}

    def kept(lines: list[str]) -> list[str]:
        return [line for at, line in enumerate(lines) if _EDGE <= at < len(lines) - _EDGE or line not in common]

    return ["\n".join(kept(page.splitlines())).strip() for page in pages]
