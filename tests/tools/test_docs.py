"""README.md and docs/*.md name only files, tests, commands and links that exist."""

import re
from functools import cache

import pytest
from helpers.paths import DOCS, ROOT

from hylo_megatron import cli

PAGES = [ROOT / "README.md", ROOT / "tests" / "README.md", *sorted(DOCS.rglob("*.md"))]
SOURCES = sorted(path for folder in ("hylo_megatron", "tools", "examples") for path in (ROOT / folder).rglob("*.py"))

# A path may leave out one of these folders.
STARTS = (
    "",
    "hylo_megatron",
    "tests",
    *(f"tests/{path.name}" for path in (ROOT / "tests").iterdir() if path.is_dir()),
)

# Files of megatron-core, torch and fla.
FOREIGN = {
    "core/safe_globals.py",
    "distributed/param_and_grad_buffer.py",
    "ops/common/chunk_o.py",
    "optimizer/distrib_optimizer.py",
    "optimizer/optimizer.py",
    "strategies/async_utils.py",
    "tensor_parallel/mappings.py",
    "training/arguments.py",
    "training/checkpointing.py",
    "training/training.py",
}


@cache
def sources() -> str:
    return "\n".join(path.read_text() for path in ROOT.glob("tests/**/*.py"))


def found(path: str) -> list:
    """Return the files that ``path``, which may have ``*`` or ``<name>`` in it, can mean."""
    pattern = re.sub(r"<\w+>|NAME", "*", path)
    return [file for start in STARTS for file in ROOT.glob(f"{start}/{pattern}".lstrip("/"))]


def missing(text: str) -> list[str]:
    """Return the paths in ``text`` that no file has, and the names behind ``::`` that their file does not define."""
    lost = []
    for path, name in re.findall(r"(?<![\w/.-])((?:[\w*<>-]+/)+[\w*<>-]+\.(?:py|sh|sbatch))(?:::(\w+))?", text):
        files = found(path)
        if path not in FOREIGN and not files:
            lost.append(path)
        if name and files and not any(re.search(rf"(def|class) {name}", file.read_text()) for file in files):
            lost.append(f"{path}::{name}")
    return lost


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page):
    text = page.read_text()
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
    assert missing(text) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_tests_of_a_page_exist(page):
    text = page.read_text()
    commands = re.findall(r"(?:^|`)hylo ([a-z][a-z0-9-]*)", text, re.MULTILINE)
    assert [command for command in commands if command not in cli.COMMANDS] == []
    tests = re.findall(r"\b(test_\w+)(…|\.py)?", text)
    lost = [name for name, end in tests if end != ".py" and f"def {name}{'' if end else '('}" not in sources()]
    lost += [name for name, end in tests if end == ".py" and not found(f"{name}.py")]
    assert lost == []


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: str(source.relative_to(ROOT)))
def test_our_files_that_a_source_names_exist(source):
    rooms = "|".join(path.name for path in (ROOT / "hylo_megatron").iterdir() if path.is_dir())
    named = re.findall(rf"(?<![\w/.-])((?:(?:hylo_megatron/)?(?:{rooms})|tools|tests)/[\w/]+\.py)", source.read_text())
    assert [path for path in named if path not in FOREIGN and not found(path)] == []
