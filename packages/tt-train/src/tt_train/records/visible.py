"""Text of files, names and models, so that it cannot steer a terminal."""

import re

# Everything that moves the cursor, starts an escape sequence, reverses the text or cannot be seen, and halves of
# characters. Newlines and tabs stay; so do the joiners that scripts and emoji are written with.
_STEERS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e00ff\U000e01f0-\U000e0fff\ud800-\udfff]"
)


def visible(text: str) -> str:
    r"""``text`` with its control characters spelt out, as in ``\x1b``. Twice, or piece by piece, gives the same."""
    return text if text.isprintable() else _STEERS.sub(_spelt, text)


def _spelt(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()
