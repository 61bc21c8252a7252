"""Rows of ids and labels: what ``load_dataset`` returns, in flat arrays, with a report on the source's rows."""

from __future__ import annotations

import mmap
import os
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypedDict, cast

from tt_data.examples import Kind
from tt_data.files import open_regular
from tt_data.report import Report, Tally
from tt_data.template.spans import Encoded
from tt_data.text.tokenizer import Tokenizer
from tt_data.token_rows.mismatched import mismatched

if TYPE_CHECKING:
    from torch import Tensor

IGNORE_INDEX = -100
Numbers: TypeAlias = "array[int] | memoryview[int]"
Piece = tuple[str, bool]  # text, and whether it is trained
LogProbs = Literal["reference_log_probs", "kl_reference_log_probs"]
_SIDES: Mapping[Kind, tuple[str, ...]] = {"single": ("",), "judged": ("", "kl_"), "pair": ("chosen_", "rejected_")}


class Row(TypedDict, total=False):
    """Token ids and labels (-100: no loss) of one row. Which keys there are follows from the data set: a packed row has
    ``position_ids``, a preference row has ``chosen_`` and ``rejected_`` of each. A judged row has ``desirable``, and
    ``kl_`` of each: its prompt with the answer of another row. A pack of judged rows has a list of judgements."""

    input_ids: list[int]
    labels: list[int]
    position_ids: list[int]
    chosen_input_ids: list[int]
    chosen_labels: list[int]
    chosen_position_ids: list[int]
    rejected_input_ids: list[int]
    rejected_labels: list[int]
    rejected_position_ids: list[int]
    kl_input_ids: list[int]
    kl_labels: list[int]
    kl_position_ids: list[int]
    desirable: bool | list[bool]
    reference_log_probs: list[float]
    kl_reference_log_probs: list[float]


class Dataset(Protocol):
    """Rows with an index: what ``load_dataset`` returns unless it streams. In a mix, row ``i`` depends on the epoch."""

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def schema(self) -> str: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def report(self) -> Report: ...
    @property
    def num_rows(self) -> int: ...  # of the source; ``len`` counts packs, if rows are packed
    def __len__(self) -> int: ...
    def __getitem__(self, i: int, /) -> Row: ...
    def at(self, i: int, epoch: int) -> Row: ...
    def where(self, i: int, epoch: int = 0) -> str: ...
    def length(self, i: int) -> int: ...
    def is_truncated(self, i: int) -> bool: ...
    def rendered(self, i: int) -> list[Piece]: ...
    def documents(self, i: int) -> list[list[Piece]]: ...
    def document_names(self, i: int) -> list[str]: ...


@dataclass(eq=False)
class TokenStore:
    """Append-only rows; 4 bytes a token, 8 a trained span, whatever the number of rows."""

    ids: Numbers = field(default_factory=lambda: array("i"))
    id_ends: Numbers = field(default_factory=lambda: array("q", [0]))
    spans: Numbers = field(default_factory=lambda: array("i"))
    span_ends: Numbers = field(default_factory=lambda: array("q", [0]))

    def __len__(self) -> int:
        return len(self.id_ends) - 1

    def append(self, row: Encoded) -> None:
        assert isinstance(self.ids, array)
        assert isinstance(self.id_ends, array)
        assert isinstance(self.spans, array)
        assert isinstance(self.span_ends, array)
        self.ids.extend(row.ids)
        self.id_ends.append(len(self.ids))
        for start, end in row.trained:
            self.spans.append(start)
            self.spans.append(end)
        self.span_ends.append(len(self.spans))

    def length(self, i: int) -> int:
        return int(self.id_ends[i + 1] - self.id_ends[i])

    def get(self, i: int) -> Encoded:
        ids = self.ids[self.id_ends[i] : self.id_ends[i + 1]].tolist()
        flat = self.spans[self.span_ends[i] : self.span_ends[i + 1]].tolist()
        return Encoded(ids, list(zip(flat[::2], flat[1::2], strict=True)))

    def save(self, directory: Path, name: str) -> None:
        """Four files, ``<name>.ids`` and so on."""
        for part in _PARTS:
            write_numbers(directory / f"{name}.{part}", getattr(self, part))

    @classmethod
    def load(cls, directory: Path, name: str) -> TokenStore:
        """The rows that ``save`` wrote, mapped."""
        store = cls()
        for part, kind in _PARTS.items():
            setattr(store, part, read_numbers(directory / f"{name}.{part}", kind))
        for ends, flat in ((store.id_ends, store.ids), (store.span_ends, store.spans)):
            if ends[0] != 0 or ends[-1] != len(flat) or any(a > b for a, b in pairwise(ends)):
                raise ValueError(f"{directory / name}: the rows do not follow one another")
        if len(store.id_ends) != len(store.span_ends):
            raise ValueError(f"{directory / name}: not as many rows as masks")
        return store

    def __getstate__(self) -> dict[str, array[int]]:
        return {part: array(kind, getattr(self, part)) for part, kind in _PARTS.items()}

    def __setstate__(self, state: dict[str, array[int]]) -> None:
        self.__dict__.update(state)


_PARTS = {"ids": "i", "id_ends": "q", "spans": "i", "span_ends": "q"}


def write_numbers(path: Path, numbers: Numbers) -> None:
    """The raw numbers, in this machine's byte order."""
    with path.open("wb") as stream:
        stream.write(memoryview(numbers).cast("B"))


def read_numbers(path: Path, kind: str) -> Numbers:
    """The numbers of a file, mapped: only pages that are read take memory."""
    with open_regular(path) as stream:
        if os.fstat(stream.fileno()).st_size == 0:
            return array(kind)
        mapped = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
        return mapped.cast("i") if kind == "i" else mapped.cast("q") if kind == "q" else mapped.cast("b")


def to_row(kind: Kind, sides: Sequence[Encoded], desirable: bool) -> Row:
    """Ids and labels of one row under the names of its kind. The second side of a judged row is the mismatched one."""
    row: dict[str, Any] = {}
    for name, side in zip(_SIDES[kind], sides, strict=False):
        labels = [IGNORE_INDEX] * len(side.ids)
        for start, end in side.trained:
            labels[start:end] = side.ids[start:end]
        row[f"{name}input_ids"], row[f"{name}labels"] = side.ids, labels
    if kind == "judged":
        row["desirable"] = desirable
    return cast(Row, row)


class TokenDataset:
    """``ds[i] -> {"input_ids", "labels"}``; ``Row`` says what preference and judged rows have.

    ``report`` counts the rows that were found, dropped and cut. ``fingerprint`` changes with the data, the tokenizer,
    the template and the settings. ``where(i)`` is the file and line of a row.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, schema: str, stores: Sequence[TokenStore], names: Sequence[str],
        places: Numbers, truncated: Numbers, desirable: Numbers | None, tally: Tally, fingerprint: str,
    ) -> None:  # fmt: skip
        self.tokenizer, self.schema, self.stores, self.fingerprint = tokenizer, schema, tuple(stores), fingerprint
        self.names, self.places, self.truncated, self.desirable = list(names), places, truncated, desirable
        self.kind: Kind = "pair" if len(self.stores) == 2 else "single" if desirable is None else "judged"
        self.pad_id = tokenizer.pad_id
        self.tally = tally
        self.files_left_out: list[str] = []
        self.log_probs: dict[LogProbs, Tensor] = {}  # of the answers of each row, which rows, packs and batches carry
        self.seed, self.max_seq_len = 0, cast("int | None", None)  # of mismatched answers

    def __len__(self) -> int:
        return len(self.truncated)

    @property
    def num_rows(self) -> int:
        """The number of rows, as ``len``."""
        return len(self)

    def __getitem__(self, i: int) -> Row:
        i = check_index(i, len(self))
        sides = [store.get(i) for store in self.stores]
        sides += self._mismatched(i, sides[0]) if self.kind == "judged" else []
        row = to_row(self.kind, sides, self.desirable is not None and bool(self.desirable[i]))
        for name, values in self.log_probs.items():
            row[name] = values[i].tolist()
        return row

    def _mismatched(self, i: int, judged: Encoded) -> list[Encoded]:
        """The prompt of row ``i`` with the answer of another row, which ``i`` and ``seed`` draw; none if there is no
        other row."""
        size, get = len(self) - 1, self.stores[0].get
        if not size:
            return []
        return [mismatched(judged, lambda k: get(k + (k >= i)), size, key=(self.seed, i), max_seq_len=self.max_seq_len)]

    def at(self, i: int, epoch: int) -> Row:
        """Row ``i``, which is the same in every epoch."""
        return self[i]

    def length(self, i: int) -> int:
        """Tokens of row ``i``; of the longer side if there are two."""
        i = check_index(i, len(self))
        return max(store.length(i) for store in self.stores)

    def room(self, i: int) -> int:
        """Tokens that row ``i`` takes in a pack: both sides of a pair; a mismatched answer has a row of its own."""
        if self.kind == "judged":
            own = self.stores[0].get(i)
            return max(len(side.ids) for side in [own, *self._mismatched(i, own)])
        return sum(store.length(i) for store in self.stores)

    def where(self, i: int, epoch: int = 0) -> str:
        """``rows.jsonl:17``: where row ``i`` was read."""
        i = check_index(i, len(self))
        return f"{self.names[self.places[2 * i]]}:{self.places[2 * i + 1]}"

    def is_truncated(self, i: int) -> bool:
        """Whether row ``i`` was cut at ``max_seq_len``."""
        return bool(self.truncated[check_index(i, len(self))])

    @property
    def report(self) -> Report:
        """What became of the rows of the source; ``summary_lines`` makes text of it."""
        return self.tally.report(self.schema, len(self), files_left_out=self.files_left_out)

    def rendered(self, i: int) -> list[Piece]:
        """Row ``i`` as text pieces and whether each is trained. Control tokens are shown."""
        return [piece for document in self.documents(i) for piece in document]

    def documents(self, i: int) -> list[list[Piece]]:
        """The pieces of each document of row ``i``: one, or the chosen and the rejected answer."""
        i = check_index(i, len(self))
        return [self._pieces(store.get(i)) for store in self.stores]

    def document_names(self, i: int) -> list[str]:
        """A name for each document of row ``i``: where it was read, and the side of a preference row."""
        sides = _SIDES[self.kind][: len(self.stores)]
        return [f"{self.where(i)} {side.rstrip('_')}".rstrip() for side in sides]

    def _pieces(self, row: Encoded) -> list[Piece]:
        """The texts between the ends of spans.

        Decoders treat the beginning of a text differently, so each piece is decoded together with the one before.
        """
        ends = [(end, trained) for span in row.trained for end, trained in zip(span, (False, True), strict=True)]
        pieces: list[Piece] = []
        last = begin = 0
        for end, trained in [*ends, (len(row.ids), False)]:
            if end == begin:
                continue
            before = self.tokenizer.decode(row.ids[last:begin], skip_special=False)
            text = self.tokenizer.decode(row.ids[last:end], skip_special=False)
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
