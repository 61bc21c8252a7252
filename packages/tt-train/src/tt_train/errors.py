"""What can go wrong, as the user sees it: mistakes to correct (exit 2), failures (1), interruptions (130, 143)."""

import difflib
import shlex
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """Mistakes that the user can correct before training. ``problems`` has one line for each."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = [one_line(problem) for problem in problems]
        super().__init__("\n".join(self.problems))


class TrainingError(RuntimeError):
    """A run that cannot continue: a non-finite loss, a checkpoint that cannot be written, no memory left."""


class LostRank(TrainingError):  # noqa: N818  (the rank is lost, not the error)
    """Another rank died, hangs or cannot be reached: its error, if it has one, is the cause."""


class Interrupted(Exception):  # noqa: N818  (not an error: the run was asked to stop, and has saved)
    """A signal stopped the run; ``exit_code`` is 128 + the signal's number.

    ``checkpoint``: the checkpoint to resume from; None if the run had not finished a step.
    """

    def __init__(self, signal_number: int, checkpoint: str | None, step: int) -> None:
        self.exit_code = 128 + signal_number
        self.checkpoint = checkpoint
        name = signal.Signals(signal_number).name
        if checkpoint is None:
            super().__init__(f"stopped by {name} before the first step; nothing was trained, so there is no checkpoint")
        else:
            super().__init__(f"stopped by {name} after step {step}; saved {checkpoint}; continue with --resume auto")


class ShownElsewhere(Exception):  # noqa: N818  (the error itself is another rank's)
    """This rank ends because of an error that another rank shows."""

    def __init__(self, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__("another rank shows why")


# of these the user can correct the cause before a run begins: exit 2
WRONG = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
LONGEST_LINE = 1500  # characters of a message


def one_line(text: str) -> str:
    """``text`` in one line that cannot steer a terminal: control characters as escapes, a long middle left out."""
    text = " ".join(text.split("\n"))
    if len(text) > LONGEST_LINE:
        text = f"{text[: LONGEST_LINE // 2]} ... {text[-LONGEST_LINE // 2 :]}"
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def closest(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The known word that ``word`` is most like, if it is like one at all; capitals and dashes do not count.

    A word that is one slip of the keyboard away comes first, however short: ``sl`` is ``ls``.
    """
    if len(word) > 200:
        return None
    folded = {name.lower().replace("-", "_"): name for name in known}
    if (word := word.lower().replace("-", "_")) in folded:
        return folded[word]
    slips = {name: cost for name in folded if (cost := slip(word, name)) is not None}
    likeliest = [name for name, cost in slips.items() if cost == min(slips.values())]
    close = difflib.get_close_matches(word, likeliest or list(folded), n=1, cutoff=0.0 if slips else cutoff)
    return folded[close[0]] if close else None


def slip(typed: str, meant: str) -> int | None:
    """How unlikely it is to type one word for the other, from 0, if one slip of the keyboard tells them apart.

    A slip: two neighbours have changed places, or a letter was typed twice, or as the key beside it (0); one was left
    out (1); one is too much or another one (2). None if the words differ by more.
    """
    start = 0
    while start < min(len(typed), len(meant)) and typed[start] == meant[start]:
        start += 1
    before, typed, meant = typed[:start], typed[start:], meant[start:]
    if typed[1::-1] + typed[2:] == meant and len(typed) > 1:
        return 0
    if typed and typed[1:] == meant:
        return 0 if before.endswith(typed[0]) else 2
    if typed == meant[1:]:
        return 1
    if typed and meant and typed[1:] == meant[1:]:
        return 0 if any(typed[0] + meant[0] in row or meant[0] + typed[0] in row for row in _KEYBOARD) else 2
    return None


_KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm", "1234567890")


def log_name(rank: int) -> str:
    """The log of a rank in its run directory."""
    return f"logs/rank-{rank}.log" if rank else "train.log"


def counted(number: int, noun: str) -> str:
    """``1 step``, ``2 steps``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def did_you_mean(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """``; did you mean 'x'?`` for the closest known word, else the empty string."""
    close = closest(word, known, cutoff=cutoff)
    return "" if close is None else f"; did you mean {close!r}?"


def shell_word(text: str | Path) -> str:
    """A path or word of a suggested command: quoted if a shell needs it, and no option if it begins with a dash."""
    text = str(text)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def collect(problems: list[str], key: str, action: Callable[[], T]) -> T | None:
    """``action()``, or None if the user's input is wrong: ``problems`` gets a line for each mistake, under ``key``."""
    try:
        return action()
    except ConfigError as error:
        problems += error.problems
    except (ValueError, OSError, KeyError, ImportError) as error:
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        problems += [f"{key}: {line}" for line in text.splitlines() if line.strip()] or [
            f"{key}: {type(error).__name__}"
        ]
    return None
