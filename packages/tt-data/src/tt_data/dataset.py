"""What ``load_dataset`` returns: rows of ids and labels, with a report of what became of the source's rows."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from tt_data.report import with_files
from tt_data.store import Numbers, TokenStore, labels_of
from tt_data.template.spans import Encoded
from tt_data.text.tokenizer import Tokenizer

Row = dict[str, Any]
Piece = tuple[str, bool]
_SIDES = {"single": ("",), "judged": ("",), "pair": ("chosen_", "rejected_")}


class Dataset(Protocol):
    """Rows that ``batches`` takes, and what a person wants to know of them."""

    tokenizer: Tokenizer
    pad_id: int
    schema: str
    fingerprint: str

    @property
    def kind(self) -> str: ...  # single | pair | judged
    def __len__(self) -> int: ...
    def __getitem__(self, i: int, /) -> Row: ...
    def length(self, i: int) -> int: ...
    def where(self, i: int) -> str: ...
    def rendered(self, i: int) -> list[Piece]: ...
    def documents(self, i: int) -> list[list[Piece]]: ...
    def document_names(self, i: int) -> list[str]: ...
    def is_truncated(self, i: int) -> bool: ...
    @property
    def report(self) -> dict[str, Any]: ...


def to_row(kind: str, parts: Sequence[Encoded], desirable: bool) -> Row:
    """Ids and labels of one row under the names of its kind."""
    row: Row = {}
    for side, part in zip(_SIDES[kind], parts, strict=True):
        row[f"{side}input_ids"], row[f"{side}labels"] = part.ids, labels_of(part.ids, part.trained)
    if kind == "judged":
        row["desirable"] = desirable
    return row


class TokenDataset:
    """``ds[i] -> {"input_ids", "labels"}`` (``chosen_`` and ``rejected_`` of both for preference rows).

    ``report`` says what was found, dropped and cut; ``fingerprint`` changes with the data, the tokenizer, the template
    and the settings; ``where(i)`` is the file and line of a row.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, schema: str, stores: Sequence[TokenStore], names: Sequence[str],
        places: Numbers, truncated: Numbers, desirable: Numbers | None, report: Mapping[str, Any], fingerprint: str,
    ) -> None:  # fmt: skip
        self.tokenizer, self.schema, self.stores, self.fingerprint = tokenizer, schema, tuple(stores), fingerprint
        self.names, self.places, self.truncated, self.desirable = list(names), places, truncated, desirable
        self.kind = "pair" if len(self.stores) == 2 else "single" if desirable is None else "judged"
        self.pad_id = tokenizer.pad_id
        self._report = dict(report)
        self.files_left_out: list[str] = []

    def __len__(self) -> int:
        return len(self.stores[0])

    def __getitem__(self, i: int) -> Row:
        i = check_index(i, len(self))
        parts = [Encoded(store.get_ids(i), store.get_spans(i)) for store in self.stores]
        return to_row(self.kind, parts, self.desirable is not None and bool(self.desirable[i]))

    def length(self, i: int) -> int:
        """Tokens of row ``i``; of the longer side, where there are two."""
        return max(store.length(i) for store in self.stores)

    def where(self, i: int) -> str:
        """``rows.jsonl:17``: where row ``i`` was read."""
        return f"{self.names[self.places[2 * i]]}:{self.places[2 * i + 1]}"

    def is_truncated(self, i: int) -> bool:
        """Whether row ``i`` was cut at ``max_seq_len``."""
        return bool(self.truncated[i])

    @property
    def report(self) -> dict[str, Any]:
        return with_files({"schema": self.schema, "rows": len(self), **self._report}, self.files_left_out)

    def rendered(self, i: int) -> list[Piece]:
        """Row ``i`` as text pieces and whether each is trained. Control tokens are shown."""
        return [piece for document in self.documents(i) for piece in document]

    def documents(self, i: int) -> list[list[Piece]]:
        """The pieces of each document of row ``i``: one, or the chosen and the rejected answer."""
        i = check_index(i, len(self))
        return [self._pieces(store, i) for store in self.stores]

    def document_names(self, i: int) -> list[str]:
        """What to call the documents of row ``i``: where it was read, and which side of a preference it is."""
        return [f"{self.where(i)} {side.rstrip('_')}".rstrip() for side in _SIDES[self.kind]]

    def _pieces(self, store: TokenStore, i: int) -> list[Piece]:
        """Texts between the ends of spans. Decoders treat a beginning otherwise: each is what it adds to the last."""
        ids, spans = store.get_ids(i), store.get_spans(i)
        ends = [(end, trained) for span in spans for end, trained in zip(span, (False, True), strict=True)]
        pieces: list[Piece] = []
        last = begin = 0
        for end, trained in [*ends, (len(ids), False)]:
            if end == begin:
                continue
            before = self.tokenizer.decode(ids[last:begin], skip_special=False)
            text = self.tokenizer.decode(ids[last:end], skip_special=False)
            if len(text) > len(before):
                pieces.append((text[len(before) :], trained))
            last, begin = begin, end
        return pieces

    def __getstate__(self) -> dict[str, Any]:
        mapped = {
            key: array(value.format, value) for key, value in self.__dict__.items() if isinstance(value, memoryview)
        }
        return {**self.__dict__, **mapped}


def check_index(i: int, size: int) -> int:
    """``i`` counted from the start. Raises IndexError outside of ``size``."""
    if not -size <= i < size:
        raise IndexError(f"row {i} of {size}")
    return i % size
