"""The rows of a run up to a step, for a run that resumes there.

A file apart from ``run_files``: nearly every line is copied as it is, without being parsed.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tt_ckpt.redaction import redact_data, redact_known
from tt_train.records.run_files import checked_row, left_out, raw_lines, record_of

# a line as a run writes it: figures that are null or finite, below 1e100; the digest of its rows comes last
_FIGURE = rb"-?(?:0|[1-9]\d{0,15})(?:\.\d{1,20})?|-?\d(?:\.\d{1,17})?e(?:-\d{2,3}|\+[1-8]\d)|null"
_LINE = re.compile(
    rb'\{"step": (0|[1-9]\d{0,14})((?:, "[\w./-]{1,60}": (?:' + _FIGURE + rb"))*)"
    rb'(?:, "token_stream": (?:"[0-9a-f]{0,64}"|null))?\}\n'
)
_NAME = re.compile(rb'"([^"]+)"')
_AT_ONCE = 4096  # lines that are searched for secrets together
_MOST_NAMES = 1000  # sets of names that are remembered


def rows_until(path: Path, step: int, problems: list[str]) -> Iterator[bytes]:
    """Pieces of metrics.jsonl or samples.jsonl, if it exists: the lines whose ``step`` is not later, without secrets.

    What no run writes is left out or becomes null as in ``read_rows``, and ``problems`` says why.
    """
    known: dict[tuple[bytes, ...], bool] = {}
    kept: list[bytes] = []
    for number, line, is_last in raw_lines(path):
        found = None if line is None else _LINE.fullmatch(line)
        if found is not None and line is not None and _are_plain(tuple(_NAME.findall(found[2])), known):
            if int(found[1]) <= step:
                kept.append(line)
        elif (record := record_of(line)) is not None:
            row = checked_row(record, path.name, problems)
            if row is not None and row["step"] <= step:
                kept.append(as_lines([row]).encode("utf-8", "backslashreplace"))
        elif line is None or line.strip():
            problems.append(left_out(path.name, number, is_last=is_last()))
        if len(kept) == _AT_ONCE:
            yield _without_secrets(kept)
            kept = []
    yield _without_secrets(kept)


def as_lines(rows: Iterable[dict[str, Any]]) -> str:
    """Lines of JSON; secrets are blanked in its texts, so that it stays JSON."""
    return "".join(json.dumps(redact_data(row), ensure_ascii=False) + "\n" for row in rows)


def _are_plain(names: tuple[bytes, ...], known: dict[tuple[bytes, ...], bool]) -> bool:
    """Whether each name is there once, and none is a secret."""
    if names not in known:
        if len(known) == _MOST_NAMES:
            return False
        texts = [name.decode("ascii") for name in names]
        known[names] = len({*names, b"step"}) == len(names) + 1 and redact_data(texts) == texts
    return known[names]


def _without_secrets(lines: list[bytes]) -> bytes:
    whole = b"".join(lines)
    text = whole.decode("utf-8")
    if redact_known(text) == text:
        return whole
    return as_lines(json.loads(line) for line in lines).encode("utf-8", "backslashreplace")
