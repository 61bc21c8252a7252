"""The driver of the fuzz tests: a parser, what it is fed, for how long.

A check gets 100 hostile inputs, or as many as fit into ``TT_FUZZ_SECONDS``, in a process that may take 1 GiB more than
at its start. It must return, or raise an error of ours: one line of printable text. The input that broke it is printed.
"""

import copy
import itertools
import json
import mmap
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

SECONDS = float(os.environ.get("TT_FUZZ_SECONDS", "1"))
MOST = None if "TT_FUZZ_SECONDS" in os.environ else 100  # inputs: without it the same ones everywhere
MEMORY = 1 << 30
LIMIT_S = 5  # of CPU time, for one input
WAIT_S = 60  # by the clock: another process or a pipe that never answers
PLAIN = (
    ValueError,
    OSError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)
OURS = ("tt_models", "tt_peft", "tt_data", "tt_ckpt", "tt_train", "tt_cli")
KEEP = 1 << 16  # bytes of an input that are kept for the report


# ---- what is fed ------------------------------------------------------------------------------------------------

WORDS = [
    b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"{", b"}", b"[", b"]", b'"', b"'", b":", b",", b"\n", b"\r\n",
    b"\x1b]0;x\x07", b"null", b"true", b"NaN", b"Infinity", b"-1", b"0", b"1e999", b"9" * 30, b"1.5", b"../x",
    b"/etc/passwd", b"\xed\xa0\x80", b"[" * 3000, b'{"a":' * 3000, b"\\ud800", "\u202e\u0130".encode(), b"version https://git-lfs.github.com/spec/v1\n",
    b"<!DOCTYPE html>",
]  # fmt: skip
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, -0.0, 1e308, float("inf"), float("nan"), "", "x" * 70000, "..",
    "../x", "/", "a/b", "a\0b", "\ud800", "\x1b[31m", [], {}, [[]], [None], {"": {}}, [0] * 300, "{{ 1 }}",
    "hf_" + "A" * 24,
]  # fmt: skip


def mutated(*seeds: bytes) -> st.SearchStrategy[bytes]:
    """Bytes: a seed with pieces cut, doubled, overwritten, flipped or replaced; now and then arbitrary bytes."""

    def build(choice: random.Random) -> bytes:
        if choice.random() < 0.02:
            return choice.randbytes(choice.randrange(64))
        data = bytearray(choice.choice(seeds))
        for _ in range(choice.choice((1, 1, 2, 3, 8))):
            start = choice.randrange(len(data) + 1)
            stop = min(len(data), start + choice.choice((0, 1, 2, 8, 64, len(data))))
            match choice.randrange(5):
                case 0:
                    del data[start:stop]
                case 1:
                    data[start:start] = data[start:stop]
                case 2:
                    data[start:stop] = choice.choice(WORDS)
                case 3 if start < len(data):
                    data[start] ^= 1 << choice.randrange(8)
                case _:
                    data[start:stop] = choice.randbytes(min(8, stop - start))
        return bytes(data)

    return st.integers(0, 2**62).map(lambda seed: build(random.Random(seed)))


def mutated_json(*seeds: Any) -> st.SearchStrategy[Any]:
    """Values of JSON: a seed with places removed, renamed, moved, or replaced by odd values."""

    def build(choice: random.Random) -> Any:
        value = json.loads(json.dumps(choice.choice(seeds)))
        for _ in range(choice.choice((1, 1, 1, 2, 3))):
            value = _changed(value, choice)
        return value

    return st.integers(0, 2**62).map(lambda seed: build(random.Random(seed)))


def _changed(value: Any, choice: random.Random) -> Any:
    if not isinstance(value, dict | list) or not value or choice.random() < 0.1:
        return copy.deepcopy(choice.choice(ODD))
    places = list(value) if isinstance(value, dict) else range(len(value))
    place = choice.choice(places)
    match choice.randrange(6):
        case 0:
            del value[place]
        case 1 if isinstance(value, dict):
            value[choice.choice(["", "x", str(place) + "s", str(place).upper(), "../x"])] = value.pop(place)
        case 1:
            value.insert(place, value[place])
        case 2:
            value[place] = copy.deepcopy(value[choice.choice(places)])
        case _:
            value[place] = _changed(value[place], choice)
    return value


# ---- how it runs ------------------------------------------------------------------------------------------------


class Fuzz:
    """``fuzz(check, strategy)`` calls ``check`` with every value, until the time is over."""

    mutated = staticmethod(mutated)
    mutated_json = staticmethod(mutated_json)

    def __call__(
        self, check: Callable[[Any], object], inputs: st.SearchStrategy[Any], seconds: float = SECONDS
    ) -> None:
        shown = mmap.mmap(-1, KEEP)  # the input of this moment: it outlives a process that is killed
        reading, writing = os.pipe()
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            os.close(reading)
            _child(check, inputs, seconds, shown, writing)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            found = pipe.read().decode("utf-8", "replace")
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        count, _, last = shown[:].rstrip(b"\0").partition(b"\n")
        if status or found:
            what = found or f"the process ended with status {status}"
            pytest.fail(f"{what}\ninput {count.decode()}: {last.decode('utf-8', 'replace')[:3000]}", pytrace=False)
        assert int(count) > 0, "nothing was tried"
        print(f"{int(count)} inputs")


@pytest.fixture
def fuzz() -> Fuzz:
    return Fuzz()


def _child(
    check: Callable[[Any], object], inputs: st.SearchStrategy[Any], seconds: float, shown: mmap.mmap, pipe: int
) -> None:
    try:
        resource.setrlimit(resource.RLIMIT_AS, (_size() + MEMORY, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for number in (signal.SIGALRM, signal.SIGPROF):
            signal.signal(number, _late)
        until, count = time.monotonic() + seconds, 0
        for seed in itertools.count():
            for value in _values(inputs, seed):
                count += 1
                note = f"{count}\n{value!r}".encode("utf-8", "backslashreplace")[:KEEP]
                shown[:] = note.ljust(KEEP, b"\0")
                _one(check, value)
                if time.monotonic() > until or count == MOST:
                    os._exit(0)
    except BaseException as error:
        lines = [line[:1000] for line in traceback.format_exception(error)[-6:]]
        os.write(pipe, "\n".join(lines).encode("utf-8", "backslashreplace"))
        os._exit(0)
    finally:
        os._exit(1)


def _one(check: Callable[[Any], object], value: Any) -> None:
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    signal.alarm(WAIT_S)
    try:
        check(value)
    except Exception as error:
        if type(error).__module__.split(".")[0] not in OURS and type(error) not in PLAIN:
            raise
        for text in getattr(error, "problems", None) or [str(error)]:  # a ConfigError has a line for each mistake
            if not text or "\n" in text or not text.isprintable() or len(text) > 2000:
                raise AssertionError(f"not one line of printable text: {text[:3000]!r}") from error
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)


class Late(BaseException):
    """Not an Exception: no parser may catch it."""


def _late(number: int, _: object) -> None:
    spent = f"{LIMIT_S} s of CPU time" if number == signal.SIGPROF else f"{WAIT_S} s"
    raise Late(f"one input took more than {spent}")


def _values(inputs: st.SearchStrategy[Any], seed: int, count: int = 50) -> Sequence[Any]:
    found: list[Any] = []

    @hypothesis.seed(seed)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def collect(value: Any) -> None:
        found.append(value)

    collect()
    return found


def _size() -> int:
    """Bytes of this process's address space."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
