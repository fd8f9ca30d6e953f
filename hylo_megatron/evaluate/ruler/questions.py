"""Questions with their documents, from files in the layouts of SQuAD and HotpotQA."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from hylo_megatron.data.rows import container, read_rows
from hylo_megatron.errors import HyLoError
from hylo_megatron.json_file import check

COLUMNS = ("question", "answers", "answer", "context", "title")
ADVICE = "expected the layout of SQuAD or of HotpotQA"


class Answer(TypedDict):
    text: str


class Asked(TypedDict):
    question: str
    answers: list[Answer]
    is_impossible: NotRequired[bool]


class Paragraph(TypedDict):
    context: str
    qas: list[Asked]


class Article(TypedDict):
    paragraphs: list[Paragraph]


class Articles(TypedDict):
    data: list[Article]


class SquadAnswers(TypedDict):
    text: list[str]


class SquadRow(TypedDict):
    question: str
    context: str
    answers: SquadAnswers | list[str]
    title: NotRequired[str]


class Titled(TypedDict):
    title: list[str]
    sentences: list[list[str]]


class HotpotRow(TypedDict):
    question: str
    answer: str
    context: Titled | list[tuple[str, list[str]]]


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question. ``own``: the documents that it needs; ``related``: others of the same article, used first."""

    text: str
    answers: tuple[str, ...]
    own: tuple[int, ...]
    related: tuple[int, ...] = ()


@dataclass(frozen=True)
class Library:
    """Documents, and questions with the numbers of their documents."""

    documents: list[str]
    questions: list[Question]


class _Shelf:
    """Collects documents without duplicates, and questions."""

    def __init__(self):
        self.numbers: dict[str, int] = {}
        self.articles: dict[Any, dict[int, None]] = {}
        self.asked: list[tuple[str, tuple[str, ...], tuple[int, ...], Any]] = []

    def add(self, question: str, answers: Iterable[str], documents: list[str], article: Any) -> None:
        own = dict.fromkeys(self.place(document, article) for document in documents)
        if found := tuple(dict.fromkeys(answer for answer in answers if answer.strip())):
            self.asked.append((question, found, tuple(own), article))

    def place(self, document: str, article: Any) -> int:
        """Return the document's number."""
        number = self.numbers.setdefault(document.strip(), len(self.numbers))
        self.articles.setdefault(article, {})[number] = None
        return number

    def library(self) -> Library:
        related = {article: tuple(numbers) for article, numbers in self.articles.items() if article is not None}
        questions = [
            Question(
                text=text,
                answers=answers,
                own=own,
                related=tuple(number for number in related.get(article, ()) if number not in own),
            )
            for text, answers, own, article in self.asked
        ]
        return Library(list(self.numbers), questions)


def read_library(path: Path) -> Library:
    """Read a file of questions: SQuAD's or HotpotQA's own JSON, or their rows as ``datasets`` writes them.

    Questions without an answer are left out. Raises ``HyLoError``.
    """
    path, shelf = Path(path), _Shelf()
    for row in read_rows(path, _rows_of(path), COLUMNS):
        value = row.value if isinstance(row.value, dict) else {}
        if "data" in value:
            articles = check(value, Articles, row.where, ADVICE)["data"]
            for number, article in enumerate(articles):
                _add_article(shelf, article, number)
        elif "paragraphs" in value:
            _add_article(shelf, check(value, Article, row.where, ADVICE), row.where)
        elif "answers" in value:
            squad = check(value, SquadRow, row.where, ADVICE)
            answers = squad["answers"]["text"] if isinstance(squad["answers"], dict) else squad["answers"]
            shelf.add(squad["question"], answers, [squad["context"]], squad.get("title"))
        else:
            hotpot = check(value, HotpotRow, row.where, ADVICE)
            shelf.add(hotpot["question"], [hotpot["answer"]], list(_documents(hotpot["context"])), None)
    if not shelf.asked:
        raise HyLoError(f"{path}: has no question with an answer; {ADVICE}")
    return shelf.library()


def _rows_of(path: Path) -> str:
    kind = container(path)
    if kind == "text":
        raise HyLoError(f"{path}: is plain text; {ADVICE}")
    return kind


def _add_article(shelf: _Shelf, article: Article, name: Any) -> None:
    for paragraph in article["paragraphs"]:
        shelf.place(paragraph["context"], name)
        for asked in paragraph["qas"]:
            if not asked.get("is_impossible"):
                answers = (answer["text"] for answer in asked["answers"])
                shelf.add(asked["question"], answers, [paragraph["context"]], name)


def _documents(context: Titled | list[tuple[str, list[str]]]) -> Iterator[str]:
    pairs = zip(context["title"], context["sentences"], strict=True) if isinstance(context, dict) else context
    for title, sentences in pairs:
        yield f"{title}\n{''.join(sentences)}"
