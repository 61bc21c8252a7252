"""What became of a source's rows: counted while they are read, and the lines that every verb prints of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tt_data.examples import BadRowError

MAX_PROBLEMS = 20


@dataclass
class Tally:
    """Counts what happens to rows, and keeps the first problems with their places.

    Whatever a row holds and training does not see is either a dropped row (``drop``, by ``BadRowError``) or a note
    (``note``, which counts the rows of each kind). Both end up in ``report`` and in ``summary_lines``.
    """

    seen: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    no_end: int = 0
    longest_prompt: int = 0
    problems: list[str] = field(default_factory=list)
    notes: dict[str, tuple[int, str]] = field(default_factory=dict)  # kind -> how many rows, where the first one is
    forms: set[str] = field(default_factory=set)  # chat (by the chat template), text

    def drop(self, where: str, bad: BadRowError) -> None:
        """Count a row that is left out."""
        self.dropped[bad.reason] += 1
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(f"{where}: {bad}")

    def keep(self, *, truncated: bool, no_end: bool) -> None:
        """Count what is to be known of a row that is kept."""
        self.truncated += truncated
        self.no_end += no_end

    def note(self, kind: str, where: str = "") -> None:
        """Count a row that is kept although something about it should be known.

        ``kind`` is one sentence that names what is lost and the cure, without values of this row: equal kinds add up,
        and the report says ``<kind> (12 rows, the first at rows.jsonl:3)``. Without ``where`` (``file:line``) the note
        is about the template or the source and is said once, uncounted. Code that has no tally (text to ids) puts its
        kinds into ``Encoded.notes``; they are counted here for the row.
        """
        count, first = self.notes.get(kind, (0, where))
        self.notes[kind] = (count + bool(where), first)

    def add(self, other: Tally) -> None:
        """Count what another one counted."""
        self.seen += other.seen
        self.dropped.update(other.dropped)
        self.truncated += other.truncated
        self.no_end += other.no_end
        self.longest_prompt = max(self.longest_prompt, other.longest_prompt)
        self.problems = (self.problems + other.problems)[:MAX_PROBLEMS]
        for kind, (count, where) in other.notes.items():
            before, first = self.notes.get(kind, (0, where))
            self.notes[kind] = (before + count, first)
        self.forms |= other.forms

    def summary(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in self.dropped.most_common())

    def report(self) -> dict[str, Any]:
        """The counts as plain data, for JSON and for ``summary_lines``."""
        return {
            "dropped": dict(self.dropped),
            "truncated": self.truncated,
            "no_end_token": self.no_end,
            "problems": list(self.problems),
            "notes": sorted(
                f"{kind} ({_rows(count)}, the first at {where})" if count else kind
                for kind, (count, where) in self.notes.items()
            ),
            "form": "+".join(sorted(self.forms)),
        }


def add_reports(reports: Sequence[Mapping[str, Any]], schema: str, rows: int) -> dict[str, Any]:
    """One report of several: counts added up, problems one after the other."""
    dropped: Counter[str] = Counter()
    for report in reports:
        dropped.update(report["dropped"])
    return {
        "schema": schema,
        "rows": rows,
        "dropped": dict(dropped),
        "truncated": sum(report["truncated"] for report in reports),
        "no_end_token": sum(report["no_end_token"] for report in reports),
        "problems": [problem for report in reports for problem in report["problems"]],
        "notes": sorted({note for report in reports for note in report["notes"]}),
        "form": "+".join(sorted({form for report in reports for form in report["form"].split("+") if form})),
    }


def summary_lines(report: Mapping[str, Any], *, problems: int = 3) -> list[str]:
    """A data set's report for people: one line about all rows, then a line for each thing that should be known.

    The first line counts the rows, those that were dropped (by reason) and those that were cut. The others name rows
    that do not teach the model to stop, the notes (what of the rows training does not see), and the first ``problems``
    dropped rows with their places. ``tt data show``, ``tt validate`` and ``tt run`` print the same.
    """
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in report["dropped"].items()) or "none"
    so_far = " read so far" if report.get("streaming") else ""
    lines = [
        f"{report['rows']:,} {report['schema']} rows{so_far}; dropped: {dropped}; truncated: {report['truncated']:,}"
    ]
    if report.get("no_end_token"):
        lines.append(
            f"no end token behind the last trained text of {_rows(report['no_end_token'])}: the model does not learn "
            "to stop there; use a template (template=chatml, ...) that ends its turns with a special token"
        )
    named = report.get("problems", [])[:problems]
    lines += [*report.get("notes", []), *named]
    more = sum(report["dropped"].values()) - len(named)
    if named and more > 0:
        lines.append(f"and {_rows(more)} more dropped; tt data show --stats names the first {MAX_PROBLEMS}")
    return lines


def _rows(count: int) -> str:
    return f"{count:,} row{'' if count == 1 else 's'}"
