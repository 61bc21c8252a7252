"""A data set as the model sees it, as plain data and as text: for ``tt data show`` and for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NotRequired, TypedDict, cast

from tt_data.report import Report
from tt_data.template.spans import Span, alternatives
from tt_data.text.tokenizer import Tokenizer
from tt_data.token_rows.dataset import IGNORE_INDEX, Dataset, Piece
from tt_data.wording import counted

_COLOR, _INVERSE, _PLAIN = "\x1b[32m", "\x1b[7m", "\x1b[0m"
_OPEN, _CLOSE = "\u27e6", "\u27e7"
_OPEN_TYPED, _CLOSE_TYPED = "\u2039", "\u203a"
_WIDEST = 40  # characters of a bar


class Sample(TypedDict):
    """A row for people: its place, its counts, and its documents, each named and as (text, trained)."""

    index: int
    where: str
    tokens: int
    trained: int
    truncated: bool
    names: list[str]
    documents: list[list[Piece]]
    typed: NotRequired[list[list[Span]]]  # of each document: where its text spells a special token but is not one


class Bin(TypedDict("Bin", {"from": int})):
    """The number of rows whose length is in ``[from, to)``."""

    to: int
    count: int


class Lengths(TypedDict):
    """Lengths of rows in tokens."""

    min: int
    mean: float
    p50: int
    p90: int
    p99: int
    max: int
    histogram: list[Bin]


class Stats(Report):
    """A report with the lengths of the rows and the share of tokens that is trained."""

    fingerprint: str
    tokens: int
    trained_tokens: int
    share_trained: float
    lengths: Lengths


def show(dataset: Dataset, *, rows: Sequence[int] | None = None, limit: int = 3) -> list[Sample]:
    """The first ``limit`` rows, or ``rows``: place, counts, and the documents, each named and as (text, trained)."""
    indices = list(range(min(limit, len(dataset)))) if rows is None else list(rows)
    return [_sample(dataset, i) for i in indices]


def _sample(dataset: Dataset, i: int) -> Sample:
    row = _row(dataset, i)
    labels = [label for key in row if key.endswith("labels") for label in row[key]]
    documents, typed = dataset.documents(i), _typed_in(dataset, row)
    return {
        "index": i,
        "where": dataset.where(i),
        "tokens": len(labels),
        "trained": sum(label != IGNORE_INDEX for label in labels),
        "truncated": dataset.is_truncated(i),
        "names": dataset.document_names(i),
        "documents": documents,
        "typed": [typed.get("".join(text for text, _ in pieces), []) for pieces in documents],
    }


def _row(dataset: Dataset, i: int) -> Mapping[str, Any]:
    """Row ``i`` without the answer of another row."""
    return {key: value for key, value in cast(Mapping[str, Any], dataset[i]).items() if not key.startswith("kl_")}


def _typed_in(dataset: Dataset, row: Mapping[str, Any]) -> dict[str, list[Span]]:
    """By the text of each document: where its text spells a special token but is not one."""
    found: dict[str, list[Span]] = {}
    for key in [key for key in row if key.endswith("input_ids")]:
        positions = row.get(key.replace("input_ids", "position_ids"), row.get("position_ids", ()))
        cuts = [place for place, position in enumerate(positions) if position == 0] or [0]
        for start, end in pairwise([*cuts, len(row[key])]):
            ids = list(row[key][start:end])
            found[dataset.tokenizer.decode(ids, skip_special=False)] = _typed_spans(dataset.tokenizer, ids)
    return found


def _typed_spans(tokenizer: Tokenizer, ids: Sequence[int]) -> list[Span]:
    """The characters of ``tokenizer.decode(ids, skip_special=False)`` that spell a special token without being one."""
    special = {tokenizer.token_id(token): token for token in tokenizer.special_tokens}
    pattern = alternatives(special.values())
    places = [place for place, index in enumerate(ids) if index in special]
    if len(pattern.findall(tokenizer.decode(ids, skip_special=False))) <= len(places):
        return []
    spans: list[Span] = []
    position = 0
    for before, place in pairwise([-1, *places, len(ids)]):
        head = special[ids[before]] if before >= 0 else ""  # decoders treat the beginning of a text differently
        run = tokenizer.decode(ids[max(before, 0) : place], skip_special=False)[len(head) :]
        position += len(head)
        spans += [(position + match.start(), position + match.end()) for match in pattern.finditer(run)]
        position += len(run)
    return spans


def as_text(sample: Sample, *, color: bool = False) -> str:
    """A sample of ``show`` for a terminal: trained text in green, or between marks without colour.

    Each document of a pack or of a preference row has a line with its name. Text that spells a special token, but is
    not one, is inverse, or between different marks.
    """
    spans = sample.get("typed") or [[] for _ in sample["documents"]]
    names = sample["names"]
    texts = [_marked(document, typed, color) for document, typed in zip(sample["documents"], spans, strict=True)]
    cut = ", cut at max_seq_len" if sample["truncated"] else ""
    where = sample["where"] if len({*_places(names)}) == 1 else f"{len(names)} documents"
    head = f"[{sample['index']}] {where}: {counted(sample['tokens'], 'token')}, {sample['trained']} trained{cut}"
    if len(texts) > 1:
        texts = [f"--- {name} ---\n{text}" for name, text in zip(names, texts, strict=True)]
    legend = "inverse" if color else f"{_OPEN_TYPED}...{_CLOSE_TYPED}"
    note = [f"({legend}: text that spells a special token; special_tokens=tokens makes it one)"] if any(spans) else []
    return "\n".join([head, *texts, *note])


def _places(names: Sequence[str]) -> list[str]:
    """Without the side of a preference row."""
    return [name.removesuffix(" chosen").removesuffix(" rejected") for name in names]


def _marked(pieces: Sequence[Piece], typed: Sequence[Span], color: bool) -> str:
    shown = []
    position = 0
    for text, trained in pieces:
        ends = [place - position for span in typed for place in span if 0 < place - position < len(text)]
        inner = ""
        for start, end in pairwise([0, *ends, len(text)]):
            is_typed = any(a <= position + start < b for a, b in typed)
            inner += _drawn(text[start:end], trained, is_typed, color)
        position += len(text)
        shown.append(f"{_OPEN}{inner}{_CLOSE}" if trained and not color else inner)
    return "".join(shown)


def _drawn(text: str, trained: bool, typed: bool, color: bool) -> str:
    text = "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
    if not color:
        return f"{_OPEN_TYPED}{text}{_CLOSE_TYPED}" if typed else text
    codes = (_COLOR if trained else "") + (_INVERSE if typed else "")
    # line by line: a pager resets the colour at the end of a line
    return "\n".join(f"{codes}{line}{_PLAIN}" if line and codes else line for line in text.split("\n"))


def stats(dataset: Dataset, *, bins: int = 10, sample: int | None = None) -> Stats:
    """Lengths (quantiles and a histogram of ``bins``), the share of tokens that is trained, and the report's counts.

    With ``sample`` the lengths and tokens are those of at most so many rows, at equal distances.
    """
    if bins <= 0 or (sample is not None and sample <= 0):
        raise ValueError(f"bins and sample must be positive, got {bins} and {sample}")
    lengths: list[int] = []
    trained = 0
    for i in range(0, len(dataset), 1 if sample is None else -(-len(dataset) // sample)):
        row = _row(dataset, i)
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


def _histogram(lengths: Sequence[int], bins: int) -> list[Bin]:
    """Equal ranges ``[from, to)`` over the lengths, with how many fall into each."""
    low, high = lengths[0], lengths[-1] + 1
    width = max(1, -(-(high - low) // bins))
    counts = [0] * (-(-(high - low) // width))
    for length in lengths:
        counts[(length - low) // width] += 1
    return [{"from": low + i * width, "to": low + (i + 1) * width, "count": count} for i, count in enumerate(counts)]


def stats_as_text(figures: Stats) -> str:
    """The answer of ``stats`` for a terminal, the histogram as bars, and every problem."""
    lengths, histogram = figures["lengths"], figures["lengths"]["histogram"]
    quantiles = ", ".join(f"{name} {lengths[name]:,}" for name in ("min", "p50", "mean", "p90", "p99", "max"))
    lines = [
        f"tokens   {figures['tokens']:,}, {figures['trained_tokens']:,} trained ({figures['share_trained']:.1%})",
        f"lengths  {quantiles}",
    ]
    if "packs" in figures:
        lines.append(f"packs    {figures['packs']:,}, {figures['efficiency']:.1%} full")
    most = max(part["count"] for part in histogram)
    width = len(f"{histogram[-1]['to'] - 1:,}")
    for part in histogram:
        bar = "\u2588" * -(-part["count"] * _WIDEST // most)
        lines.append(f"{part['from']:>{width},} - {part['to'] - 1:>{width},}  {bar} {part['count']:,}")
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in figures["dropped"].items())
    return "\n".join([*lines, f"dropped  {dropped or 'none'}", *figures["problems"]])
