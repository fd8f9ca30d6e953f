"""The code of an exported model as files of one folder, made out of this package's modules (``--with-code``).

transformers copies the entry file of a model's code and the files that it imports by ``from .NAME import``. So module
``kernels.conv`` becomes ``kernels_conv.py``, imports become relative, and the entry file names all others.
"""

import ast
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path

from hylo_megatron.mixers import MIXERS

PACKAGE = "hylo_megatron"
ENTRY = "hf.modeling_hylo"
PARTS = ("hf_module",)  # files of a mixer that the model imports by name
REPLACED = {"hf.code_beside": "hf.code_in_folder"}  # the one module that has to know where it lies
OPTIONAL = ("fla", "triton")  # packages without which ``kernels/choose.py`` uses torch
_ROOT = Path(__file__).parents[1]
_NAME_OF_MODULE = re.compile(rf"""f?["']{PACKAGE}\.""")


def assembled() -> dict[str, str]:
    """Return the text of every file, by name."""
    files = {f"{flat(module)}.py": rewritten(module) for module in modules()}
    entry = f"{flat(ENTRY)}.py"
    named = [f"    from .{name.removesuffix('.py')} import __name__ as _" for name in sorted(files) if name != entry]
    note = "if False:  # never runs: transformers copies the files that it finds named like this"
    files[entry] += "\n".join(["", "", note, *(f"{line}  # noqa: F401, F811" for line in named), ""])
    return files


def modules() -> list[str]:
    """Return the modules that the model needs, without the package's name: the entry and all that they import."""
    parts = [f"mixers.{name}{part}" for name in MIXERS for part in ("", *(f".{part}" for part in PARTS))]
    found, waiting = set(), [ENTRY, *(part for part in parts if _file(part))]
    while waiting:
        if (module := waiting.pop()) not in found:
            found.add(module)
            waiting += [target for node in _own_imports(_parsed(module)) for target, _ in _targets(node)]
    return sorted(found)


def flat(module: str) -> str:
    return module.replace(".", "_")


def rewritten(module: str) -> str:
    """Return the text of ``module`` for the folder: imports of this package are relative, comments stay."""
    tree, lines = _parsed(module), _source(module).read_text(encoding="utf-8").splitlines()
    edits = [(node, _relative(node)) for node in _own_imports(tree)]
    edits += [(node, _with_flat_names(node, lines)) for node in ast.walk(tree) if _names_module(node, lines)]
    edits += _optional(tree, lines)
    for node, text in sorted(edits, key=lambda edit: edit[0].lineno, reverse=True):
        lines[node.lineno - 1 : node.end_lineno] = text
    source = _source(module).relative_to(_ROOT.parent).as_posix()
    head = f"# hylo-megatron {_version()}, Apache-2.0: {source}, written by hylo export --with-code"
    return "\n".join([head, *lines, ""])


def _file(module: str) -> Path | None:
    path = _ROOT.joinpath(*module.split("."))
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)


def _source(module: str) -> Path:
    return _file(REPLACED.get(module, module))


def _parsed(module: str) -> ast.Module:
    return ast.parse(_source(module).read_text(encoding="utf-8"))


def _own_imports(tree: ast.Module) -> Iterator[ast.ImportFrom]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == PACKAGE:
            yield node


def _targets(node: ast.ImportFrom) -> list[tuple[str, list[ast.alias]]]:
    """Return the modules that the statement imports (without names), and those that it imports names from."""
    base = node.module.partition(".")[2]
    inner = [(f"{base}.{alias.name}".lstrip("."), alias) for alias in node.names]
    whole = [(module, []) for module, _ in inner if _file(module)]
    names = [alias for module, alias in inner if not _file(module)]
    return [*whole, *([(base, names)] if names else [])]


def _relative(node: ast.ImportFrom) -> list[str]:
    """Return the lines of the import in the folder."""
    indent, known, lines = " " * node.col_offset, {alias.name: alias for alias in node.names}, []
    for module, names in _targets(node):
        if names:
            lines.append(f"{indent}from .{flat(module)} import {', '.join(map(ast.unparse, names))}")
        else:
            alias = known[module.rpartition(".")[2]]
            name = alias.asname or alias.name
            lines.append(f"{indent}from . import {flat(module)}" + (f" as {name}" if name != flat(module) else ""))
    return lines


def _names_module(node: ast.AST, lines: list[str]) -> bool:
    """Whether ``node`` is a string with the name of a module of this package, such as ``importlib`` takes."""
    text = isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
    return text and bool(_NAME_OF_MODULE.match(lines[node.lineno - 1][node.col_offset :]))


def _with_flat_names(node: ast.expr, lines: list[str]) -> list[str]:
    """Return the line of a module's name with its name in the folder; the parts in braces stay."""
    line = lines[node.lineno - 1]
    text = line[node.col_offset : node.end_col_offset]
    quote, name = text[-1], text.lstrip("f")[1:-1].removeprefix(f"{PACKAGE}.")
    pieces = [piece if piece.startswith("{") else flat(piece) for piece in re.split(r"(\{.*?\})", name)]
    new = f"f{quote}{{__package__}}.{''.join(pieces)}{quote}"
    return [line[: node.col_offset] + new + line[node.end_col_offset :]]


def _optional(tree: ast.Module, lines: list[str]) -> list[tuple[ast.AST, list[str]]]:
    """Return the edits that put imports of optional packages into a ``try``.

    transformers refuses code whose imports are missing, except in a ``try``.
    """
    edits = []
    for optional, group in groupby(tree.body, _is_optional):
        if optional:
            nodes = list(group)
            whole = ast.Pass(lineno=nodes[0].lineno, end_lineno=nodes[-1].end_lineno)
            imports = [f"    {line}" for line in lines[whole.lineno - 1 : whole.end_lineno]]
            edits.append((whole, ["try:", *imports, "except ImportError:", "    raise"]))
    return edits


def _is_optional(node: ast.stmt) -> bool:
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
    return any(name.partition(".")[0] in OPTIONAL for name in names)


def _version() -> str:
    try:
        return version("hylo-megatron")
    except PackageNotFoundError:  # run out of a checkout
        return "(unknown version)"
