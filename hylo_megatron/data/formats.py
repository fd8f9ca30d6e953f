"""The formats of files with text, and the flag ``--format`` of every command that reads such files."""

FORMATS = ("text", "jsonl", "chat")


def add_format(add, files: str) -> None:
    """Add ``--format`` with a parser's ``add_argument``. ``files``: what the command reads in this format."""
    what = (
        f"of {files}: text: a file is a document; jsonl: a row (of JSON lines, a JSON array, csv or parquet) is one;"
        ' chat: rows of {"messages": [...]} through the chat template (default: detected from the file)'
    )
    add("--format", dest="form", choices=FORMATS, help=what)
