"""One exception for everything a user can fix, and the one place that prints it."""

import functools
import sys


class HyLoError(Exception):
    """Bad input or a missing piece: the message says what, where, what was expected and what to do."""


def _of_a_file(error: OSError) -> str:
    from hylo_megatron.checkpoint import disk

    if error.filename and (full := disk.explained(error, error.filename)):
        return str(full)
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror}{where}: free space or fix the path, then run again"


def command_line(main):
    """Wraps a tool's ``main``: a ``HyLoError`` becomes one line on stderr and exit code 2, no traceback."""

    @functools.wraps(main)
    def run(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except HyLoError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except OSError as error:
            if error.errno is None:
                raise
            print(f"error: {_of_a_file(error)}", file=sys.stderr)
            sys.exit(2)

    return run
