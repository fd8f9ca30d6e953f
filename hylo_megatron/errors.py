"""The exception for everything that a user can fix, which ``flags.command_line`` prints, and others' in one line."""


class HyLoError(Exception):
    """Bad input or a missing piece: the message says what, where, what was expected and what to do."""


def first_line(error: BaseException) -> str:
    """Return what another package's error says, short enough for a message of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
