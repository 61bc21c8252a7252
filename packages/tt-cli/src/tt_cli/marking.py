"""A row as text with its trained tokens marked. For console.py alone, which is long."""

from collections.abc import Sequence

import click

from tt_ckpt.redaction import redact_said
from tt_train.records.visible import visible
from tt_train.run.console import MARKS

Pieces = Sequence[tuple[str, bool]]  # text, and whether its tokens are trained


def mark(pieces: Pieces, *, color: bool) -> str:
    """The row as text. Adjacent pieces of one kind share their marks."""
    open_mark, close_mark = MARKS
    shown = []
    for piece, trained in _joined(pieces):
        text = redact_said(piece)
        if not trained:
            shown.append(visible(text))
        elif color:
            # Line by line, so that a pager which resets the colour at line ends shows all of it.
            shown.append("\n".join(click.style(line, fg="green") if line else "" for line in visible(text).split("\n")))
        else:
            shown.append(f"{open_mark}{visible(text)}{close_mark}")
    return "".join(shown)


def shorten(pieces: Pieces, *, limit: int) -> list[tuple[str, bool]]:
    """``pieces`` with at most ``limit`` characters in each run of one kind: its start and its end."""
    half = limit // 2

    def cut(text: str) -> str:
        left_out = f" [... {len(text) - 2 * half} characters ...] "
        return text if len(text) <= limit else text[:half] + left_out + text[-half:]

    return [(cut(text), trained) for text, trained in _joined(pieces)]


def _joined(pieces: Pieces) -> list[tuple[str, bool]]:
    joined: list[tuple[str, bool]] = []
    for text, trained in pieces:
        if joined and joined[-1][1] == trained:
            joined[-1] = (joined[-1][0] + text, trained)
        else:
            joined.append((text, trained))
    return joined
