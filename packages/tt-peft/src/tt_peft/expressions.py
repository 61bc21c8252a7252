"""Regular expressions out of files, matched in bounded time.

``re`` has no time limit and keeps the interpreter's lock, and some expressions backtrack without end. Those that cannot
(a few repetitions, none inside another) are matched at once. The rest is matched in a process that is stopped after a
while; it runs this file, which therefore imports only the standard library. Matching is that of ``re``, as in PEFT.
"""

import functools
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence

LIMIT_S = 2.0  # of CPU time
WAIT_S = 10.0  # by the clock: a machine may be busy, or know no limit of CPU time
MEMORY = 1 << 30
LONGEST = 100_000  # characters of an expression
STEPS = 10**8  # of backtracking at worst, about two seconds
ERRORS = (re.error, OverflowError, RecursionError)

_ATOM = r"(?:[\w-]|\\[.\-/dDwW]|\.|\[\^?[\w.-]+\])"
_SIMPLE = re.compile(rf"(?:{_ATOM}(?:[*+?]\??)?|\((?:\?[:=!])?|\)\??|[|^$])*", re.ASCII)

Found = dict[int, str]  # place of a name -> the text of the group "tt_layer"; empty if there is none


def matches(expressions: Sequence[str], names: Sequence[str], *, within: str = "{}") -> list[Found]:
    """For each of ``expressions``, which of ``names`` it matches as a whole; ``within`` is what it is put into.

    ValueError for what is not an expression, and for one that takes more than ``LIMIT_S`` seconds.
    """
    return [dict(found) for found in _matches(tuple(expressions), tuple(names), within)]


@functools.lru_cache(maxsize=16)
def _matches(expressions: tuple[str, ...], names: tuple[str, ...], within: str) -> list[Found]:
    more = int(within != "{}")
    long = next((one for one in expressions if len(one) > LONGEST), None)
    if long is not None:
        raise invalid(long, f"it has {len(long):,} characters, expected at most {LONGEST:,}; list the names instead")
    if sum(worst_case(one, names, more) for one in expressions) > STEPS:
        return _found_apart(expressions, names, within)
    found: list[Found] = []
    try:
        found.extend(_found(expressions, names, within))
    except ERRORS as error:
        raise invalid(expressions[len(found)], reason(error)) from None
    return found


def invalid(expression: str, why: str) -> ValueError:
    from tt_peft.shown import plain, shown  # not in the process that runs this file

    return ValueError(f"{shown(expression)} is not a valid regular expression: {plain(why)}")


def reason(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def worst_case(expression: str, names: Sequence[str], more: int) -> float:
    """How many steps matching takes at most, with ``more`` repetitions; infinite if the expression is not plain."""
    if not _SIMPLE.fullmatch(expression):
        return math.inf
    compiling = 20_000 + 100 * len(expression)
    bare = re.sub(r"\\.|\[\^?[\w.-]+\]", "x", expression)
    longest = max(map(len, names), default=0) + 1
    repeats, options = len(re.findall(r"[*+]", bare)) + more, bare.count("?")
    groups, bars = bare.count("(") + 1, bare.count("|")
    if repeats > 8 or options > 16 or groups > 16:
        return math.inf
    ways: float = longest**repeats / math.factorial(repeats) * 2**options * (1 + bars / groups) ** groups
    steps: float = ways * (1 + len(bare) / 10) * len(names)
    return steps + compiling


def _found(expressions: Sequence[str], names: Sequence[str], within: str) -> Iterator[Found]:
    for expression in expressions:
        re.compile(expression)  # by itself first: "a)|(b" is none
        match = re.compile(within.replace("{}", expression)).fullmatch
        found = ((place, match(name)) for place, name in enumerate(names))
        yield {place: one.groupdict().get("tt_layer") or "" for place, one in found if one is not None}


def _found_apart(expressions: Sequence[str], names: Sequence[str], within: str) -> list[Found]:
    """The same in a separate process."""
    from tt_peft.shown import shown

    asked = json.dumps([expressions, names, within]).encode()
    command = [sys.executable, "-I", "-S", "-W", "ignore", __file__]
    try:
        done = subprocess.run(command, input=asked, capture_output=True, timeout=WAIT_S)
        answered, late = done.stdout, done.returncode != 0
    except subprocess.TimeoutExpired as error:
        answered, late = error.stdout or b"", True
    except OSError as error:
        raise ValueError(
            f"{shown(expressions[0])} is too involved to be matched here, and no process can be started for it "
            f"({error.strerror}); list the names instead"
        ) from None
    lines = [json.loads(line) for line in answered.split(b"\n")[:-1]]
    if lines and isinstance(lines[-1], str):
        raise invalid(expressions[len(lines) - 1], lines[-1])
    if late:
        raise ValueError(
            f"{shown(expressions[min(len(lines), len(expressions) - 1)])} takes more than {LIMIT_S:g} s or 1 GiB to "
            f"match {len(names):,} names: it matches the same text again and again; leave out the repetition inside "
            "another repetition, or list the names"
        )
    return [{int(place): text for place, text in line.items()} for line in lines]


def _answer() -> None:
    """The process: it prints a line of JSON for each expression, so that a late one is known. A text is an error."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(LIMIT_S), math.ceil(LIMIT_S)))  # if nobody waits for it
    except (ImportError, ValueError, OSError):
        pass  # not on this system
    expressions, names, within = json.load(sys.stdin)
    try:
        for found in _found(expressions, names, within):
            print(json.dumps(found), flush=True)
    except ERRORS as error:
        print(json.dumps(reason(error)))
    except MemoryError:
        sys.exit(1)


if __name__ == "__main__":
    _answer()
