"""The exception for everything that a user can fix; ``flags.command_line`` prints it."""


class HyLoError(Exception):
    """Bad input or a missing piece: the message says what, where, what was expected and what to do."""
