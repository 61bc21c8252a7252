"""What a resumed run keeps of its metrics and samples: the same rows as if each line were parsed and written again."""

import errno
import json
import random

import pytest

from tt_train.records.cut import as_lines, rows_until
from tt_train.records.run_files import read_rows
from tt_train.run.dir import RunDir


def metrics(step, rng):
    values = [rng.random(), 1e-4 * rng.random(), rng.random() * 10.0 ** rng.randint(-320, 90), 0.0, None]
    values += [-1.5, rng.getrandbits(40)]
    row = {"step": step, "epoch": None, "loss": rng.choice(values), "lr": rng.choice(values), "tokens": step * 100,
           "rewards/chosen": rng.choice(values), "token_stream": f"{rng.getrandbits(64):016x}"}  # fmt: skip
    return json.dumps(row).encode() + b"\n"


FOREIGN = [  # S: the step
    b"", b"{", b"[]", b"null", b"  ", b'{"step": S}\r', b'{"step":S,"loss":1}', b'{"loss": 1.0, "step": S}',
    b'{"step": 1, "step": S}', b'{"step": S, "step": 1}', b'{"step": S, "loss": 1, "loss": 2}', b'{"step": -S}',
    b'{"step": S.0}', b'{"step": "S"}', b'{"step": true}', b'{"step": 0S}', b'{"step": 10000000000000000S}',
    b'{"step": S, "loss": NaN}', b'{"step": S, "loss": -Infinity}', b'{"step": S, "x": NaN}',
    b'{"step": S, "loss": 1e100}', b'{"step": S, "loss": 9.99999999999999999999e99}', b'{"step": S, "loss": 1e400}',
    b'{"step": S, "loss": 1E5}', b'{"step": S, "loss": 01}', b'{"step": S, "loss": 1.}', b'{"step": S, "loss": .5}',
    b'{"step": S, "loss": 1.50}', b'{"step": S, "loss": -0}', b'{"step": S, "loss": --1}',
    b'{"step": S, "loss": true}', b'{"step": S, "loss": "1.0"}', b'{"step": S, "loss": []}',
    b'{"step": S, "loss": ' + 120 * b"9" + b"}", b'{"step": S, "x": ' + 60 * b"[" + 60 * b"]" + b"}",
    b'{"step": S, "token_stream": "correct-horse"}', b'{"step": S, "token_stream": "0123abcd4567"}',
    b'{"step": S, "correct-horse": 1}', b'{"step": S, "hf_a1a1a1a1a1a1a1a1a1a1a1a1a1a1": 1}',
    b'{"step": S, "password": "opensesame1"}', b'{"step": S, "prompt": "h\xc3\xa9 \\ud800"}',
    b'{"step": S, "prompt": "\xff"}', b'\xef\xbb\xbf{"step": S}', 20 * b"\x00", b'{"step": S, "x": 1}{"step": 1}',
]  # fmt: skip


def foreign(step, rng):
    """A line that no run writes as it is."""
    return rng.choice(FOREIGN).replace(b"S", str(step).encode()) + b"\n"


def damaged(line, rng):
    place, kind = rng.randrange(len(line)), rng.randrange(3)
    if kind == 0:
        return line[:place] + line[place + 1 :]
    return line[:place] + bytes([rng.choice(b'{}[]",:.-+eE0519nN \\\n\xff')]) + line[place + (kind == 1) :]


def random_file(rng):
    lines = []
    for step in range(1, 25):
        line = metrics(step, rng)
        odd = rng.random()
        if odd < 0.3:
            line = foreign(step, rng) if odd < 0.2 else damaged(line, rng)
        lines.append(line)
    whole = b"".join(lines)
    return whole[: -rng.randint(1, 60)] if rng.random() < 0.5 else whole


def parsed_and_written(path, step, problems):
    """What a run kept before: every row is parsed, and written again."""
    rows = (row for row in read_rows(path, problems) if row["step"] <= step)
    return as_lines(rows).encode("utf-8", "backslashreplace")


def same_rows(one, other, tmp_path):
    """Whether two files are the same to a reader: 1.50 and 1.5 are one number."""
    read = []
    for text in (one, other):
        (tmp_path / "written.jsonl").write_bytes(text)
        problems = []
        read.append((repr(list(read_rows(tmp_path / "written.jsonl", problems))), problems))
    return read[0] == read[1] and read[0][1] == []


def test_damaged_files_are_cut_to_the_rows_that_a_reader_finds(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "correct-horse")
    monkeypatch.setenv("OTHER_API_KEY", "0123abcd4567")
    rng, path, with_problems = random.Random(0), tmp_path / "metrics.jsonl", 0
    for _ in range(400):
        path.write_bytes(random_file(rng))
        problems, expected_problems, step = [], [], rng.randint(0, 25)
        expected = parsed_and_written(path, step, expected_problems)
        found = b"".join(rows_until(path, step, problems))
        assert problems == expected_problems, path.read_bytes()
        assert same_rows(found, expected, tmp_path), path.read_bytes()
        assert b"correct-horse" not in found
        assert b"0123abcd4567" not in found
        with_problems += bool(problems)
        at_step = [repr([row for row in read_rows(path, key=key) if row["step"] == step]) for key in (step, None)]
        assert at_step[0] == at_step[1]
    assert with_problems > 200


def test_what_a_run_wrote_is_copied_byte_for_byte_and_not_parsed(tmp_path, monkeypatch):
    rng, path = random.Random(1), tmp_path / "metrics.jsonl"
    lines = [metrics(step, rng) for step in range(1, 10_001)]
    path.write_bytes(b"".join(lines))
    parsed = []
    monkeypatch.setattr("tt_train.records.cut.record_of", parsed.append)
    assert b"".join(rows_until(path, 9_000, [])) == b"".join(lines[:9_000])
    assert parsed == []


def test_a_file_of_very_many_names_is_cut_the_same(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, f"metric_{step}": 1.0}) + "\n" for step in range(1500)))
    assert b"".join(rows_until(path, 1400, [])) == parsed_and_written(path, 1400, [])


def test_a_cut_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    rng, path = random.Random(2), tmp_path / "metrics.jsonl"
    path.write_bytes(before := b"".join(metrics(step, rng) for step in range(1, 9000)))
    run = RunDir(tmp_path)

    def on_a_full_disk(*args):
        yield b"the first piece"
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tt_train.run.dir.rows_until", on_a_full_disk)
    with pytest.raises(OSError, match="No space left"):
        run.keep_until(100)
    run.close()
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]
