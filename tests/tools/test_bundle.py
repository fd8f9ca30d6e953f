"""The bundle for machines without network: packed here, joined there, with everything that goes wrong on the way."""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
from helpers.paths import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the scripts are for Linux")


def shell(script, *arguments, **variables):
    """Runs ``script`` with this Python; returns the finished process, its output as text."""
    environment = {**os.environ, "HYLO_PYTHON": sys.executable, **variables}
    environment.pop("PYTHONPATH", None)
    command = ["bash", str(script), *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True)


def make(out, *arguments, script=ROOT / "tools/make_bundle.sh", **variables):
    done = shell(script, "--out", out, *arguments, **variables)
    assert done.returncode == 0, done.stderr
    return sorted(out.glob("part-*"))


def join(bundle, target, *arguments, **variables):
    return shell(bundle / "join_bundle.sh", "--to", target, *arguments, **variables)


def refused(done, *words):
    """The process failed with one line that has all ``words`` in it."""
    assert done.returncode != 0 and len(done.stderr.splitlines()) == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def wheel(folder, name, tag="py3-none-any", source="", scripts=""):
    """Writes an installable wheel ``name`` 1.0 of one module with a VERSION and ``source``."""
    info = f"{name}-1.0.dist-info"
    members = {
        f"{name}.py": f"VERSION = 1\n{source}",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    if scripts:
        members[f"{info}/entry_points.txt"] = f"[console_scripts]\n{scripts}\n"
    members[f"{info}/RECORD"] = "".join(f"{member},,\n" for member in [*members, f"{info}/RECORD"])
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-1.0-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(zipfile.ZipInfo(member), content)
    return path


@pytest.fixture
def inputs(tmp_path):
    """A folder with spaces in its names, 60 KB that do not shrink, an empty folder and links, and a file."""
    folder = tmp_path / "in/my model"
    (folder / "nothing in here").mkdir(parents=True)
    noise = b"".join(hashlib.sha256(bytes([i % 251, i // 251])).digest() for i in range(1900))
    (folder / "a file.bin").write_bytes(noise)
    (folder / "runs.sh").write_text("#!/bin/sh\n")
    (folder / "runs.sh").chmod(0o700)
    (tmp_path / "in/tokens.bin").write_bytes(b"tokens")
    (folder / "linked.bin").symlink_to("../tokens.bin")
    os.link(folder / "runs.sh", folder / "zz hard link")
    return folder, tmp_path / "in/tokens.bin"


@pytest.fixture
def bundle(tmp_path, inputs):
    make(tmp_path / "bundle", "--part-size", "20K", *inputs)
    return tmp_path / "bundle"


# ---- Packing


@pytest.mark.parametrize("compress", ["none", "gzip", "xz", "zstd"])
def test_what_goes_in_comes_out(tmp_path, inputs, compress):
    if compress != "none" and not shutil.which(compress):
        pytest.skip(f"no {compress}")
    folder, tokens = inputs
    out, target = tmp_path / "a bundle", tmp_path / "deep er/target"
    parts = make(out, "--part-size", "20K", "--compress", compress, folder, f"{tokens}=train.bin")
    assert len(parts) >= 3 and all(part.stat().st_size <= 20 * 1024 for part in parts)
    done = join(out, target)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert sorted(path.name for path in target.iterdir()) == [".bundle", "my model", "train.bin"]
    assert (target / "train.bin").read_bytes() == b"tokens"
    there = target / "my model"
    for path in folder.iterdir():
        copy = there / path.name
        assert not copy.is_symlink() and copy.is_dir() == path.is_dir()
        assert path.is_dir() or copy.read_bytes() == path.read_bytes()
    assert os.access(there / "runs.sh", os.X_OK) and not os.access(there / "a file.bin", os.X_OK)
    assert not list(tmp_path.glob("**/*.partial"))


def test_manifest_names_every_part_and_the_stream(bundle):
    lines = [line.split() for line in (bundle / "MANIFEST").read_text().splitlines()]
    parts = sorted(bundle.glob("part-*"))
    stream = b"".join(part.read_bytes() for part in parts)
    contents = [(part.name, part.read_bytes()) for part in parts] + [("bundle.tar.gz", stream)]
    assert lines == [[hashlib.sha256(data).hexdigest(), str(len(data)), name] for name, data in contents]
    with tarfile.open(fileobj=io.BytesIO(stream)) as archive:
        assert all(member.isfile() or member.isdir() for member in archive)


def test_same_inputs_same_bytes(tmp_path, inputs, bundle):
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    for path in reversed(inputs):
        subprocess.run(["cp", "-rL", path, copy], check=True)
    for path in copy.rglob("*"):  # times, modes, the order on disk and links differ
        os.utime(path, (1e9, 1e9))
    (copy / "my model/runs.sh").chmod(0o755)
    make(tmp_path / "again", "--part-size", "20K", copy / "tokens.bin", copy / "my model")
    names = sorted(path.name for path in bundle.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    assert all((bundle / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)


def test_bad_input_is_named_and_leaves_nothing(tmp_path, inputs, bundle):
    folder, tokens = inputs
    out = tmp_path / "out"

    def refuse(*arguments, words):
        refused(shell(ROOT / "tools/make_bundle.sh", "--out", out, *arguments), *words)
        assert not out.exists()

    refuse(tmp_path / "absent", words=["absent", "no such file"])
    refuse(f"{tokens}=../tokens", words=["without '/' or '..'"])
    refuse(f"{tokens}=/tokens", words=["without '/' or '..'"])
    refuse(f"{tokens}=repo", words=["'repo'", "PATH=NAME"])
    refuse(tokens, f"{folder}=tokens.bin", words=["packed already"])
    refuse(tmp_path, words=["contains --out"])
    refuse("--part-size", "56MB", tokens, words=["--part-size 56MB"])
    refuse("--compress", "rar", tokens, words=["gzip, none, xz or zstd"])
    refuse("--part-size", "40", folder, words=["suffixes exhausted", "raise --part-size"])
    (folder / "broken").symlink_to("nowhere")
    refuse(folder, words=["my model/broken", "link to nowhere"])
    refused(shell(ROOT / "tools/make_bundle.sh", "--out", bundle, tokens), "exists", "another --out")
    assert shell(ROOT / "tools/make_bundle.sh", "--out", out).returncode == 2


# ---- Joining


def test_parts_come_in_any_order_and_missing_ones_are_named(tmp_path, bundle):
    there, target = tmp_path / "there", tmp_path / "target"
    there.mkdir()
    refused(shell(bundle / "join_bundle.sh", "--from", there, "--to", target), "missing: MANIFEST")
    shutil.copy(bundle / "MANIFEST", there)
    first, *middle, last = sorted(bundle.glob("part-*"))
    shutil.copy(last, there)
    done = shell(bundle / "join_bundle.sh", "--from", there, "--to", target)
    wanted = [f"missing: {part.name} (bring it and run this again)" for part in [first, *middle]]
    assert done.returncode == 1 and done.stderr.splitlines() == wanted and not target.exists()
    for part in [*middle, first]:
        shutil.copy(part, there)
    assert shell(bundle / "join_bundle.sh", "--from", there, "--to", target).returncode == 0
    assert (target / "tokens.bin").exists()


@pytest.mark.parametrize("damage", ["a bit", "cut short"])
def test_a_damaged_part_is_named(tmp_path, bundle, damage):
    part = bundle / "part-001"
    data = bytearray(part.read_bytes())
    if damage == "a bit":
        data[1000] ^= 1
    else:
        data = data[:-1]
    part.write_bytes(data)
    refused(join(bundle, tmp_path / "target"), "damaged: part-001", f"{len(data)} of 20480 bytes")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("lines", ["0 1 2 3", "1 2 3 4", "1 0 2 3 4", "0 1 2 4", "4", "0 1 2 3 4 4", ""])
def test_a_damaged_manifest_is_noticed(tmp_path, bundle, lines):
    manifest = bundle / "MANIFEST"
    whole = manifest.read_text().splitlines(keepends=True)
    assert len(whole) == 5
    manifest.write_text("".join(whole[int(line)] for line in lines.split()))
    refused(join(bundle, tmp_path / "target"), "MANIFEST", "bring it again")
    manifest.write_text("".join(whole[:-1]) + "0" * 64 + whole[-1][64:])
    refused(join(bundle, tmp_path / "target"), "another stream than MANIFEST says")
    assert not (tmp_path / "target").exists()


def test_a_second_join_goes_on_and_another_folder_is_left_alone(tmp_path, bundle):
    target = tmp_path / "target"
    target.mkdir()  # empty: a scheduler may have made it
    assert join(bundle, target).returncode == 0
    (target / "made by a run").touch()
    for part in bundle.glob("part-*"):
        part.unlink()
    done = join(bundle, target, "--", "sh", "-c", "pwd; exit 7")
    assert (done.returncode, done.stdout) == (7, f"{target}\n") and "done before" in done.stderr
    assert (target / "made by a run").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").touch()
    refused(join(bundle, tmp_path / "mine"), "exists and is not this bundle")
    assert (tmp_path / "mine/file").exists()
    (target / ".bundle").write_text("another\n")
    refused(join(bundle, target), "exists and is not this bundle")


def test_two_nodes_may_start_at_once(tmp_path, bundle):
    command = ["bash", str(bundle / "join_bundle.sh"), "--to", str(tmp_path / "target"), "--", "cat", "tokens.bin"]
    nodes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    answers = [node.communicate() for node in nodes]
    assert [answer[0] for answer in answers] == ["tokens"] * 3, answers
    assert sum("unpacked" in answer[1] for answer in answers) == 1


@pytest.mark.parametrize("attack", ["../evil", "/{}/evil", "link", "link to follow later"])
def test_nothing_is_written_outside_of_the_target(tmp_path, bundle, attack):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        member = tarfile.TarInfo(attack.format(tmp_path))
        if attack.startswith("link"):
            member.type, member.linkname = tarfile.SYMTYPE, str(tmp_path)
            archive.addfile(member)
            member = tarfile.TarInfo("link/evil")  # through the link, or beside it
        member.size = 4
        archive.addfile(member, io.BytesIO(b"evil"))
    evil = tmp_path / "evil bundle"
    evil.mkdir()
    shutil.copy(bundle / "join_bundle.sh", evil)
    (evil / "part-000").write_bytes(stream.getvalue())
    entry = f"{hashlib.sha256(stream.getvalue()).hexdigest()} {len(stream.getvalue())}"
    (evil / "MANIFEST").write_text(f"{entry} part-000\n{entry} bundle.tar\n")
    done = join(evil, tmp_path / "target")
    refused(done, "error: ")
    assert not (tmp_path / "target").exists() and not (tmp_path / "evil").exists()


# ---- Wheels and the repository


@pytest.fixture
def project(tmp_path):
    """A repository at a commit, with one change that is not committed; returns its make_bundle.sh."""
    root = tmp_path / "project"
    (root / "tools").mkdir(parents=True)
    for name in ("make_bundle.sh", "join_bundle.sh"):
        shutil.copy(ROOT / "tools" / name, root / "tools")
    (root / "ours.py").write_text("import tiny\nprint('committed', tiny.VERSION, __file__)\n")
    git = ["git", "-C", str(root), "-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], check=True)
    (root / "ours.py").write_text("changed")
    return root / "tools/make_bundle.sh"


def test_a_command_runs_with_the_repository_and_the_wheels(tmp_path, project):
    wheel(tmp_path / "index", "tiny", scripts="tiny-main = tiny:VERSION.bit_length")
    out, target = tmp_path / "bundle", tmp_path / "tar get"
    make(out, "--with-repo", tmp_path / "index/tiny-1.0-py3-none-any.whl", script=project)
    done = join(out, target, "--", sys.executable, "-c", "import ours, os; print(os.getcwd())")
    assert done.returncode == 0, done.stderr
    export, *printed = done.stdout.splitlines()
    assert printed == [f"committed 1 {target}/repo/ours.py", f"{target}/repo"]
    check = f'{export}\n{sys.executable} -c "import ours, tiny; print(tiny.__file__)"'
    shown = subprocess.run(["bash", "-c", check], cwd="/", capture_output=True, text=True)
    assert shown.stdout.splitlines()[-1] == f"{target}/site/tiny.py"
    assert export.startswith("export PYTHONPATH=") and not list(target.glob("*.partial"))

    again = join(out, target, "--venv", "--", "python", "-c", "import ours, pytest, tiny; print(tiny.__file__)")
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-1].startswith(f"{target}/venv/lib/")  # not the one in site
    assert (target / "venv/bin/tiny-main").exists()


def test_wheels_come_from_the_index_for_the_nodes_python(tmp_path):
    index = tmp_path / "index"
    old = wheel(index, "both", "cp312-cp312-manylinux_2_17_x86_64")
    wheel(index, "both", "cp312-cp312-manylinux_2_28_x86_64")
    new = wheel(index, "recent", "cp39-abi3-manylinux_2_34_x86_64")
    wheel(index, "elsewhere", "cp312-cp312-manylinux_2_28_aarch64")
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "PIP_CONFIG_FILE": os.devnull}
    parts = make(tmp_path / "bundle", "--compress", "none", "--wheels", "both==1.0  recent", **pip)
    with tarfile.open(fileobj=io.BytesIO(b"".join(part.read_bytes() for part in parts))) as archive:
        assert [name for name in archive.getnames() if name.endswith(".whl")] == [
            f"./wheels/{path.name}" for path in (old, new)
        ]
    failed = shell(ROOT / "tools/make_bundle.sh", "--out", tmp_path / "out", "--wheels", "elsewhere", **pip)
    refused(failed, "pip found no wheels", "elsewhere")
    assert not (tmp_path / "out").exists()


def test_an_install_that_failed_is_taken_up_again(tmp_path):
    misfit = wheel(tmp_path / "index", "tiny", "cp27-cp27m-manylinux1_x86_64")
    bundle, target = tmp_path / "bundle", tmp_path / "target"
    make(bundle, misfit)
    done = join(bundle, target, HYLO_PYTHON="/bin/false")
    assert done.returncode == 1 and "/bin/false has no pip" in done.stderr.splitlines()[-1]
    refused(join(bundle, target), "pip did not install", "not a supported wheel")
    assert not (target / "site").exists()
