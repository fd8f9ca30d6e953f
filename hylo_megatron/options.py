"""Flags that a dataclass declares: each field made by ``option`` is one flag of a command line. No torch in here."""

import argparse
from collections.abc import Callable
from dataclasses import Field, field, fields
from typing import Any


def option(flag: str, default: Any, parse: Callable[[str], Any] | None = None, help: str | None = None) -> Any:
    """Return a dataclass field that ``flag`` sets. A flag without ``parse`` takes no value and sets True."""
    return field(default=default, metadata={"flag": flag, "parse": parse, "help": help})


def _declared(kind: type) -> list[Field]:
    return [each for each in fields(kind) if "flag" in each.metadata]


def _destination(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def defaults(kind: type) -> dict[str, Any]:
    """Return the default of each flag of ``kind``, by the flag's name in parsed arguments."""
    return {_destination(each.metadata["flag"]): each.default for each in _declared(kind)}


def takes_value(kind: type) -> dict[str, bool]:
    """Return whether each flag of ``kind`` takes a value, by the flag's name in parsed arguments."""
    return {_destination(each.metadata["flag"]): each.metadata["parse"] is not None for each in _declared(kind)}


def add_options(parser: argparse._ActionsContainer, kind: type) -> None:
    """Add the flags of ``kind``, except those that another dataclass with the same field has added."""
    for each in _declared(kind):
        flag, parse = each.metadata["flag"], each.metadata["parse"]
        if flag not in parser._option_string_actions:
            action = {"type": parse, "default": each.default} if parse else {"action": "store_true"}
            parser.add_argument(flag, help=each.metadata["help"], **action)


def from_options(kind: type, values: argparse.Namespace) -> Any:
    """Return a ``kind`` whose fields have the values of its flags, or their defaults where ``values`` lack a flag."""
    named = {each.name: (_destination(each.metadata["flag"]), each.default) for each in _declared(kind)}
    return kind(**{name: getattr(values, flag, default) for name, (flag, default) in named.items()})
