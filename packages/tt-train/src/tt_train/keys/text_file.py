"""A text file that a user names, such as a config or a recipe: its text, or in one line why it cannot be one."""

from pathlib import Path

from tt_ckpt import files
from tt_train.errors import ConfigError

LIMIT = 256_000  # bytes; the largest config and the largest recipe are far below


def read_text(path: Path, what: str, *, root: Path | None = None) -> str:
    """The text of a regular file. A link is followed if a user named it, and must stay in ``root`` if there is one.

    Raises:
        ConfigError: no ``what`` (a config, a recipe file): a pipe or device, too large, not UTF-8, a placeholder.
    """
    try:
        anchor = Path(path).absolute().anchor
        text = files.read_text(path, root or anchor, limit=LIMIT, cure=f"check that it is a {what}, saved as UTF-8")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError([f"{path}: cannot be read ({reason}); check its name and its permissions"]) from None
    except ValueError as error:
        raise ConfigError([str(error)]) from None
    if "\0" in text:
        raise ConfigError([f"{path}: binary, not text; check that it is a {what}"])
    return text
