"""An answer while it grows: its text, why it ended, and how long it took."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

from tt_cli.terminal import say
from tt_train.errors import counted

Finish = Literal["end", "stop", "length", "context"]
CUT: tuple[Finish, ...] = ("length", "context")
_WINDOW, _KEPT = 96, 32  # tokens decoded again for each new one, and those that stay of them


class Text:
    """Text as its tokens arrive: whole characters only, and nothing of a stop text.

    Only the last tokens are decoded again for each new one, however long the text is.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self.decode, self.stop = decode, stop
        self.stopped = False
        self.given = ""  # what was returned
        self._ids: list[int] = []  # of the window
        self._before, self._skip = "", 0  # the text in front of it, and how much of the window's is in there

    def add(self, token: int) -> str:
        """The characters that are certain now and were not before."""
        self._ids.append(token)
        whole = self._before + self.decode(self._ids)[self._skip :]
        certain = whole.rstrip("\ufffd")  # the first bytes of a character, perhaps
        if len(self._ids) > _WINDOW and certain == whole:
            tail = self.decode(self._ids[-_KEPT:])
            if tail and whole.endswith(tail):
                self._before, self._skip, self._ids = whole, len(tail), self._ids[-_KEPT:]
        return self._give(certain)

    def end(self) -> str:
        """What was held back, after the last token."""
        return "" if self.stopped else self._give(self._before + self.decode(self._ids)[self._skip :], last=True)

    def _give(self, text: str, *, last: bool = False) -> str:
        if not last and not text.startswith(self.given):  # a decoder that changes what it wrote: wait for the end
            return ""
        longest = max(map(len, self.stop), default=1)
        first = max(0, len(self.given) - longest + 1)
        ends = [place for stop in self.stop if (place := text.find(stop, first)) >= 0]
        if ends:
            self.stopped, text = True, text[: min(ends)]
        elif not last:
            held = (n for n in range(min(longest - 1, len(text)), 0, -1) if self._may_stop(text[-n:]))
            text = text[: len(text) - next(held, 0)]
        new = text[len(self.given) :]
        self.given += new
        return new

    def _may_stop(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self.stop)


@dataclass
class Reply:
    """An answer. ``finish`` says why it ended; None while it grows, or if it was interrupted."""

    prompt_tokens: int
    most: int  # tokens that it may have
    text: Text
    tokens: int = 0
    finish: Finish | None = None

    @property
    def cut(self) -> bool:
        """Whether the model would have said more."""
        return self.finish in CUT


@dataclass
class Stats:
    """Sums over all answers so far. Seconds are those of the clock."""

    prompt_tokens: int = 0
    tokens: int = 0
    prompt_seconds: float = 0.0
    seconds: float = 0.0  # those for the prompts included
    first_token_seconds: float | None = None  # of the first prompt
    peak_memory_gib: float = 0.0

    def facts(self) -> dict[str, float | None]:
        """For JSON: the sums, and the tokens per second of prompts, of answers, and of answers over all time."""
        rates = {
            "prompt_tokens_per_s": self._rate(self.prompt_tokens, self.prompt_seconds),
            "answer_tokens_per_s": self._rate(self.tokens, self.seconds - self.prompt_seconds),
            "tokens_per_s": self._rate(self.tokens, self.seconds),
        }
        return {
            **{one.name: _rounded(getattr(self, one.name)) for one in fields(self)},
            **{name: _rounded(rate) for name, rate in rates.items()},
        }

    def lines(self) -> tuple[str, str]:
        """The same for people, of prompts and of answers: one line would be torn on a terminal of 120 columns."""
        facts = self.facts()
        first = "" if self.first_token_seconds is None else f"; first token after {self.first_token_seconds:.2f} s"
        asked, given = counted(self.prompt_tokens, "token"), counted(self.tokens, "token")
        return (
            f"prompt: {asked}, {facts['prompt_tokens_per_s'] or 0:,.1f} per second{first}",
            f"answer: {given}, {facts['answer_tokens_per_s'] or 0:,.1f} per second; "
            f"peak memory: {self.peak_memory_gib:.2f} GiB",
        )

    def show(self) -> None:
        """Print the two lines on stderr."""
        for line in self.lines():
            say(line, err=True)

    @staticmethod
    def _rate(count: int, seconds: float) -> float | None:
        return count / seconds if seconds > 0 else None


def _rounded(value: float | None) -> float | None:
    return round(value, 3) if isinstance(value, float) else value
