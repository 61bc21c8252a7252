"""What ``load_dataset`` returns: rows of ids and labels, with a report of what became of the source's rows."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tt_data.examples import BadRowError
from tt_data.rendered import Encoded
from tt_data.store import TokenStore, labels_of
from tt_data.tokenizer import Tokenizer

MAX_PROBLEMS = 20


@dataclass
class Tally:
    """Counts what happens to rows, and keeps the first problems with their places."""

    dropped: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    seen: int = 0
    truncated: int = 0
    longest_prompt: int = 0

    def drop(self, where: str, bad: BadRowError) -> None:
        self.dropped[bad.reason] += 1
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(f"{where}: {bad}")

    def summary(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in self.dropped.most_common())


class TokenDataset:
    """``ds[i] -> {"input_ids", "labels"}`` (``chosen_`` and ``rejected_`` of both for preference rows).

    ``report`` says what was found, dropped and cut; ``fingerprint`` changes with the data, the tokenizer, the template
    and the settings; ``where(i)`` is the file and line of a row.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, schema: str, sides: Sequence[str], stores: Sequence[TokenStore],
        names: Sequence[str], places: array[int], tally: Tally, fingerprint: str, desirable: array[int] | None = None,
    ) -> None:  # fmt: skip
        self.tokenizer, self.schema, self.sides, self.stores = tokenizer, schema, tuple(sides), tuple(stores)
        self.fingerprint, self._names, self._places, self._tally = fingerprint, list(names), places, tally
        self._desirable = desirable
        self.pad_id = tokenizer.pad_id

    def __len__(self) -> int:
        return len(self.stores[0])

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        i %= len(self)
        row: dict[str, Any] = {}
        for side, store in zip(self.sides, self.stores, strict=True):
            ids = store.get_ids(i)
            row[f"{side}input_ids"], row[f"{side}labels"] = ids, labels_of(ids, store.get_spans(i))
        if self._desirable is not None:
            row["desirable"] = bool(self._desirable[i])
        return row

    def length(self, i: int) -> int:
        """Tokens of row ``i``; of the longer side, where there are two."""
        return max(store.length(i) for store in self.stores)

    def where(self, i: int) -> str:
        """``rows.jsonl:17``: where row ``i`` was read."""
        return f"{self._names[self._places[2 * i]]}:{self._places[2 * i + 1]}"

    @property
    def report(self) -> dict[str, Any]:
        tally = self._tally
        return {
            "schema": self.schema,
            "rows": len(self),
            "dropped": dict(tally.dropped),
            "truncated": tally.truncated,
            "problems": list(tally.problems),
        }

    def rendered(self, i: int) -> list[tuple[str, bool]]:
        """Row ``i`` as text pieces and whether each is trained. Control tokens are shown."""
        pieces: list[tuple[str, bool]] = []
        for store in self.stores:
            ids, position = store.get_ids(i), 0
            for start, end in [*store.get_spans(i), (len(ids), len(ids))]:
                for piece, flag in ((ids[position:start], False), (ids[start:end], True)):
                    if piece:
                        pieces.append((self.tokenizer.decode(piece, skip_special=False), flag))
                position = end
        return pieces


def cut(row: Encoded, max_seq_len: int | None) -> Encoded:
    """The first ``max_seq_len`` tokens; nothing is put at the end."""
    if max_seq_len is None or len(row.ids) <= max_seq_len:
        return row
    spans = [(a, min(b, max_seq_len)) for a, b in row.trained if a < max_seq_len]
    return Encoded(row.ids[:max_seq_len], spans)


def is_trainable(row: Encoded) -> bool:
    """Whether some token behind the first is trained (the first one is predicted from nothing)."""
    return any(end > max(start, 1) for start, end in row.trained)
