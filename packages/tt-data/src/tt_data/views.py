"""Several data sets in given shares, resumable: which row comes where is a pure function of (epoch, index)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from math import gcd, lcm
from typing import Any

from tt_data.dataset import Dataset, Piece, Row, check_index
from tt_data.order import Permutation
from tt_data.report import add_reports

_FINEST = 1000


def quotas_of(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the proportion of ``weights`` (to a thousandth). Raises ValueError for a wrong one."""
    for weight in weights:
        if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not 0 < weight < float("inf"):
            raise ValueError(f"a weight must be a positive number, got {weight!r}")
    shares = [Fraction(weight / sum(weights)).limit_denominator(_FINEST) for weight in weights]
    shares = [max(share, Fraction(1, _FINEST)) for share in shares]
    whole = lcm(*(share.denominator for share in shares))
    if whole > _FINEST:
        whole = _FINEST
    quotas = [max(1, round(share * whole)) for share in shares]
    common = gcd(*quotas)
    return [quota // common for quota in quotas]


def interleave(quotas: Sequence[int]) -> list[int]:
    """The sources of one round, each as often as its quota, spread evenly."""
    places = [((2 * k + 1) / (2 * quota), i) for i, quota in enumerate(quotas) for k in range(quota)]
    return [i for _, i in sorted(places)]


class MixedDataset:
    """Rows of several data sets, each as often as its weight says.

    A round holds every data set's quota of rows. An epoch is as many rounds as the first data set to run out of rows
    has, so no row comes twice in it; the others go on where they stopped in the next epoch. With packing, the shares
    are of packed rows, that is of tokens.
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
            raise ValueError(
                f"{self.names[short]}: {len(parts[short])} rows are too few for one round of the mix {self.quotas}; "
                "round the weights"
            )
        for name, part in zip(names, parts, strict=True):
            if part[0].keys() != parts[0][0].keys():
                raise ValueError(f"{name}: {part.schema} rows cannot be mixed with {parts[0].schema} rows")
        self.tokenizer, self.pad_id, self.kind = parts[0].tokenizer, parts[0].pad_id, parts[0].kind
        self.schema = "+".join(dict.fromkeys(part.schema for part in parts))
        content = f"{[part.fingerprint for part in parts]} {self.quotas} {seed}"
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()

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

    def at(self, i: int, epoch: int) -> Row:
        """Row ``i`` of an epoch."""
        source, row = self.source_of(i, epoch)
        return self.parts[source][row]

    def __getitem__(self, i: int) -> Row:
        return self.at(i, 0)

    def _part(self, i: int) -> tuple[Dataset, int]:
        source, row = self.source_of(i)
        return self.parts[source], row

    def length(self, i: int) -> int:
        part, row = self._part(i)
        return part.length(row)

    def where(self, i: int, epoch: int = 0) -> str:
        """Where row ``i`` of an epoch was read."""
        source, row = self.source_of(i, epoch)
        return self.parts[source].where(row)

    def rendered(self, i: int) -> list[Piece]:
        part, row = self._part(i)
        return part.rendered(row)

    def documents(self, i: int) -> list[list[Piece]]:
        part, row = self._part(i)
        return part.documents(row)

    def document_names(self, i: int) -> list[str]:
        part, row = self._part(i)
        return part.document_names(row)

    def is_truncated(self, i: int) -> bool:
        part, row = self._part(i)
        return part.is_truncated(row)

    @property
    def report(self) -> dict[str, Any]:
        return add_reports([part.report for part in self.parts], self.schema, len(self)) | {
            "sources": {
                name: {"rows": len(part), "per_epoch": self._rounds * quota}
                for name, part, quota in zip(self.names, self.parts, self.quotas, strict=True)
            }
        }
