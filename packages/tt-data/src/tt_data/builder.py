"""Reads whole sources into a ``TokenDataset``."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

from tt_data.dataset import TokenDataset
from tt_data.encode_processes import encode_here, encode_in_processes
from tt_data.examples import BadRowError
from tt_data.locate import Source
from tt_data.readers import Read, choose_schema, settings_key
from tt_data.report import Tally
from tt_data.row_encoder import TokenRow
from tt_data.settings import Settings
from tt_data.store import TokenStore
from tt_data.tokenizer import Tokenizer

_BATCH = 512


def fingerprint_of(sources: Sequence[Source], tokenizer: Tokenizer, settings: Settings) -> str:
    """Changes with the rows, with whatever changes ids, and with the settings."""
    digest = hashlib.sha256()
    for part in (*(source.digest() for source in sources), tokenizer.fingerprint, settings_key(settings)):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


def build(
    sources: Sequence[Source], tokenizer: Tokenizer, settings: Settings, *, read: Read | None = None, schema: str = "",
    fingerprint: str | None = None, num_workers: int = 0, timeout_s: float = 300.0,
) -> TokenDataset:  # fmt: skip
    """Every row of ``sources``. ``read`` (named ``schema``) instead of the schema that the columns are.

    Raises ValueError for an empty source, for one without a usable row, and for any bad row where the policy says so.
    """
    builder = _Builder(sources, tokenizer, settings)
    for number, source in enumerate(sources):
        builder.read(number, source, read, schema, num_workers=num_workers, timeout_s=timeout_s)
    builder.refuse_bad()
    return builder.dataset(fingerprint or fingerprint_of(sources, tokenizer, settings))


class _Builder:
    def __init__(self, sources: Sequence[Source], tokenizer: Tokenizer, settings: Settings) -> None:
        self.sources, self.tokenizer, self.settings = sources, tokenizer, settings
        self.tally = Tally()
        self.digests: set[bytes] = set()
        self.schemas: dict[str, str] = {}  # used as an ordered set: schema -> the first source of its kind
        self.kind: str | None = None
        self.stores = [TokenStore()]
        self.places, self.truncated, self.desirable = array("q"), array("b"), array("b")

    def read(
        self, number: int, source: Source, read: Read | None, schema: str, *, num_workers: int, timeout_s: float
    ) -> None:
        rows = source.rows()
        first = next(rows, None)
        if first is None:
            raise ValueError(f"{source.name} has 0 rows")
        if read is None:
            found = choose_schema(first[1], self.tokenizer, self.settings, where=f"{source.name}:{first[0]}")
            read, schema = found.read, found.name
        self.schemas.setdefault(schema, source.name)
        batches = batched(chain([first], rows), _BATCH)
        if num_workers:
            encoded = encode_in_processes(
                source.name, batches, read, self.tokenizer, self.settings, num_workers=num_workers, timeout_s=timeout_s
            )
        else:
            encoded = encode_here(source.name, batches, read, self.tokenizer, self.settings)
        for kept, tally in encoded:
            self.tally.add(tally)
            for row in kept:
                self._keep(number, row)

    def _keep(self, number: int, row: TokenRow) -> None:
        if self.settings.drop_duplicates:
            if row.digest in self.digests:
                where = f"{self.sources[number].name}:{row.line}"
                self.tally.drop(where, BadRowError("duplicate", "the same as an earlier row"))
                return
            self.digests.add(row.digest)
        self.tally.keep(truncated=row.truncated, no_end=row.no_end)
        if self.kind is None:
            self.kind = row.kind
            self.stores = [TokenStore() for _ in row.parts]
        if row.kind != self.kind:
            where = f"{self.sources[number].name}:{row.line}"
            raise ValueError(f"{where}: {row.kind} rows cannot be mixed with the {self.kind} rows before them")
        for store, part in zip(self.stores, row.parts, strict=True):
            store.append(part)
        self.places.extend((number, row.line))
        self.truncated.append(row.truncated)
        if row.kind == "judged":
            self.desirable.append(row.desirable)

    def refuse_bad(self) -> None:
        tally, kept = self.tally, len(self.stores[0])
        bad = tally.dropped.total()
        if not bad or (kept and self.settings.on_bad_row == "drop"):
            return
        names = ", ".join(source.name for source in self.sources[:3])
        hidden = tally.dropped["no trainable token"]
        if hidden and hidden == bad and self.settings.max_seq_len is not None:
            raise ValueError(
                f"{names}: {hidden} of {tally.seen} rows have no trainable token at max_seq_len "
                f"{self.settings.max_seq_len} (longest prompt {tally.longest_prompt}); raise max_seq_len"
            )
        what = "on_bad_row is error" if kept else "none can be used"
        raise ValueError(
            f"{names}: {bad} of {tally.seen} rows are bad ({tally.summary()}), {what}: {'; '.join(tally.problems[:3])}"
        )

    def dataset(self, fingerprint: str) -> TokenDataset:
        return TokenDataset(
            self.tokenizer, schema="+".join(self.schemas), stores=self.stores,
            names=[source.name for source in self.sources], places=self.places, truncated=self.truncated,
            desirable=self.desirable if self.kind == "judged" else None, report=self.tally.report(),
            fingerprint=fingerprint,
        )  # fmt: skip


def batched(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of ``size`` rows, the last one shorter."""
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch
