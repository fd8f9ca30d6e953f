"""Debian packages: fetching with a faked apt-get, reading, and plain text of what is inside."""

import gzip
import hashlib
import shutil
import subprocess
import types

import pytest
from helpers.package_files import ar_bytes, cached_deb, deb_bytes, tar_bytes

from hylo_megatron.corpus.debian import Deb, DebFile, fetch_deb
from hylo_megatron.corpus.html_text import plain_html, without_frame
from hylo_megatron.corpus.readers import read_source
from hylo_megatron.errors import HyLoError

GOOD = deb_bytes({"a.txt": "a"})
DEB = Deb("book", "1:2.0-1", hashlib.sha256(GOOD).hexdigest())


def fake_apt(monkeypatch, offered: dict[str, bytes], failure: str = "") -> list[str]:
    """An apt-get whose archive has ``offered`` versions of every package; the newest is the last."""
    asked = []

    def run(command, cwd, **_):
        what, _, version = command[-1].partition("=")
        asked.append(command[-1])
        if failure or (version and version not in offered):
            reason = failure or f"E: Version '{version}' for '{what}' was not found"
            return types.SimpleNamespace(returncode=100, stderr=f"W: some warning\n{reason}\n", stdout="")
        version = version or list(offered)[-1]
        with open(f"{cwd}/{what}_{version.replace(':', '%3a')}_all.deb", "wb") as file:
            file.write(offered[version])
        return types.SimpleNamespace(returncode=0, stderr="", stdout="")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    return asked


# ---- downloads


def test_package_is_downloaded_once_and_a_damaged_copy_again(tmp_path, monkeypatch, capsys):
    asked = fake_apt(monkeypatch, {DEB.version: GOOD})
    path, had = fetch_deb(DEB, tmp_path / "cache")
    assert path.read_bytes() == GOOD and path.name == "book_1%3a2.0-1_all.deb" and had == DEB
    fetch_deb(DEB, tmp_path / "cache")
    assert asked == ["book=1:2.0-1"]
    path.write_bytes(b"torn")
    assert fetch_deb(DEB, tmp_path / "cache")[0].read_bytes() == GOOD
    assert len(asked) == 2 and [file.name for file in path.parent.iterdir()] == [path.name]
    assert "warning" not in capsys.readouterr().out


def test_newest_is_taken_with_a_warning_when_the_pinned_version_is_gone(tmp_path, monkeypatch, capsys):
    newer = deb_bytes({"a.txt": "b"})
    asked = fake_apt(monkeypatch, {"2.1-1": newer})
    path, had = fetch_deb(DEB, tmp_path)
    assert asked == ["book=1:2.0-1", "book"] and path.read_bytes() == newer
    assert had == Deb("book", "2.1-1", hashlib.sha256(newer).hexdigest())
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert warnings == ["warning: book 2.1-1 is used for want of 1:2.0-1: its text differs somewhat"]
    assert fetch_deb(DEB, tmp_path)[1] == had and len(asked) == 2  # offline from now on


@pytest.mark.parametrize(
    "offered, failure, message",
    [
        ({DEB.version: b"evil"}, "", "expected " + DEB.sha256),
        ({}, "E: Unable to locate package book", "Unable to locate package book.*apt-get update.*Debian 12"),
        ({}, "E: Write error - write (28: No space left on device)", "no space left in .*--cache"),
    ],
)
def test_failed_download_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, offered, failure, message):
    fake_apt(monkeypatch, offered, failure)
    with pytest.raises(HyLoError, match=message) as caught:
        fetch_deb(DEB, tmp_path)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_machine_without_apt_is_told_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(HyLoError, match="without apt-get.*Debian or Ubuntu machine or container.*hylo prepare-data"):
        fetch_deb(DEB, tmp_path)


# ---- reading


@pytest.mark.parametrize("packing", ["xz", "gz"])
def test_files_are_read_in_memory_and_links_are_not_followed(tmp_path, packing):
    path = tmp_path / "x_1_all.deb"
    members = {"usr/share/doc/x/a.txt": "text", "../../outside": "never written"}
    path.write_bytes(deb_bytes(members, links={"./usr/share/doc/x/secret": "/etc/hostname"}, packing=packing))
    with DebFile(path) as deb:
        assert deb.namelist() == list(members)
        assert deb.read("usr/share/doc/x/a.txt") == b"text"
        with pytest.raises(KeyError):
            deb.read("usr/share/doc/x/secret")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"junk", "x.deb: not a readable Debian package"),
        (ar_bytes({"debian-binary": "2.0\n"}), "x.deb: not a readable Debian package"),
        (ar_bytes({"data.tar.xz": "junk"}), "x.deb: not a readable Debian package"),
        (deb_bytes({"a": "a"})[:-40], "x.deb: not a readable Debian package"),
    ],
)
def test_damaged_package_is_named(tmp_path, content, message):
    (tmp_path / "x.deb").write_bytes(content)
    with pytest.raises(HyLoError, match=message):
        DebFile(tmp_path / "x.deb")


def texts(tmp_path, reader: str, member: str, members: dict) -> list[str]:
    deb = cached_deb(tmp_path, "x", members)
    with DebFile(tmp_path / deb.file_name) as archive:
        return list(read_source(reader, archive, member))


def test_documents_are_unpacked_and_foreign_ones_left_out(tmp_path):
    members = {
        "doc/ch10.txt": "ten",
        "doc/ch2.txt.gz": gzip.compress("zwei – two, and a good deal more English text".encode()),
        "doc/latin1.txt": "caf\xe9 is the only foreign word of this sentence".encode("latin-1"),
        "doc/ru.txt": "Привет, мир",
        "doc/old/ch1.txt": "one",
    }
    found = texts(tmp_path, "documents", "doc/*.txt doc/*.gz !doc/old/*", members)
    assert [text.split()[0] for text in found] == ["zwei", "ten", "café"]


def test_pattern_that_finds_nothing_is_an_error(tmp_path):
    with pytest.raises(HyLoError, match="x_1%3a1.0-1_all.deb: cannot read doc/.*.html as pages"):
        texts(tmp_path, "pages", "doc/*.html", {"doc/a.txt": "a"})


def test_dictionary_comes_in_parts_of_whole_entries(tmp_path):
    entries = [f"word{i}\n   n. {'meaning ' * 400}\n      [1913 Webster]" for i in range(50)]
    content = gzip.compress("\n\n".join(["\n\n00-database-info\n   about", *entries]).encode())
    parts = texts(tmp_path, "dictionary", "d.dict.dz", {"d.dict.dz": content})
    assert len(parts) == 3 and parts[0].startswith("word0\n   n. meaning") and parts[1].startswith("word19\n")
    assert "Webster" not in "".join(parts) and "00-database" not in "".join(parts)


def test_inner_tar_gives_the_files_its_patterns_name(tmp_path):
    inner = tar_bytes({"k/a.c": "a", "k/mm/b.c": "b", "k/a.h": "h"}, links={"k/l.c": "/etc/hostname"})
    assert texts(tmp_path, "inner_tar", "src.tar *.c !*/mm/*", {"src.tar": inner}) == ["a"]


def test_book_is_one_document_in_reading_order(tmp_path):
    pages = {f"b/ch{i}.html": f"<body><h1>Chapter {i}</h1><p>Text {i}.</p></body>" for i in (1, 2, 10)}
    (book,) = texts(tmp_path, "book", "b/*.html", pages)
    assert book == "Chapter 1\n\nText 1.\n\nChapter 2\n\nText 2.\n\nChapter 10\n\nText 10."


# ---- HTML


def test_html_becomes_plain_text():
    page = """<html><head><title>x</title><style>p {}</style></head><body>
    <div class="navheader"><div>up</div>next</div>
    <h1>A &amp; B<a class="headerlink" href="#">¶</a></h1><p>One   <b>bold</b>
    word.<p>Two.<script>x()</script>
    <pre>  1&nbsp;if a:
  2&nbsp;    b</pre><ul><li><p>item</p></li><li><a href="1">elsewhere</a> is described</li></ul>
    <ul><li><a href="1">only</a></li><li><a href="2">links</a></li></ul>
    <table><tr><td>left<td>right</tr></table></body></html>"""
    expected = "A & B\n\nOne bold word.\n\nTwo.\n\nif a:\n    b\n\n- item\n\n- elsewhere is described\n\nleft  right"
    assert plain_html(page) == expected


def test_page_of_links_is_empty():
    assert (
        plain_html("<h1>Index</h1><div><h2><a href='a'>first entry</a></h2><h3><a href='b'>second</a></h3></div>")
        == ""
    )


def test_frame_of_a_site_is_taken_off():
    pages = [f"The Site\n\nPage {i}\ntext {i}\n\nLast changed today" for i in range(5)]
    assert without_frame(pages) == [f"Page {i}\ntext {i}" for i in range(5)]
    assert without_frame(pages[:3]) == pages[:3]  # too few to tell
