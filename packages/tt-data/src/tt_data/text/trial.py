"""A tokenizer file tried out in its own process: ``python -m tt_data.text.trial json`` reads it from stdin.

The libraries that read tokenizer files are Rust and C++: on a hostile file they abort, take all memory, or never come
back, and Python cannot stop them. Every file whose shape is not known to be harmless is loaded and used here first,
under limits.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from tt_data.template.chat_template import run
from tt_data.template.limits import limit_cpu, limit_memory
from tt_data.wording import visible

_LOAD_SECONDS, _ENCODE_SECONDS = 3, 3  # of CPU time; and a second for each 10 MB of the file
_WALL_SECONDS = 30  # if the system has no limit on CPU time, or is very busy
_MEMORY = 1 << 30  # and ten times the size of the file
_LONG, _SHORT = 50_000, 3_000
_DIGITS = 15_000  # in a row: public tokenizers group them from the right, in a time that grows with their square
_LOADED = "is loaded"
_FILES = {"json": "tokenizer.json", "sentencepiece": "sentencepiece model"}
_RUNS = "a \n0!_.A\t\u00e9\u65e5"
_MOST_IDS = 20  # for a byte of text


def try_out(kind: str, data: bytes, name: str, letters: str = "") -> None:
    """Raise ValueError if the library cannot load ``data`` (``kind``: json or sentencepiece) and encode and decode with
    it in little time and memory. ``letters``: characters of which it may treat long runs specially."""
    said, status = run("tt_data.text.trial", kind, letters, data=data, seconds=_WALL_SECONDS)
    lines = [json.loads(line) for line in said.decode("utf-8", "replace").splitlines() if line.endswith("}")]
    facts: dict[str, str] = {"stage": "is started"}
    for line in lines:
        facts |= line
    if "done" in facts:
        return
    why = visible(facts.get("error", "")) or ("too much time" if status in (-24, -9) else "too much memory, or a crash")
    if facts["stage"] == _LOADED and "error" in facts:
        raise ValueError(f"{name}: not a {_FILES[kind]} ({why}); download the file again")
    raise ValueError(
        f"{name}: this {_FILES[kind]} fails when it {facts['stage']} ({why}); download it again, or do not trust it"
    )


# ---- in the process ----------------------------------------------------------------------------------------------

Codec = tuple[Callable[[str], Any], Callable[[Any], Any]]


def main(kind: str, letters: str) -> None:
    """Try out the file on stdin; a line of JSON for each stage."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    data = sys.stdin.buffer.read()
    limit_memory(_MEMORY + 10 * len(data))
    _say(stage=_LOADED)
    limit_cpu(_LOAD_SECONDS + len(data) // 10_000_000)
    try:
        encode, decode = _read_json(data) if kind == "json" else _read_sentencepiece(data)
        limit_cpu(_ENCODE_SECONDS)
        for text in probes(letters):
            _say(stage=f"encodes {text[:12]!a}... ({len(text)} characters)")
            ids = encode(text)
            if len(ids) > 1000 + _MOST_IDS * len(text.encode()):
                raise ValueError(f"it makes {len(ids)} ids of it")
            _say(stage=f"decodes {len(ids)} ids")
            decode(ids[:1000])
    except BaseException as error:  # a panic of Rust is not an Exception
        _say(error=" ".join(f"{error}".split())[:200] or "it fails")
        return
    _say(done=True)


def probes(letters: str) -> Iterator[str]:
    """Texts that a tokenizer must survive: all characters, and long runs that a match may fail at the end of."""
    yield "Hello world, 123!\n\tna\u00efve \u65e5\u672c\u8a9e \U0001f986\u200d"
    yield from ("", "\0", " ", "\u0301")
    yield "".join(map(chr, [*range(1, 0xD800), *range(0xE000, 0x1FC00)]))
    for letter in _RUNS:
        count = _DIGITS if letter.isdigit() else _LONG
        yield letter * count + ("!" if letter != "!" else "a")
        yield letter * count + f"\x01{letters}{letter}"  # an expression may ask for one of them later on
    for letter in letters:
        yield letter * _SHORT + "\u2581x\n"
    yield ("aA0 .\n" + letters) * (_LONG // 10)


def _read_json(data: bytes) -> Codec:
    from tokenizers import Tokenizer

    found = Tokenizer.from_str(data.decode())
    found.no_truncation()
    found.no_padding()

    def decode(ids: Any) -> None:
        for skip in (False, True):
            found.decode(ids, skip_special_tokens=skip)

    return lambda text: found.encode(text, add_special_tokens=False).ids, decode


def _read_sentencepiece(data: bytes) -> Codec:
    import sentencepiece

    found = sentencepiece.SentencePieceProcessor(model_proto=data)

    def encode(text: str) -> list[int]:
        ids: list[int] = found.encode(text, out_type="offset_mapping")["ids"]
        return ids

    return encode, found.decode


def _say(**facts: object) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:3])
