"""The prose mix: its readers on small packages made here, its held-out books, and mixes that must not change."""

import gzip
import hashlib
import json
import runpy
import struct
import zipfile
import zlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.package_files import cached_wheel, zip_bytes
from helpers.paths import ROOT
from helpers.text import make_tokenizer
from transformers import AutoTokenizer

from hylo_megatron.corpus import prose_readers, text
from hylo_megatron.corpus.large_mix import LARGE_MIX
from hylo_megatron.corpus.prose_mix import PROSE_MIX
from hylo_megatron.corpus.r_data import text_vectors
from hylo_megatron.corpus.readers import read_source
from hylo_megatron.corpus.sources import SMALL_MIX, Source
from hylo_megatron.errors import HyLoError
from hylo_megatron.recipes import smollm2


def digest_of(mix: tuple[Source, ...]) -> str:
    """Return the sha256 of all that decides the text of a mix."""
    rows = [
        (s.name, s.package.file_name, s.package.sha256, s.role, s.reader, s.member, s.limit, s.shortest, s.longest)
        + (s.quotes, s.titled)
        for s in mix
    ]
    return hashlib.sha256(repr(rows).encode()).hexdigest()


def read(tmp_path, reader: str, members: dict, member: str) -> list[str]:
    (tmp_path / "package.whl").write_bytes(zip_bytes(members))
    with zipfile.ZipFile(tmp_path / "package.whl") as archive:
        return list(read_source(reader, archive, member))


# ---- the table

# rows of the two mixes on which recorded runs were trained; a changed row is another text under an old name
RECORDED = {
    "small": "9c1637511a9af06d1bbff70eab3dc1e7570d5e9d34f38dd7241e5e3930c2b938",
    "large": "11e5d4cfba18883926c1d29957f4161891e8fd6a21c23935d7d67bd355362fe8",
}


@pytest.mark.parametrize("mix", RECORDED)
def test_the_text_of_earlier_recipes_stays_what_it_was(mix):
    assert digest_of(text.MIXES[mix]) == RECORDED[mix]
    assert digest_of(text.MIXES[mix][1:]) != RECORDED[mix]


def test_a_recipe_has_another_mix_only_if_asked(monkeypatch):
    runs = []
    monkeypatch.setattr(smollm2, "Run", lambda recipe, *_: SimpleNamespace(execute=lambda: runs.append(recipe)))
    for arguments in ([], ["--text", "prose"]):
        smollm2.main(["--recipe", "base", *arguments])
    own = smollm2.RECIPES["base", torch.cuda.is_available()]()
    assert runs == [own, replace(own, text="prose")]
    texts = {name: recipe().text for name, recipe in smollm2.RECIPES.items()}
    assert texts == {
        ("base", False): "small", ("base", True): "large", ("window", False): "small", ("window", True): "prose",
    }  # fmt: skip


def test_the_prose_mix_adds_to_the_large_one():
    names = [source.name for source in PROSE_MIX]
    assert names[: len(LARGE_MIX)] == [source.name for source in LARGE_MIX]
    assert not {source.role for source in (*SMALL_MIX, *LARGE_MIX)} & {"eval_books"}
    assert sum(source.role == "eval_books" for source in PROSE_MIX) >= 3


def test_held_out_books_are_whole_and_keep_their_quotations_out_of_training(tmp_path):
    book = "\n\n".join(f"{at} " + " ".join(f"word{at * 50 + i}" for i in range(50)) for at in range(900))
    quoted = book.split("\n\n")[7]
    books = cached_wheel(tmp_path, "books", {"book.txt": book, "train.txt": f"Before.\n\n{quoted}\n\nAfter."})
    sources = (
        Source("train", books, "PD", "train", "novels", "train.txt", 10**6, 1, quotes=True),
        Source("book", books, "PD", "eval_books", "novels", "book.txt", 1),
    )
    by_role, _ = text.collect(tmp_path, sources)
    assert len(by_role["eval_books"][0].text) > text.LONGEST_EVAL and by_role["eval_books"][0].text == book
    assert [document.text for document in by_role["train"]] == ["Before.\n\nAfter."]


def test_tokens_are_counted_by_source(tmp_path, capsys):
    tokenizer = make_tokenizer(tmp_path / "hf")
    count = AutoTokenizer.from_pretrained(tokenizer).encode
    rows = [("a", "one two"), ("b", "three"), ("a", "four five six")]
    lines = [json.dumps({"source": source, "text": written}) + "\n" for source, written in rows]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    main = runpy.run_path(str(ROOT / "tools/docs/text_tokens.py"))["main"]
    main(["--text", str(tmp_path), "--tokenizer", str(tokenizer)])
    one, three, four = (len(count(written, add_special_tokens=False)) for _, written in rows)
    assert capsys.readouterr().out.splitlines()[2:] == [
        f"| train.jsonl | a | 2 | {one + four} | {four} |",
        f"| train.jsonl | b | 1 | {three} | {three} |",
        f"| train.jsonl | all | 3 | {one + three + four} | {four} |",
    ]
    with pytest.raises(SystemExit):
        main(["--text", str(tmp_path / "hf"), "--tokenizer", str(tokenizer)])
    assert "no .jsonl files, expected those of hylo fetch-text" in capsys.readouterr().err


# ---- the readers


def test_books_have_whole_paragraphs_and_no_frame():
    line = "the rain fell on the roofs of the town and nobody went out"
    page = (
        "\ufeffThe Project Gutenberg EBook of Rain\nTitle: Rain\n*** START OF THIS PROJECT GUTENBERG EBOOK RAIN ***\n"
        f"\nProduced by A\nand B\n\nCHAPTER I\n\n{line},\r\n{line},\nand _so_ on.\n\n"
        "  Roses are red,\n  violets blue\n\n[Illustration: a roof]\n\n"
        "End of Project Gutenberg's Rain\n\n*** END OF THIS PROJECT GUTENBERG EBOOK RAIN ***\nLicence"
    )
    expected = f"CHAPTER I\n\n{line}, {line}, and so on.\n\nRoses are red,\nviolets blue"
    assert prose_readers.plain_book(page) == expected


def r_object(flags: int, *parts: bytes | int) -> bytes:
    return b"".join(struct.pack(">i", part) if isinstance(part, int) else part for part in (flags, *parts))


def r_string(value: str) -> bytes:
    return r_object(9, len(value), value.encode())


def r_strings(*values: str) -> bytes:
    return r_object(16, len(values), *map(r_string, values))


def r_named(values: dict[str, bytes]) -> bytes:
    names = r_object(0x402, r_object(1, r_string("names")), r_strings(*values), 254)
    return r_object(0x213, len(values), *values.values(), names)


def r_file(value: bytes) -> bytes:
    return b"X\n" + struct.pack(">iii", 3, 0x40201, 0x30500) + r_object(5, b"UTF-8") + value


@pytest.fixture
def r_package() -> dict[str, bytes]:
    data, places = b"", {}
    for name, lines in {"two": ["Two", "", "It rained."], "one": ["One", "", "It snowed.", "It froze."]}.items():
        record = zlib.compress(r_file(r_strings(*lines)))
        places[name] = r_object(13, 2, len(data), len(record) + 4)
        data += struct.pack(">i", 0) + record
    return {"data/Rdata.rdx": gzip.compress(r_file(r_named({"variables": r_named(places)}))), "data/Rdata.rdb": data}


def test_vectors_of_an_r_package_become_one_document(tmp_path, r_package):
    assert read(tmp_path, "r_novels", r_package, "data/Rdata one two") == [
        "One\n\nIt snowed.\nIt froze.\n\n\nTwo\n\nIt rained."
    ]


def test_damaged_data_of_an_r_package_is_refused(tmp_path, r_package):
    with pytest.raises(ValueError, match="not R's binary format"):
        text_vectors(gzip.compress(b"A\n"), b"")
    r_package["data/Rdata.rdb"] = r_package["data/Rdata.rdb"][:40]
    with pytest.raises(HyLoError, match="cannot read data/Rdata one as r_novels .*the mix's table does not fit"):
        read(tmp_path, "r_novels", r_package, "data/Rdata one")


def test_scripture(tmp_path):
    members = {"kjv.py": 'x = Bible("""\nIn the beginning it [was] so.\nAnd then.\n""", 1)'}
    assert read(tmp_path, "scripture", members, "kjv.py") == ["In the beginning it was so.\n\nAnd then."]


def test_countries_keep_running_text_alone(tmp_path):
    history = "The kingdom &amp; its isles united. " * 8 + "<br>It is small."
    country = {
        "Introduction": {"Background": {"text": history}},
        "Geography": {
            "Area": {"total": {"text": "23 456 sq km"}},
            "Ports": {"text": "1. 22; 33; " * 30},
            "Major lakes": {"text": "Long; wide. " * 30},
        },
        "Government": {"Country name": {"conventional short form": {"text": "Ruritania"}}},
    }
    (found,) = read(tmp_path, "countries", {"data/r.json": json.dumps(country)}, "data/*.json")
    expected = "The kingdom & its isles united. " * 8
    assert found == f"Ruritania\n\nBackground\n{expected.strip()} \nIt is small.".replace(" \n", "\n")


def test_recipes_have_ingredients_and_steps(tmp_path):
    soup = {"title": "Soup", "ingredients": ["1 cup () water (1 l/)"], "steps": ["Boil it.", "Serve."]}
    rows = {"a": soup, "b": {**soup, "steps": ["Buy."]}, "c": {**soup, "title": "<b>Soup"}}
    assert read(tmp_path, "recipes", {"r.json": json.dumps(rows)}, "r.json") == [
        "Soup\n\n- 1 cup water (1 l)\n\n1. Boil it.\n2. Serve."
    ]


def test_stories_of_games_have_sentences_alone(tmp_path):
    scenario = (
        '[story]\n[part]\nstory= _ "A long <i>time</i> ago,\nthere was a king."\n[/part]\n[/story]\n'
        '[message]\nspeaker=King Kalenz\nmessage= _ "He said ""go""."\n[/message]\n[message]\nspeaker=$unit.id\n'
        'message= _ "Yes!"\n[/message]\n[message]\nspeaker=Konrad\nimage=x\n[/message]\n[message]\nmessage= _ "No."\n'
        'description= _ "Death of Konrad"\nmessage= _ "$name|, hello."'
    )
    passage = 'He says, "We have waited here for you since the morning."'
    mission = f'# licence\nmission "One"\n\t`{passage}`\n\t\t`Go to <planet> as quickly as you can, and wait there.`\n'
    things = [
        {"type": "T", "name": {"str": "lamp"}, "description": "A small lamp that burns oil.  It gives little light."},
        {
            "type": "N",
            "text": ["They say that nobody lives on the hill any more.", "<name> says that nobody lives here now."],
        },
        {"id": "An id that looks like a sentence, and is none at all."},
    ]
    members = {"1.cfg": scenario, "2.txt": mission, "4.json": json.dumps(things)}
    assert read(tmp_path, "campaigns", members, "*.cfg") == [
        'A long time ago, there was a king.\n\nKing Kalenz: He said "go".\n\nYes!\n\nNo.'
    ]
    assert read(tmp_path, "conversations", members, "*.txt") == [passage]
    assert read(tmp_path, "descriptions", members, "*.json") == [
        "lamp: A small lamp that burns oil. It gives little light.\n\nThey say that nobody lives on the hill any more."
    ]
