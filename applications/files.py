"""Files that a command leaves where its user asked for them."""

from pathlib import Path

from inference.errors import UserError


def write_text(file: Path, text: str) -> None:
    """With the directories above it. Raises UserError."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror}); name a file in a directory of yours.") from error
