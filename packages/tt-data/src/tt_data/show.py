"""What a data set looks like to the model, as plain data: for ``tt data show``, and for people who look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tt_data.dataset import Dataset, Piece
from tt_data.store import IGNORE_INDEX

_COLOR, _PLAIN = "\x1b[32m", "\x1b[0m"
_OPEN, _CLOSE = "\u00ab", "\u00bb"


def show(dataset: Dataset, *, rows: Sequence[int] | None = None, limit: int = 3) -> list[dict[str, Any]]:
    """The first ``limit`` rows, or ``rows``, each with its place, its counts, and its documents as (text, trained)."""
    indices = list(range(min(limit, len(dataset)))) if rows is None else list(rows)
    return [_sample(dataset, i) for i in indices]


def _sample(dataset: Dataset, i: int) -> dict[str, Any]:
    row = dataset[i]
    labels = [label for key in row if key.endswith("labels") for label in row[key]]
    return {
        "index": i,
        "where": dataset.where(i),
        "tokens": len(labels),
        "trained": sum(label != IGNORE_INDEX for label in labels),
        "truncated": dataset.is_truncated(i),
        "documents": dataset.documents(i),
    }


def as_text(sample: dict[str, Any], *, color: bool = False) -> str:
    """A sample of ``show`` for a terminal: trained text in green, or between marks where there is no colour."""
    cut = ", cut at max_seq_len" if sample["truncated"] else ""
    head = f"[{sample['index']}] {sample['where']}: {sample['tokens']} tokens, {sample['trained']} trained{cut}"
    texts = ["".join(_marked(piece, color) for piece in document) for document in sample["documents"]]
    return "\n".join([head, "\n---\n".join(texts)])


def _marked(piece: Piece, color: bool) -> str:
    text, trained = piece
    text = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    if not trained:
        return text
    return f"{_COLOR}{text}{_PLAIN}" if color else f"{_OPEN}{text}{_CLOSE}"


def stats(dataset: Dataset, *, bins: int = 10) -> dict[str, Any]:
    """Lengths (quantiles and a histogram of ``bins``), the share of tokens that is trained, and the report's counts."""
    if bins <= 0:
        raise ValueError(f"bins must be positive, got {bins}")
    lengths: list[int] = []
    trained = 0
    for i in range(len(dataset)):
        row = dataset[i]
        labels = [row[key] for key in row if key.endswith("labels")]
        lengths.append(sum(map(len, labels)))
        trained += sum(len(part) - part.count(IGNORE_INDEX) for part in labels)
    lengths.sort()
    tokens = sum(lengths)
    return {
        **dataset.report,
        "fingerprint": dataset.fingerprint,
        "tokens": tokens,
        "trained_tokens": trained,
        "share_trained": round(trained / tokens, 4),
        "lengths": {
            "min": lengths[0],
            "mean": round(tokens / len(lengths), 1),
            "p50": lengths[len(lengths) // 2],
            "p90": lengths[len(lengths) * 9 // 10],
            "p99": lengths[len(lengths) * 99 // 100],
            "max": lengths[-1],
            "histogram": _histogram(lengths, bins),
        },
    }


def _histogram(lengths: Sequence[int], bins: int) -> list[dict[str, int]]:
    """Equal ranges ``[from, to)`` over the lengths, with how many fall into each."""
    low, high = lengths[0], lengths[-1] + 1
    width = max(1, -(-(high - low) // bins))
    counts = [0] * (-(-(high - low) // width))
    for length in lengths:
        counts[(length - low) // width] += 1
    return [{"from": low + i * width, "to": low + (i + 1) * width, "count": count} for i, count in enumerate(counts)]
