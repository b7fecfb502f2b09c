"""Writing the files that a user asked for."""

from pathlib import Path

from wellposed.book.errors import UserError
from wellposed.book.record import write_text


def write_new(path: Path, text: str, *, force: bool) -> Path:
    """Write a file that the user asked for; one that exists stays unless forced.

    Returns:
        The file written.

    Raises:
        UserError: the file exists, is a folder, or cannot be written.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the name of a file")
    if path.exists() and not force:
        raise UserError(f"{path} exists already: --force writes over it")
    write_text(path, text)
    return path
