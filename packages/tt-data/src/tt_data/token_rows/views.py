"""Data sets made of rows of other data sets: a choice of them, several packed in one, those of several in turn, or all
of several."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate

from tt_data.report import Report, add_reports
from tt_data.token_rows.dataset import Dataset, Piece, Row, TokenDataset, check_index
from tt_data.token_rows.order import Permutation, interleave, quotas_of
from tt_data.token_rows.packing import join_documents, pack
from tt_data.wording import counted


class View(ABC):
    """A data set whose rows are rows of other data sets. ``members_of`` is all that a view says about its rows."""

    def __init__(self, like: Dataset, *, schema: str, fingerprint: str) -> None:
        self.tokenizer, self.pad_id, self.kind = like.tokenizer, like.pad_id, like.kind
        self.schema, self.fingerprint = schema, fingerprint

    @abstractmethod
    def members_of(self, i: int, epoch: int = 0) -> list[tuple[Dataset, int]]:
        """The rows that make up row ``i`` of an epoch. Raises IndexError for a row that there is not."""

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def report(self) -> Report: ...

    @property
    def num_rows(self) -> int:
        """The number of rows, as ``len``."""
        return len(self)

    def __getitem__(self, i: int) -> Row:
        return self.at(i, 0)

    def at(self, i: int, epoch: int) -> Row:
        """Row ``i`` of an epoch."""
        ((part, row),) = self.members_of(i, epoch)
        return part[row]

    def where(self, i: int, epoch: int = 0) -> str:
        """Where row ``i`` of an epoch was read."""
        return ", ".join(part.where(row) for part, row in self.members_of(i, epoch))

    def length(self, i: int) -> int:
        """Tokens of row ``i``; of the longer side if there are two."""
        return sum(part.length(row) for part, row in self.members_of(i))

    def is_truncated(self, i: int) -> bool:
        """Whether something in row ``i`` was cut at ``max_seq_len``."""
        return any(part.is_truncated(row) for part, row in self.members_of(i))

    def rendered(self, i: int) -> list[Piece]:
        """Row ``i`` as text pieces and whether each is trained."""
        return [piece for document in self.documents(i) for piece in document]

    def documents(self, i: int) -> list[list[Piece]]:
        """The pieces of each document of row ``i``."""
        return [document for part, row in self.members_of(i) for document in part.documents(row)]

    def document_names(self, i: int) -> list[str]:
        """Where each document of row ``i`` was read."""
        return [name for part, row in self.members_of(i) for name in part.document_names(row)]


class Subset(View):
    """The rows of ``dataset`` at ``indices``. A subset of a mix holds the rows of its first epoch in every epoch."""

    def __init__(self, dataset: Dataset, indices: Sequence[int]) -> None:
        super().__init__(dataset, schema=dataset.schema, fingerprint=dataset.fingerprint)
        self.dataset, self.indices = dataset, list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def members_of(self, i: int, epoch: int = 0) -> list[tuple[Dataset, int]]:
        return [(self.dataset, self.indices[check_index(i, len(self))])]

    @property
    def num_rows(self) -> int:
        """The number of rows of the source, of which a pack holds several."""
        packs = self.dataset
        return sum(len(packs.members(i)) for i in self.indices) if isinstance(packs, PackedDataset) else len(self)

    @property
    def report(self) -> Report:
        """That of the whole data set."""
        return self.dataset.report


class PackedDataset(View):
    """``ds[i] -> {"input_ids", "labels", "position_ids"}`` over whole documents of ``rows``.

    A pack of pairs has ``chosen_`` and ``rejected_`` of each, together at most twice ``max_seq_len`` tokens: as many as
    a pair alone may have.
    """

    def __init__(self, rows: TokenDataset, *, max_seq_len: int, seed: int = 0) -> None:
        room = max_seq_len * len(rows.stores)
        content = f"{rows.fingerprint} packed {room} {seed}"
        super().__init__(rows, schema=rows.schema, fingerprint=hashlib.sha256(content.encode()).hexdigest())
        self.rows, self.max_seq_len = rows, max_seq_len
        lengths = [rows.room(i) for i in range(len(rows))]
        self._flat, self._ends = array("q"), array("q", [0])
        for members in pack(lengths, room, seed=seed):
            self._flat.extend(members)
            self._ends.append(len(self._flat))
        self.efficiency = sum(len(store.ids) for store in rows.stores) / (len(self) * room)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @property
    def num_rows(self) -> int:
        """The number of rows in all packs."""
        return len(self.rows)

    def members(self, i: int) -> list[int]:
        """The rows that pack ``i`` is made of."""
        i = check_index(i, len(self))
        return self._flat[self._ends[i] : self._ends[i + 1]].tolist()

    def members_of(self, i: int, epoch: int = 0) -> list[tuple[Dataset, int]]:
        return [(self.rows, row) for row in self.members(i)]

    def at(self, i: int, epoch: int) -> Row:
        """Pack ``i``, which is the same in every epoch."""
        return join_documents([self.rows[row] for row in self.members(i)])

    @property
    def report(self) -> Report:
        """That of the rows, with the number of ``packs`` and how full they are."""
        return {**self.rows.report, "packs": len(self), "efficiency": round(self.efficiency, 4)}


class MixedDataset(View):
    """Rows of several data sets, each as often as its weight says.

    A round holds every data set's quota of rows. An epoch is as many rounds as the first data set to run out of rows
    has, so no row comes twice in it; the others continue where they stopped in the next epoch. With packing, the shares
    are of packed rows, that is of tokens. Which row comes where is a pure function of (epoch, index).
    """

    def __init__(
        self, parts: Sequence[Dataset], weights: Sequence[float], *, names: Sequence[str], seed: int = 0
    ) -> None:
        self.parts, self.names, self.seed = list(parts), list(names), seed
        self.quotas = quotas_of(weights)
        self._round = interleave(self.quotas)
        self._nth = [self._round[:slot].count(source) for slot, source in enumerate(self._round)]
        self._rounds = min(len(part) // quota for part, quota in zip(parts, self.quotas, strict=True))
        if self._rounds == 0:
            short = min(range(len(parts)), key=lambda i: len(parts[i]) / self.quotas[i])
            few = f"{self.names[short]}: {counted(len(parts[short]), 'row')}"
            raise ValueError(f"{few}, too few for one round of the mix {self.quotas}; round the weights")
        for name, part in zip(names, parts, strict=True):
            if part[0].keys() != parts[0][0].keys():
                raise ValueError(f"{name}: {part.schema} rows cannot be mixed with {parts[0].schema} rows")
        schema = "+".join(dict.fromkeys(part.schema for part in parts))
        content = f"{[part.fingerprint for part in parts]} {self.quotas} {seed}"
        super().__init__(parts[0], schema=schema, fingerprint=hashlib.sha256(content.encode()).hexdigest())

    def __len__(self) -> int:
        return self._rounds * len(self._round)

    def source_of(self, i: int, epoch: int = 0) -> tuple[int, int]:
        """Which data set, and which of its rows, index ``i`` of an epoch is."""
        which, slot = divmod(check_index(i, len(self)), len(self._round))
        source = self._round[slot]
        nth = which * self.quotas[source] + self._nth[slot]
        place = (epoch * self._rounds * self.quotas[source] + nth) % len(self.parts[source])
        # The same order in every turn: an epoch holds the end of one and the beginning of the next, with no row twice.
        return source, Permutation(len(self.parts[source]), (self.seed, source))(place)

    def members_of(self, i: int, epoch: int = 0) -> list[tuple[Dataset, int]]:
        source, row = self.source_of(i, epoch)
        return [(self.parts[source], row)]

    @property
    def report(self) -> Report:
        """Those of all ``sources``, added up, and how many rows of each an epoch holds."""
        report = add_reports([part.report for part in self.parts], self.schema, len(self))
        report["sources"] = {
            name: {"rows": len(part), "per_epoch": self._rounds * quota}
            for name, part, quota in zip(self.names, self.parts, self.quotas, strict=True)
        }
        return report


class JoinedDataset(View):
    """All rows of several named data sets, one after the other. ``parts`` keeps them apart."""

    def __init__(self, parts: Mapping[str, Dataset]) -> None:
        self.parts = dict(parts)
        first = next(iter(self.parts.values()))
        for name, part in self.parts.items():
            if part[0].keys() != first[0].keys():
                raise ValueError(f"{name}: {part.schema} rows cannot be evaluated together with {first.schema} rows")
        content = str([part.fingerprint for part in self.parts.values()])
        schema = "+".join(dict.fromkeys(part.schema for part in self.parts.values()))
        super().__init__(first, schema=schema, fingerprint=hashlib.sha256(content.encode()).hexdigest())
        self._ends = list(accumulate(map(len, self.parts.values())))

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def num_rows(self) -> int:
        """The rows of all parts, of which a pack holds several."""
        return sum(part.num_rows for part in self.parts.values())

    def members_of(self, i: int, epoch: int = 0) -> list[tuple[Dataset, int]]:
        i = check_index(i, len(self))
        number = bisect_right(self._ends, i)
        return [(list(self.parts.values())[number], i - (self._ends[number - 1] if number else 0))]

    @property
    def report(self) -> Report:
        """Those of all parts, added up."""
        return add_reports([part.report for part in self.parts.values()], self.schema, self.num_rows)
