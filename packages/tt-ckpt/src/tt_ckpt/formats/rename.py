"""One two-way rename by a table of patterns, in which ``{}`` stands for a number."""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path

from tt_ckpt.shown import plain

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class Rename:
    """``Rename({"model.layers.{}.mlp.up_proj.weight": "layers.{}.mlp.w3.weight"})``: ours to theirs and back."""

    def __init__(self, table: Mapping[str, str], *, what: str) -> None:
        self.what = what
        self._there = dict(table)
        self._back = {theirs: ours for ours, theirs in table.items()}
        assert len(self._back) == len(self._there), "a table must be one to one"

    def there(self, name: str, file: Path | None = None) -> str:
        """The other format's name; an unknown one is a ValueError with the closest known."""
        return self._apply(self._there, name, file)

    def back(self, name: str, file: Path | None = None) -> str:
        """The Hugging Face name; ``file`` is where ``name`` was found."""
        return self._apply(self._back, name, file)

    def _apply(self, table: Mapping[str, str], name: str, file: Path | None) -> str:
        pattern = _NUMBER.sub("{}", name)
        if pattern not in table:
            close = difflib.get_close_matches(pattern[:200], table, 1, 0.6)
            hint = f"; did you mean {close[0].replace('{}', 'N')}?" if close else ""
            where = "" if file is None else f"{file}: "
            raise ValueError(
                f"{where}unknown tensor {plain(name)} in {self.what}{hint or '; give the files of one model'}"
            )
        return table[pattern].format(*_NUMBER.findall(name))
