"""One exception for everything a user can fix, and the one place that prints it."""

import functools
import sys


class HyLoError(Exception):
    """Bad input or a missing piece: the message says what, where, what was expected and what to do."""


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
            where = f" ({error.filename})" if error.filename else ""
            print(f"error: {error.strerror}{where}: free space or fix the path, then run again", file=sys.stderr)
            sys.exit(2)

    return run
