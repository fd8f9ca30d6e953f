"""The training text and its evaluation: choosing, keeping them apart, mixing. On small packages made here."""

import dataclasses
import json
import zipfile

import numpy as np
import pytest
from helpers.package_files import cached_deb, cached_wheel

from hylo_megatron.corpus import readers, text
from hylo_megatron.corpus.large_mix import LARGE_MIX
from hylo_megatron.corpus.sources import SMALL_MIX, Source
from hylo_megatron.errors import HyLoError

WORDS = "the quick brown fox jumps over one lazy dog while seven tall ships sail past a small green island"


def prose(seed: int, words: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS.split(), words))


@pytest.fixture
def small_sources(tmp_path):
    lines = [json.dumps({"0": prose(i, 80), "1": "shuffled"}) for i in range(8)]
    evaluation = cached_wheel(tmp_path, "evaluation", {"data.jsonl": "\n".join([*lines, lines[0]])})
    copied = prose(100, 25) + "\n" + prose(3, 80)[40:300].title() + "\n" + prose(101, 25)  # inside other words
    training = cached_wheel(
        tmp_path,
        "training",
        {
            **{f"pkg/{i}.py": prose(50 + i, 120) for i in range(6)},
            "pkg/same.py": prose(50, 120) + "\n",
            "pkg/copied.py": copied,
            "pkg/whole.py": prose(5, 80),
            "pkg/tests/t.py": prose(70, 120),
            "pkg/short.py": "x",
        },
    )
    return (
        Source("code", training, "MIT", "train", "files", "pkg/*.py", 10_000),
        Source("wiki", evaluation, "CC0", "eval_prose", "first_of_variants", "data.jsonl", 6),
    )


def test_train_and_eval_share_no_document_and_no_long_run_of_words(small_sources, tmp_path):
    by_role, rows = text.collect(tmp_path, small_sources)
    train, evaluation = by_role["train"], by_role["eval_prose"]
    assert len(evaluation) == 6 == rows[0]["documents"]
    held_out = {document.text for document in evaluation}
    expected_train = 6 + sum(prose(i, 80) not in held_out for i in (3, 5))  # not drawn, so not forbidden
    assert len(train) == expected_train
    assert not held_out & {document.text for document in train}
    length = text.SHINGLE + text.STRIDE

    def runs(documents):
        words = [document.text.lower().split() for document in documents]
        return {tuple(w[i : i + length]) for w in words for i in range(len(w) - length + 1)}

    assert runs(evaluation) and not runs(evaluation) & runs(train)
    assert len({document.text.strip() for document in train}) == len(train)


def test_copies_of_evaluation_text_are_dropped_from_training(small_sources, tmp_path):
    train, wiki = small_sources
    _, rows = text.collect(tmp_path, (train, dataclasses.replace(wiki, limit=100)))
    by_name = {row["source"].name: row for row in rows}
    assert by_name["wiki"]["documents"] == 8 and by_name["wiki"]["dropped"] == 1
    assert by_name["code"]["documents"] == 6 and by_name["code"]["dropped"] == 3  # copied, whole, same


def test_text_files_are_the_same_every_time(small_sources, tmp_path, monkeypatch):
    monkeypatch.setitem(text.MIXES, "small", small_sources)
    for name in "ab":
        text.main(["--out", str(tmp_path / name), "--cache", str(tmp_path)])
    for name in ("train.jsonl", "eval_prose.jsonl", "SOURCES.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert set(json.loads((tmp_path / "a" / "train.jsonl").read_text().splitlines()[0])) == {
        "text",
        "source",
        "licence",
    }
    assert small_sources[0].package.sha256 in (tmp_path / "a" / "SOURCES.md").read_text()


def test_choice_under_a_limit_does_not_depend_on_the_order_of_reading(small_sources):
    for source in (dataclasses.replace(small_sources[0], limit=1500), dataclasses.replace(small_sources[1], limit=3)):
        texts = [prose(seed, 90) for seed in range(9)]
        forward, backward = (text.select(source, order, set(), set())[0] for order in (texts, texts[::-1]))
        assert forward == backward[::-1] and 2 <= len(forward) < 9  # kept in the order of reading


def test_wrong_member_is_named(small_sources, tmp_path):
    broken = dataclasses.replace(small_sources[1], member="gone.jsonl")
    with pytest.raises(HyLoError, match="evaluation.whl: cannot read gone.jsonl"):
        text.collect(tmp_path, (broken,))


def test_wikitext_becomes_plain_text():
    source = (
        "{{Infobox|a={{b|c}}|d}}'''Anarchism''' is a [[political philosophy|philosophy]]<ref name=x>note</ref>"
        " of [[state]]lessness.<ref name=x />\n[[File:A.jpg|thumb|A [[map]] here]]\n== History ==\n* one &amp; "
        "two\n{| class=x\n| cell\n|}\n== References ==\n{{reflist}}\nlast"
    )
    expected = "Anarchism is a philosophy of statelessness.\n\nHistory\n\none & two"
    assert readers.plain_wikitext(source) == expected


def test_long_evaluation_text_is_cut_at_a_line_end():
    assert text.cut_at_line("one\ntwo\nthree", 9) == "one\ntwo"
    assert text.cut_at_line("x" * 20, 9) == "x" * 9


# ---- the tables


@pytest.mark.parametrize("mix", text.MIXES)
def test_sources_table_keeps_roles_apart(mix):
    sources = text.MIXES[mix]
    by_role = {role: {s for s in sources if s.role == role} for role in text.ROLES}
    assert set().union(*by_role.values()) == set(sources)
    evaluated = {s for s in sources if s.role != "train"}
    places = {(s.package.package, s.member) for s in evaluated}
    shared = {s.package.package for s in by_role["train"] if (s.package.package, s.member) in places}
    assert shared <= {"anarchism"}  # whose held-out documents are those the shingles keep out of training
    assert not {"networkx", "cfi-en"} & {s.package.package for s in by_role["train"]}
    assert len({s.name for s in sources}) == len(sources)
    for source in sources:
        assert source.reader in readers.READERS and source.licence
        assert len(source.package.sha256) == 64 and source.package.version in source.package.file_name.replace(
            "%3a", ":"
        )


def test_large_mix_evaluates_as_the_small_one_does():
    small = {source for source in SMALL_MIX if source.role != "train"}
    assert small < {source for source in LARGE_MIX if source.role != "train"}


def test_kernel_files_for_evaluation_are_no_training_files():
    kernel = {source.role: source for source in LARGE_MIX if source.package.package == "linux-source-6.1"}
    held_out = ["mm/slub.c", "mm/kasan/hw_tags.c", "kernel/sched/fair.c"]
    names = [f"linux-source-6.1/{name}" for name in (*held_out, "fs/inode.c", "kernel/fork.c", "arch/arm/mm/init.c")]

    def taken(role):
        return set(readers.matching(names, kernel[role].member.partition(" ")[2]))

    assert taken("eval_c") == set(names[:3]) and taken("train") == set(names[3:5])


# ---- the large mix


def paragraph_page(*paragraphs: str) -> str:
    return f"<html><head><title>t</title></head><body>{''.join(f'<p>{p}</p>' for p in paragraphs)}</body></html>"


@pytest.fixture
def large_sources(tmp_path):
    quoted = prose(7, 60)
    pages = {f"doc/{i}.html": paragraph_page(prose(20 + i, 90), prose(40 + i, 90)) for i in range(10)}
    pages["doc/10.html"] = paragraph_page(quoted, *(prose(60 + i, 90) for i in range(8)))  # long: for evaluation
    pages["doc/11.html"] = paragraph_page(prose(80, 90), "He wrote: " + quoted, prose(81, 90))
    essays = cached_deb(tmp_path, "essays", pages)
    manual = cached_deb(tmp_path, "manual", {f"doc/{i}.txt": prose(200 + i, 50) for i in range(9)})
    return (
        Source("essays", essays, "GPL", "train", "pages", "doc/*.html", 10**9, quotes=True),
        Source("manual", manual, "GPL", "train", "documents", "doc/*.txt", 10**9),
        Source("essays (held out)", essays, "GPL", "eval_long", "pages", "doc/*.html", 2, 3_000),
    )


def test_quotations_are_cut_out_of_training_and_the_rest_is_kept(large_sources, tmp_path):
    by_role, rows = text.collect(tmp_path, large_sources)
    (held_out,) = by_role["eval_long"]
    assert len(held_out.text) > 3_000 and prose(7, 60) in held_out.text
    train = [document.text for document in by_role["train"] if document.source.name == "essays"]
    assert len(train) == 11 and held_out.text not in train
    assert f"{prose(80, 90)}\n\n{prose(81, 90)}" in train
    forbidden = text.shingles(held_out.text)
    assert all(forbidden.isdisjoint(text.shingles(document)) for document in train)
    assert text.without_copies(train[0], forbidden) == train[0]


def test_a_run_over_two_paragraphs_is_cut_with_both(large_sources):
    first, second = prose(1, 20), prose(2, 20)
    forbidden = text.shingles(f"{first} {second}")
    assert text.without_copies(f"before\n\n{first}\n\n{second}\n\nafter", forbidden) == "before\n\nafter"


def test_documents_are_mixed_in_blocks_of_one_source(large_sources, tmp_path):
    by_role, _ = text.collect(tmp_path, large_sources)
    train = by_role["train"]
    size = 1_200
    order = text.in_blocks(train, size)
    assert order != train and sorted(order, key=train.index) == train
    assert order == text.in_blocks(train, size)
    runs, last = [], None
    for document in order:  # a new run where the next document is not the next of its source
        if last is None or train.index(document) != train.index(last) + 1 or document.source != last.source:
            runs.append([])
        runs[-1].append(document)
        last = document
    assert len(runs) > 3 and all(sum(len(document.text) for document in run) >= size for run in runs)
    alone = text.in_blocks(train[:2], 10**6)  # a source smaller than a block is one block
    assert alone == train[:2]


def test_large_mix_is_written_with_what_was_really_had(large_sources, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(text.MIXES, "large", large_sources)
    (tmp_path / "manual_1%3a1.0-1_all.deb").rename(tmp_path / "manual_1%3a1.2-1_all.deb")  # the mirror moved on
    text.main(["--mix", "large", "--out", str(tmp_path / "out"), "--cache", str(tmp_path)])
    assert "warning: manual 1:1.2-1 is used for want of 1:1.0-1" in capsys.readouterr().out
    page = (tmp_path / "out" / "SOURCES.md").read_text()
    assert "| manual 1:1.2-1 |" in page and large_sources[1].package.sha256 in page
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "SOURCES.md",
        "eval_long.jsonl",
        "train.jsonl",
    ]
    lines = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    assert {line["source"] for line in lines} == {"essays", "manual"}


def test_blocks_of_a_source_with_a_limit_are_spread_over_the_file(large_sources):
    whole, limited = (dataclasses.replace(large_sources[1], name=name) for name in ("whole", "limited"))
    texts = [prose(seed, 12) for seed in range(600)]
    limited = dataclasses.replace(limited, limit=sum(map(len, texts[:300])) // 5, shortest=1)
    documents = [
        *text.select(limited, texts[:300], set(), set())[0],
        *text.select(dataclasses.replace(whole, shortest=1), texts[300:], set(), set())[0],
    ]
    order = text.in_blocks(documents, 1)
    places = [place / len(order) for place, document in enumerate(order) if document.source.name == "limited"]
    assert 40 < len(places) < 80 and 0.4 < sum(places) / len(places) < 0.6


def test_articles_on_a_held_out_subject_are_left_out(tmp_path):
    held_out = cached_wheel(tmp_path, "held", {"a.txt": "Ant\n\n" + prose(1, 80)})
    articles = {str(i): {"title": name, "extract": prose(10 + i, 60)} for i, name in enumerate(["Bee", " ant", "Owl"])}
    articles["empty"] = {"title": "Elk", "extract": ""}
    training = cached_wheel(tmp_path, "articles", {"all.json": json.dumps(articles)})
    sources = (
        Source("held", held_out, "MIT", "eval_prose", "files", "*.txt", 10),
        Source("articles", training, "MIT", "train", "json_articles", "all.json", 10_000, titled=True),
    )
    kept, rows = text.collect(tmp_path, sources)
    assert sorted(document.text.partition("\n")[0] for document in kept["train"]) == ["Bee", "Owl"]
    assert rows[-1]["dropped"] == 1


def test_a_line_of_json_ends_at_a_line_feed_alone(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("data.jsonl", '{"0": "one\u2028two"}\n{"0": "three"}\n')
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert list(readers.first_of_variants(archive, "data.jsonl")) == ["one\u2028two", "three"]
