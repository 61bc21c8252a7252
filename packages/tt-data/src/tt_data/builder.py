"""Reads whole sources into a ``TokenDataset``."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import chain, islice
from typing import Any

from tt_data.dataset import TokenDataset, TokenStore
from tt_data.examples import BadRowError, Kind
from tt_data.processes import map_in_processes
from tt_data.report import DUPLICATE, Tally
from tt_data.row_encoder import Batch, TokenRow, encode_rows
from tt_data.rows.schemas import Read, choose_schema, settings_key
from tt_data.rows.settings import Settings
from tt_data.rows.sources import Source, quick_digest
from tt_data.text.tokenizer import Tokenizer
from tt_data.wording import said

Encoded = tuple[list[TokenRow], Tally]
_BATCH = 512
_MOST_BAD = 100_000  # rows at the beginning of which none can be used


def fingerprint_of(
    sources: Sequence[Source], tokenizer: Tokenizer, settings: Settings, limit: int | None = None
) -> str:
    """Changes with the rows, with whatever changes ids, and with the settings. With a ``limit`` no file is read."""
    digest = hashlib.sha256(b"" if limit is None else f"{limit}\0".encode())
    content = (s.digest() if limit is None or s.path is None else quick_digest(s.path) for s in sources)
    for part in (*content, tokenizer.fingerprint, settings_key(settings)):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


def build(
    sources: Sequence[Source], tokenizer: Tokenizer, settings: Settings, *, read: Read | None = None, schema: str = "",
    fingerprint: str | None = None, num_workers: int = 0, timeout_s: float = 300.0, limit: int | None = None,
) -> TokenDataset:  # fmt: skip
    """Every row of ``sources``, or the first ``limit`` that can be used. ``read`` (named ``schema``) replaces the
    schema that the columns have.

    Raises ValueError for an empty source, for one without a usable row, and for a bad row if the settings refuse it.
    """
    builder = _Builder(sources, tokenizer, settings, limit)
    for number, source in enumerate(sources):
        if not builder.wanted(1):
            builder.partial = True
            break
        builder.read(number, source, read, schema, num_workers=num_workers, timeout_s=timeout_s)
    builder.refuse_bad()
    counts = builder.tally.report()
    if builder.partial:
        counts |= {"partial": True, "read": builder.tally.seen}
    return TokenDataset(
        tokenizer, schema="+".join(builder.schemas), stores=builder.stores, names=[source.name for source in sources],
        places=builder.places, truncated=builder.truncated,
        desirable=builder.desirable if builder.kind == "judged" else None, counts=counts,
        fingerprint=fingerprint or fingerprint_of(sources, tokenizer, settings, limit),
    )  # fmt: skip


class _Builder:
    """The rows that have been kept so far, and what has been counted."""

    def __init__(self, sources: Sequence[Source], tokenizer: Tokenizer, settings: Settings, limit: int | None) -> None:
        self.sources, self.tokenizer, self.settings, self.limit = sources, tokenizer, settings, limit
        self.partial = False  # whether there is more than was read
        self.tally = Tally()
        self.digests: dict[int, set[bytes]] = {}  # of the first, second, ... time that a source is given
        self.schemas: dict[str, str] = {}  # used as an ordered set: schema -> the first source of its kind
        self.kind: Kind | None = None
        self.stores = [TokenStore()]
        self.places, self.truncated, self.desirable = array("q"), array("b"), array("b")

    def read(
        self, number: int, source: Source, read: Read | None, schema: str, *, num_workers: int, timeout_s: float
    ) -> None:
        rows = source.rows()
        first = next(rows, None)
        if first is None:
            raise ValueError(f"{source.name} has 0 rows; give a file with rows")
        if read is None:
            found = choose_schema(first[1], self.tokenizer, self.settings, where=f"{source.name}:{first[0]}")
            read, schema = found.read, found.name
        self.schemas.setdefault(schema, source.name)
        given_before = [earlier.name for earlier in self.sources[:number]].count(source.name)
        digests = self.digests.setdefault(given_before, set())  # a file that is named twice counts twice
        encode = partial(encode_rows, source.name, read=read, tokenizer=self.tokenizer, settings=self.settings)
        every = chain([first], rows)
        batches = iter(lambda: list(islice(every, self.wanted(_BATCH))), [])
        num_workers = 0 if self.limit is not None else num_workers
        with closing(_encoded(encode, batches, source.name, num_workers=num_workers, timeout_s=timeout_s)) as encoded:
            for kept, tally in encoded:
                self.tally.add(tally)
                for row in kept:
                    self._keep(number, row, digests)
                if self.tally.seen > _MOST_BAD and not len(self.stores[0]):
                    self.refuse_bad()  # an endless source has no end to wait for
                if not self.wanted(1):
                    self.partial = _has_more(rows)
                    break

    def wanted(self, most: int) -> int:
        """How many rows, of ``most``, are still wanted."""
        return most if self.limit is None else min(most, self.limit - len(self.stores[0]))

    def _keep(self, number: int, row: TokenRow, digests: set[bytes]) -> None:
        if self.settings.drop_duplicates:
            if row.digest in digests:
                where = f"{self.sources[number].name}:{row.line}"
                self.tally.drop(where, BadRowError(DUPLICATE, "the same as an earlier row"))
                return
            digests.add(row.digest)
        self.tally.truncated += row.truncated
        self.tally.no_end += row.no_end
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
        rows = f"{tally.seen} row{'' if tally.seen == 1 else 's'}"
        hidden = tally.dropped["no trainable token"]
        if hidden and hidden == bad and tally.longest_prompt:
            raise ValueError(
                f"{names}: {hidden} of {rows} {'has' if hidden == 1 else 'have'} no trainable token at max_seq_len "
                f"{self.settings.max_seq_len} (longest prompt {tally.longest_prompt}); raise max_seq_len"
            )
        what = "on_bad_row is error" if kept else "none can be used"
        raise ValueError(
            f"{names}: {bad} of {rows} {'is' if bad == 1 else 'are'} bad ({tally.summary()}), {what}: "
            f"{'; '.join(tally.problems[:3])}"
        )


def _encoded(
    encode: Callable[[Batch], Encoded], batches: Iterator[Batch], name: str, *, num_workers: int, timeout_s: float
) -> Generator[Encoded, None, None]:
    """``encode(batch)`` for each of ``batches``, here or in processes. A RuntimeError of a process names its rows."""
    if not num_workers:
        yield from map(encode, batches)
        return

    def rows_of(batch: Batch) -> str:
        return f"rows {name}:{batch[0][0]} to {name}:{batch[-1][0]}"

    def work(batch: Batch) -> Encoded:
        try:
            return encode(batch)
        except ValueError:
            raise
        except Exception as error:
            raise RuntimeError(f"{rows_of(batch)}: {type(error).__name__}: {said(error, 500)}") from None

    def describe(batch: Batch, what: str) -> str:
        if what == "died":
            cure = "look for the kernel's out-of-memory killer, or set num_workers: 0"
            return f"{rows_of(batch)} or the next ones: a process that encodes them died; {cure}"
        return f"{rows_of(batch)}: a process that encodes them {what}"

    yield from map_in_processes(work, batches, num_workers=num_workers, timeout_s=timeout_s, describe=describe)


def _has_more(rows: Iterator[Any]) -> bool:
    try:
        return next(rows, None) is not None
    except ValueError:  # what cannot be read is something
        return True
