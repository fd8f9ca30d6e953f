"""Command lines: numbers with limits, and errors in one line. The functions below are ``type``s for argparse."""

import argparse
import functools
import math
import os
import select
import sys
from collections.abc import Callable, Collection
from pathlib import Path

from hylo_megatron.checkpoint import disk
from hylo_megatron.errors import HyLoError

LARGEST = 2**53  # every whole number up to this one is exact as a float


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows each flag's default, unless the flag has none or the help text already gives it."""

    def _get_help_string(self, action):
        none = action.default is None or action.default is False or action.default in ((), [])  # zero is a default
        if none or "default" in (action.help or ""):
            return action.help
        if action.help is None:
            return "(default: %(default)s)"
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose error is a ``HyLoError``, without the usage of every flag."""

    def __init__(self, *args, formatter_class=_Help, **kwargs):
        super().__init__(*args, formatter_class=formatter_class, **kwargs)

    def error(self, message: str):
        raise HyLoError(message)


def given(parser: argparse.ArgumentParser, argv: list[str]) -> frozenset[str]:
    """Return the names, in parsed arguments, of the flags that ``argv`` itself has; a default is not given."""
    kept = {action: action.default for action in parser._actions}
    for action in kept:
        action.default = argparse.SUPPRESS
    try:
        return frozenset(vars(parser.parse_known_args(argv)[0]))
    finally:
        for action, default in kept.items():
            action.default = default


def flag_among(parser: argparse.ArgumentParser, names: Collection[str]) -> str | None:
    """Return the first flag of ``parser`` whose name in parsed arguments is in ``names``, or None."""
    found = (each for each in parser._actions if each.dest in names and each.option_strings)
    return next((each.option_strings[0] for each in found), None)


def names_of(group: argparse._ArgumentGroup) -> frozenset[str]:
    """Return the names, in parsed arguments, of the flags of ``group``."""
    return frozenset(each.dest for each in group._group_actions)


def short(text: str, limit: int = 40) -> str:
    return repr(text if len(text) <= limit else text[:limit] + "...")


def _whole(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)  # Python itself refuses more than 4,300 digits
        except ValueError:
            value = minimum - 1
        if not minimum <= value <= LARGEST:
            raise argparse.ArgumentTypeError(f"{short(text)}: expected a whole number of {minimum} or more")
        return value

    return parse


def _real(minimum: float, maximum: float, limits: str, open_below: bool = False) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and minimum <= value <= maximum) or (open_below and value == minimum):
            raise argparse.ArgumentTypeError(f"{short(text)}: expected a number {limits}")
        return value

    return parse


count = _whole(0)
size = _whole(1)
positive = _real(0, math.inf, "above 0", open_below=True)
weight = _real(0, math.inf, "of 0 or more")
share = _real(0, 1, "from 0 to 1")


def json_object(text: str) -> dict:
    """Return a JSON object given on the command line."""
    from hylo_megatron.json_file import Object, check, parse

    try:
        return check(parse(text, short(text)), Object, short(text))
    except HyLoError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def readable_number(text: str) -> int:
    """Return ``10000000``, ``1e7`` or ``10M`` as a number of at least 1. Raises ``ValueError``."""
    factors = {"K": 1e3, "M": 1e6, "B": 1e9}
    value = float(text[:-1]) * factors[text[-1]] if text[-1:] in factors else float(text)
    if not (math.isfinite(value) and 1 <= value <= LARGEST and value == int(value)):
        raise ValueError(text)
    return int(value)


def tokens(text: str) -> int:
    """Return a number of tokens given on the command line."""
    try:
        return readable_number(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{short(text)}: expected a number of tokens, such as 10M or 1e10") from None


def _of_a_file(error: OSError) -> str:
    if isinstance(error, NotADirectoryError | FileExistsError) and isinstance(error.filename, str | os.PathLike):
        path = Path(error.filename)
        if file := next((each for each in (path, *path.parents) if each.is_file()), None):
            return f"{file}: a file, expected a folder or the name of a new one; choose another path"
    if error.filename and (full := disk.explained(error, error.filename)):
        return str(full)
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror}{where}: free space or fix the path, then run again"


def _line_of(error: Exception) -> str | None:
    """Return the line that tells the user about an error; None for an error that needs its traceback."""
    if isinstance(error, HyLoError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        from hylo_megatron.packages import not_installed

        line = not_installed(error, sys.argv[0])
        return line and str(line)
    return _of_a_file(error) if error.errno is not None else None


def _output_is_closed() -> bool:
    """Return whether the program that reads this process's output has ended, as ``head`` does."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return bool(poll.poll(0))
    except (OSError, ValueError, AttributeError):  # no output, or one without a file
        return False


def command_line(main):
    """Wrap a program's ``main``: an error that a user can fix is one line on stderr and exit code 2, no traceback.

    A program whose output nobody reads any more, as in ``hylo doctor | head``, ends without a message.
    """

    @functools.wraps(main)
    def run(*args, **kwargs):
        try:
            result = main(*args, **kwargs)
            sys.stdout.flush()
            return result
        except (HyLoError, OSError, ModuleNotFoundError) as error:
            if isinstance(error, BrokenPipeError) and _output_is_closed():
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
                sys.exit(1)
            if (line := _line_of(error)) is None:
                raise
            print(f"error: {line}", file=sys.stderr)
            sys.exit(2)

    return run
