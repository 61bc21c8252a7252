"""What to say of rows of no known kind, and of columns that are not read.

A file apart from ``schemas``: only rows that cannot be read need it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tt_data.examples import Columns, Row
from tt_data.messages import is_role
from tt_data.wording import names_of, nearest, visible

Needs = Mapping[str, tuple[tuple[str, ...], ...]]  # a kind of row, and the columns that it needs, in any spelling
_LONGEST = 60  # characters of a name that is compared with others
TREE = ("parent_id", "message_tree_id")  # OpenAssistant's: a row is one message of a tree
# What people call our columns, for suggestions.
_ALSO_CALLED: Mapping[str, Sequence[str]] = {
    "prompt": ("question", "query", "problem", "source", "instruction", "input"),
    "completion": ("answer", "solution", "target", "reply", "output", "generation"),
    "messages": ("chat", "dialog", "dialogue", "turns"),
    "chosen": ("preferred", "accepted", "response_j"),
    "rejected": ("dispreferred", "refused", "response_k"),
}


# Rows that are not read: the columns by which they are recognised, and what to write instead.
_FOREIGN: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("query", "tools", "answers"),
        "these are rows of function calls (xLAM's): write each as messages, a user turn with the query and an "
        "assistant turn with the answers as tool_calls, and the tools as JSON schemas in a column 'tools'",
    ),
    (
        ("input", "preferred_output", "non_preferred_output"),
        "these are OpenAI's preference rows: write each with the columns 'prompt' (the messages of input), 'tools' "
        "(those of input, if there are any), 'chosen' (preferred_output) and 'rejected' (non_preferred_output)",
    ),
)


def no_schema(row: Row, columns: Columns, known: Needs) -> str:
    """Which columns the row has, which kinds of rows are known, and what to do."""
    role = next((name for name in ("role", "from", *TREE) if name in row), None)
    if role is not None and (role in TREE or is_role(row[role])):
        return (
            f"a row is one message here (it has {role!r}), expected a conversation; write each conversation as one row "
            "first (of a tree: from its root to each leaf), or read every message as text with schema=text"
        )
    for names, advice in _FOREIGN:
        if all(name in row for name in names):
            return f"no known schema has the columns [{names_of(row)}]; {advice}"
    wanted = "; ".join(f"{name}: {' + '.join(map('/'.join, needed))}" for name, needed in known.items())
    near = _suggestion(row, columns, known)
    return f"no known schema has the columns [{names_of(row)}], expected one of ({wanted}){near}"


def _suggestion(row: Row, columns: Columns, known: Needs) -> str:
    """``columns={"text": "txt"}`` for the schema that lacks least, other names for our columns before misspelt ones."""
    guesses: list[tuple[int, dict[str, str]]] = []
    for needed in known.values():
        guess: dict[str, str] = {}
        misspelt = 0
        for names in needed:
            if any(columns.get(name, name) in row for name in names):
                continue
            left = [str(name) for name in row if name not in guess.values() and len(str(name)) <= _LONGEST]
            called = next((n for n in left if n.lower() in _ALSO_CALLED.get(names[0], ())), None)
            near = called or next(filter(None, (nearest(name, left, 0.5) for name in names)), None)
            if near is None:
                break
            guess[names[0]] = near
            misspelt += called is None
        else:
            guesses.append((misspelt, guess))
    best = min(guesses, key=lambda found: (found[0], len(found[1])), default=(0, {}))[1]
    return f"; did you mean columns={best}?" if best else ""


def hint_for_unread(column: str, row: Row, columns: Columns, others: Needs, known: Sequence[str]) -> str:
    """How to have a column read that is not: by one of the ``others``, kinds that the row is too, or under another of
    the ``known`` names."""
    for kind, needed in others.items():
        if any(columns.get(name, name) == column for names in needed for name in names):
            return f"schema={kind} reads it"
    near = None if column in known else nearest(column[:_LONGEST], [name for name in known if name not in row], 0.75)
    return f"did you mean columns={{{near!r}: {visible(column, 60)!r}}}?" if near else ""
