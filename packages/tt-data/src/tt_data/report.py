"""What became of the rows of a source: the counts, and the lines that every verb prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NotRequired, TypedDict

from tt_data.examples import BadRowError
from tt_data.wording import counted, visible

MAX_PROBLEMS = 20
DUPLICATE = "duplicate"  # a reason for leaving a row out that is not a fault of the row
_FILES = 10  # that are named in a note
SAMPLE_ENDS, SAMPLE_SPREAD = 100, 4_000  # rows of a sample: at either end of a source, and between them


class Share(TypedDict):
    """The rows of one source of a mix, and how many of them an epoch holds."""

    rows: int
    per_epoch: int


class Report(TypedDict):
    """The report of a data set, as plain data for JSON; ``summary_lines`` makes text of it. ``dropped`` counts the rows
    that were left out, by reason; the first ``problems`` name them with their places."""

    schema: str
    rows: int
    dropped: dict[str, int]
    truncated: int
    no_end_token: int
    problems: list[str]
    notes: list[str]
    form: str  # chat, text, or chat+text
    partial: NotRequired[bool]  # whether there are more rows than the ``read`` ones
    read: NotRequired[int]
    sampled_from: NotRequired[int]  # all rows, if the ``read`` ones are not the first but a sample
    files_left_out: NotRequired[list[str]]
    streaming: NotRequired[bool]
    packs: NotRequired[int]
    efficiency: NotRequired[float]  # share of the places of all packs that hold a token
    sources: NotRequired[dict[Any, Share]]  # of a mix


@dataclass
class Tally:
    """Counts what happens to rows, and keeps the first problems with their places.

    Everything in a row that training does not see is either a dropped row (``drop``, by ``BadRowError``) or a note
    (``note``, which counts the rows of each kind). Both end up in ``report`` and in ``summary_lines``.
    """

    seen: int = 0
    partial: bool = False  # whether there are more rows than were seen
    sampled_from: int = 0  # all rows, if those that were seen are a sample
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    no_end: int = 0
    longest_prompt: int = 0
    problems: list[str] = field(default_factory=list)
    notes: dict[str, tuple[int, str]] = field(default_factory=dict)  # kind -> how many rows, where the first one is
    unread: dict[str, tuple[int, str]] = field(default_factory=dict)  # column that is not read -> the same
    hints: dict[str, str] = field(default_factory=dict)  # and how to have it read
    forms: set[str] = field(default_factory=set)  # chat (by the chat template), text

    def drop(self, where: str, bad: BadRowError) -> None:
        """Count a row that is left out."""
        self.dropped[bad.reason] += 1
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(f"{visible(where, 300)}: {bad}")

    def note(self, kind: str, where: str = "") -> None:
        """Count a row that is kept, with something that people should know about it.

        ``kind`` is one sentence that names what is lost and the cure, without values of this row. Equal kinds add up:
        the report says ``<kind> (12 rows, the first at rows.jsonl:3)``. A note without ``where`` (``file:line``) is
        about the template or the source, and is reported once, without a count. Code without a tally (text to ids)
        puts its kinds into ``Encoded.notes``, which are counted here for the row.
        """
        _count(self.notes, kind, bool(where), where)

    def leave(self, column: str, where: str) -> None:
        """Count a row with a value in a column that nothing reads."""
        _count(self.unread, column, 1, where)

    def add(self, other: Tally) -> None:
        """Add the counts of ``other``."""
        self.seen += other.seen
        self.dropped.update(other.dropped)
        self.truncated += other.truncated
        self.no_end += other.no_end
        self.longest_prompt = max(self.longest_prompt, other.longest_prompt)
        self.problems = (self.problems + other.problems)[:MAX_PROBLEMS]
        for ours, theirs in ((self.notes, other.notes), (self.unread, other.unread)):
            for key, (count, where) in theirs.items():
                _count(ours, key, count, where)
        self.hints = {**other.hints, **self.hints}
        self.forms |= other.forms

    def summary(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in self.dropped.most_common())

    def report(self, schema: str, rows: int, *, files_left_out: Sequence[str] = (), streaming: bool = False) -> Report:
        """The counts as plain data, with the files of directories that are not read."""
        notes = [
            *([self._unread_note()] if self.unread else ()),
            *sorted(
                f"{kind} ({counted(count, 'row')}, the first at {where})" if count else kind
                for kind, (count, where) in self.notes.items()
            ),
        ]
        if files_left_out:
            more = f" and {len(files_left_out) - _FILES} more" if len(files_left_out) > _FILES else ""
            files = ", ".join(files_left_out[:_FILES])
            notes.append(f"{counted(len(files_left_out), 'file')} of the directory not read: {files}{more}")
        report: Report = {
            "schema": schema, "rows": rows, "dropped": dict(self.dropped), "truncated": self.truncated,
            "no_end_token": self.no_end, "problems": list(self.problems), "form": "+".join(sorted(self.forms)),
            "notes": notes, "files_left_out": list(files_left_out),
        }  # fmt: skip
        if self.partial:
            report |= {"partial": True, "read": self.seen}
        if self.sampled_from:
            report["sampled_from"] = self.sampled_from
        return {**report, "streaming": True} if streaming else report

    def _unread_note(self) -> str:
        """One line for all columns: data sets have many that nobody needs."""
        named = [
            f"{visible(column, 80)!r} ({counted(count, 'row')}{hint and '; '}{hint})"
            for column, (count, _) in sorted(self.unread.items(), key=lambda item: -item[1][0])
            for hint in (self.hints.get(column, ""),)
        ]
        first = next(iter(self.unread.values()))[1]
        return f"columns that are not read: {', '.join(named)}, the first at {first}"


def _count(counts: dict[str, tuple[int, str]], key: str, count: int, where: str) -> None:
    before, first = counts.get(key, (0, where))
    counts[key] = (before + count, first)


def add_reports(reports: Sequence[Report], schema: str, rows: int) -> Report:
    """One report of several: counts added up, problems one after the other."""
    dropped: Counter[str] = Counter()
    for report in reports:
        dropped.update(report["dropped"])
    total: Report = {
        "schema": schema,
        "rows": rows,
        "dropped": dict(dropped),
        "truncated": sum(report["truncated"] for report in reports),
        "no_end_token": sum(report["no_end_token"] for report in reports),
        "problems": [problem for report in reports for problem in report["problems"]],
        "notes": sorted({note for report in reports for note in report["notes"]}),
        "form": "+".join(sorted({form for report in reports for form in report["form"].split("+") if form})),
    }
    if left_out := [file for report in reports for file in report.get("files_left_out", ())]:
        total["files_left_out"] = left_out
    if any(report.get("partial") for report in reports):
        total["partial"] = True
        total["read"] = sum(report["read"] if report.get("partial") else _seen(report) for report in reports)
    if any("sampled_from" in report for report in reports):
        total["sampled_from"] = sum(report.get("sampled_from", _seen(report)) for report in reports)
    return total


def _seen(report: Report) -> int:
    return report["rows"] + sum(report["dropped"].values())


def refuse_dropped(report: Report, share: float, *, name: str, spare: int = 0) -> None:
    """Raise ValueError if more than ``share`` of the rows are bad. Duplicates are not: nothing is lost with them.
    ``spare``: the number of bad ones that may be an accident of the sample."""
    dropped = {reason: count for reason, count in report["dropped"].items() if reason != DUPLICATE}
    bad = sum(dropped.values())
    seen = _seen(report)
    if bad - spare > share * seen:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
        raise ValueError(
            f"{name}: {bad:,} of {seen:,} rows cannot be used ({reasons}), max_dropped_share allows {share:.0%}: "
            f"{'; '.join(report['problems'][:3])}; fix the rows, or set max_dropped_share=1 to train on the others"
        )


def summary_lines(report: Report, *, problems: int = 3) -> list[str]:
    """A data set's report for people: one line about all rows, then a line for each thing that should be known.

    The first line counts the rows, those that were dropped (by reason) and those that were cut. The others name rows
    that do not teach the model to stop, the notes (what of the rows training does not see), and the first ``problems``
    dropped rows with their places. ``tt data show``, ``tt validate`` and ``tt run`` print the same.
    """
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in report["dropped"].items()) or "none"
    so_far = f" (first {counted(report['read'], 'row')} read)" if report.get("partial") else ""
    so_far = " read so far" if report.get("streaming") and not so_far else so_far
    if "sampled_from" in report:
        so_far = (
            f" (a sample: {report['read']:,} of {counted(report['sampled_from'], 'row')} were read, of each large "
            f"source the first {SAMPLE_ENDS}, the last {SAMPLE_ENDS} and {SAMPLE_SPREAD:,} at even distances)"
        )
    rows = counted(report["rows"], f"{report['schema']} row")
    lines = [f"{rows}{so_far}; dropped: {dropped}; truncated: {report['truncated']:,}"]
    if report.get("no_end_token"):
        endless = counted(report["no_end_token"], "row")
        lines.append(
            f"no end token after the last trained text of {endless}: the model does not learn to stop there; use "
            "a template (template=chatml, ...) that ends its turns with a special token"
        )
    if report.get("form") == "chat+text":
        lines.append("some rows are written by the chat template, others as plain text: the model learns both forms")
    named = report.get("problems", [])[:problems]
    lines += [*report.get("notes", []), *named]
    more = sum(report["dropped"].values()) - len(named)
    if named and more > 0:
        lines.append(f"and {counted(more, 'more row')} dropped; tt data show --stats names the first {MAX_PROBLEMS}")
    return lines
