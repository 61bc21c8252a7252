"""What spells control characters out, and the door that every line of ``tt`` passes."""

import io
import random
import re
import unicodedata
from typing import Any

from tt_cli.terminal import Door
from tt_train.records.visible import visible

SEEDS = [
    b"a plain line\n",
    b"\x1b]0;title\x07\x1b[31mred\x1b[0m\r\x08\x9b2J",
    "\u202e\u2066\u200b\u200d caf\u00e9 \u65e5\u672c \U0001f600 \U000e0041".encode(),
    b"\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\ [red]x[/] :smile:",
]


def as_text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape") if len(data) % 2 else data.decode("latin-1")


def passes(character: str) -> bool:
    return character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp")


def test_no_control_character_passes_and_printable_text_is_unchanged(fuzz: Any) -> None:
    def check(data: bytes) -> None:
        text = as_text(data)
        shown = visible(text)
        assert all(map(passes, shown))
        assert not any("\u202a" <= c <= "\u202e" or "\u2066" <= c <= "\u2069" for c in shown)
        assert visible(shown) == shown
        printable = "".join(filter(str.isprintable, text))
        assert visible(printable) == printable
        cuts = random.Random(len(data))
        pieces, rest = [], text
        while rest:
            size = cuts.randrange(1, 9)
            pieces.append(rest[:size])
            rest = rest[size:]
        assert "".join(map(visible, pieces)) == shown

    fuzz(check, fuzz.mutated(*SEEDS))


def test_any_text_passes_the_door_in_any_encoding(fuzz: Any) -> None:
    def check(data: bytes) -> None:
        for encoding in ("utf-8", "ascii", "latin-1"):
            raw = io.BytesIO()
            stream = io.TextIOWrapper(raw, encoding=encoding, errors="backslashreplace", newline="")
            door = Door(stream, answers=True)
            door.write(as_text(data))
            door.write_styled(as_text(data))
            door.flush()
            written = re.sub(r"\x1b\[(0|1|2|7|3[1236])m", "", raw.getvalue().decode(encoding))
            assert all(map(passes, written))

    fuzz(check, fuzz.mutated(*SEEDS))
