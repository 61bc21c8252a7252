"""Token rows on disk, so that the same data, tokenizer, template and settings are encoded once.

A file apart from ``load``: who changes the format of the files needs nothing else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from array import array
from collections import Counter
from pathlib import Path
from typing import Any

from tt_data.files import open_regular, read_object
from tt_data.report import Tally, summary_lines
from tt_data.text.tokenizer import Tokenizer
from tt_data.token_rows.dataset import TokenDataset, TokenStore, read_numbers, write_numbers
from tt_data.wording import visible

_log = logging.getLogger(__name__)
_FORMAT = 5  # of a cached data set; every change of it gets a new number
_MAX_META = 256 << 20  # bytes: it names every source file
_COLUMNS = {"places": "q", "truncated": "b", "desirable": "b"}


def cache_key(fingerprint: str) -> str:
    """The name of a cached data set: its fingerprint, the format, and the byte order of the numbers in it."""
    return f"{fingerprint[:40]}-{_FORMAT}-{sys.byteorder}"


def save(dataset: TokenDataset, cache_dir: Path) -> None:
    """Write ``dataset`` under ``cache_dir``: into a temporary folder, which is renamed once it is complete."""
    target = cache_dir / cache_key(dataset.fingerprint)
    if target.exists():
        return
    cache_dir.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".tokens-", dir=cache_dir))
    try:
        for number, store in enumerate(dataset.stores):
            store.save(staging, str(number))
        for name in _COLUMNS:
            if getattr(dataset, name) is not None:
                write_numbers(staging / name, getattr(dataset, name))
        meta = {
            "schema": dataset.schema, "names": dataset.names, "stores": len(dataset.stores),
            "tally": {**vars(dataset.tally), "forms": sorted(dataset.tally.forms)},
            "fingerprint": dataset.fingerprint, "content": {p.name: _digest(p) for p in staging.iterdir()},
        }  # fmt: skip
        (staging / "meta.json").write_text(json.dumps({**meta, "check": _check(meta)}), encoding="utf-8")
        os.umask(mask := os.umask(0o077))
        staging.chmod(0o777 & ~mask)
        staging.replace(target)
    except OSError as error:
        if not target.exists():  # else another process was faster, and the result is the same
            _log.warning("%s: the token cache was not written (%s)", cache_dir, error)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _digest(path: Path) -> str:
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()  # type: ignore[arg-type]


def _check(meta: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def load(fingerprint: str, tokenizer: Tokenizer, cache_dir: Path) -> TokenDataset | None:
    """The data set that ``save`` wrote, mapped; None if there is none, or if it is damaged."""
    directory = cache_dir / cache_key(fingerprint)
    if not directory.is_dir() or directory.is_symlink():
        return None
    try:
        return _load(fingerprint, tokenizer, directory)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        _log.warning("%s: the token cache is broken (%s); encoding again", directory, visible(str(error)))
        shutil.rmtree(directory, ignore_errors=True)
        return None


def _load(fingerprint: str, tokenizer: Tokenizer, directory: Path) -> TokenDataset:
    meta = read_object(directory / "meta.json", limit=_MAX_META)
    whole = meta.pop("check") == _check(meta) and meta["fingerprint"] == fingerprint
    broken = [n for n, digest in meta["content"].items() if _digest(directory / Path(n).name) != digest]
    if broken or not whole:
        raise ValueError(f"{broken[0] if broken else 'meta.json'} is not what was written")
    texts = [meta["schema"], *meta["names"]]
    if meta["stores"] not in (1, 2) or type(meta["names"]) is not list or not all(type(text) is str for text in texts):
        raise ValueError("meta.json contains something other than was written")
    stores = [TokenStore.load(directory, str(number)) for number in range(meta["stores"])]
    columns = {
        name: read_numbers(directory / name, kind) if (directory / name).exists() else array(kind)
        for name, kind in _COLUMNS.items()
    }
    sizes = {*(len(store) for store in stores), len(columns["truncated"]), len(columns["places"]) // 2}
    sizes |= {len(columns["desirable"])} if columns["desirable"] else set()
    sources = columns["places"][::2]
    if len(sizes) > 1 or min(sources) < 0 or max(sources) >= len(meta["names"]):
        raise ValueError("its files do not have the same rows")
    dataset = TokenDataset(
        tokenizer, schema=meta["schema"], stores=stores, names=meta["names"], places=columns["places"],
        truncated=columns["truncated"], desirable=columns["desirable"] or None, fingerprint=fingerprint,
        tally=_tally_of(meta["tally"]),
    )  # fmt: skip
    summary_lines(dataset.report)  # an error here is one of meta.json
    return dataset


def _tally_of(facts: dict[str, Any]) -> Tally:
    if facts.keys() != vars(Tally()).keys():
        raise ValueError("meta.json contains other counts than were written")
    tally = Tally(**facts)
    tally.dropped, tally.forms = Counter(tally.dropped), set(tally.forms)
    for counts in (tally.notes, tally.unread):
        counts.update({key: (count, where) for key, (count, where) in counts.items()})
    return tally
