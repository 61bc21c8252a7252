"""Files that would run, hang, or take all memory: each is one line about a file, in little memory."""

from __future__ import annotations

import base64
import bz2
import gzip
import io
import itertools
import json
import lzma
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tt_data import load_dataset
from tt_data.encoding.encode import build
from tt_data.rows import tables
from tt_data.rows.conversations import read_messages
from tt_data.rows.json_files import MAX_LINE
from tt_data.rows.schemas import Settings
from tt_data.rows.sources import Source

ASK = """
import json, resource, sys
from pathlib import Path
import pyarrow, pyarrow.parquet
from tt_data.rows.sources import open_sources
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30), resource.RLIM_INFINITY))
for name in sys.argv[1:]:
    try:
        said = str(sum(1 for source in open_sources(name) for _ in source.rows()))
    except (ValueError, OSError) as error:
        said = str(error)
    print(json.dumps(said), flush=True)
"""


def ask(*files: Path) -> list[str]:
    """What reading each file says, in a process that may take 1 GiB more than at its start."""
    words = [sys.executable, "-c", ASK, *map(str, files)]
    environment = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system"}  # others reserve a GiB that they do not use
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(answer.isprintable() and len(answer) < 2000 for answer in answers)
    return answers


def zstd(data: bytes) -> bytes:
    return bytes(pytest.importorskip("zstandard").ZstdCompressor().compress(data))


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress, "bz2": bz2.compress, "xz": lambda data: lzma.compress(data, preset=0), "zst": zstd,
}  # fmt: skip


def packed(ending: str, size: int, begin: bytes, fill: bytes = b"aaaa") -> bytes:
    """A file that unpacks to ``begin`` and ``size`` bytes more: one part, again and again."""
    pack = PACKERS[ending]
    return pack(begin) + pack(fill * (1 << 18)) * (size >> 20)


@pytest.mark.parametrize("ending", PACKERS)
def test_a_compressed_line_or_document_without_end_is_refused(tmp_path: Path, ending: str) -> None:
    content, many = packed(ending, 1 << 30, b'{"text": "'), packed(ending, 1 << 30, b"[", b"[],\n")
    files = [tmp_path / f"{i}.{kind}.{ending}" for i, kind in enumerate(("jsonl", "json", "csv", "json"))]
    for file in files:
        file.write_bytes(many if file.name.startswith("3") else content)
    lines, document, csv, lists = ask(*files)
    assert lines == f"{files[0]}:1: a line of more than {MAX_LINE:,} bytes; a row is one line, so split it"
    assert "bytes in one JSON document; write a row per line as .jsonl" in document
    assert csv == f"{files[2]}:1: a line of more than {MAX_LINE:,} characters, expected rows"
    assert "bytes in one JSON document; write a row per line as .jsonl" in lists


def test_lines_without_end_deep_values_and_long_numbers_have_a_place(tmp_path: Path) -> None:
    good, deep = b'{"text": "a"}\n', b"[" * 100_000
    contents: dict[str, tuple[bytes, str]] = {
        "long.jsonl": (good + b'{"text": "' + b"a" * (20 << 20), ":2: a line of more than 16,777,216 bytes"),
        "long.csv": (b"text\na\n" + b"b" * (20 << 20), ":3: a line of more than 16,777,216 characters"),
        "field.csv": (b'text\n"' + (b"b" * 1000 + b"\n") * 20_000, ":2: broken csv (field larger than field limit"),
        "deep.jsonl": (good + b'{"text": ' + deep, ":2: broken JSON (lists and objects more than 100 deep in each"),
        "deep.json": (b'[{"text": "a"},\n{"text": ' + deep, ":1: broken JSON (lists and objects more than 100 deep"),
        "less.jsonl": (b'{"text": ' + b"[" * 150 + b"]" * 150 + b"}", ":1: broken JSON (lists and objects more"),
        "digits.jsonl": (good + b'{"text": ' + b"7" * 100_000 + b"}", ":2: broken JSON (Exceeds the limit"),
        "digits.json": (b"[\n" + b'{"text": ' + b"7" * 100_000 + b"}]", ":1: broken JSON (Exceeds the limit"),
        "empty.jsonl": (good + b"\n" * 1_100_000, ":1000002: more than 1,000,000 empty lines"),
        "nul.csv": (b"text\na\0b\n", ":2: NUL characters; this is not csv in UTF-8"),
        "nul.tsv": (b"\0" * 5000, ":1: NUL characters"),
        "nul.json": (b"\0" * 5000, ":1: broken JSON (expected an object or a list) near"),
        "wide.csv": (b",".join(b"c%d" % i for i in range(10**6)) + b"\n", ":1: 1,000,000 columns, expected at"),
        "wide.jsonl": (json.dumps({f"c{i}": i for i in range(9999)}).encode(), ":1: 9,999 columns, expected at most"),
        "wide.json": (json.dumps([{f"c{i}": i for i in range(9999)}]).encode(), ": 9,999 columns, expected at most"),
    }  # fmt: skip
    for name, (content, _) in contents.items():
        (tmp_path / name).write_bytes(content)
    for name, said in zip(contents, ask(*(tmp_path / name for name in contents)), strict=True):
        assert said.startswith(f"{tmp_path / name}{contents[name][1]}"), (name, said)


def test_a_sparse_file_of_any_size_is_refused_at_its_beginning(tmp_path: Path) -> None:
    files = [tmp_path / f"rows.{kind}" for kind in ("jsonl", "json", "csv", "parquet", "arrow", "jsonl.gz", "json.zst")]
    for file in files:
        with file.open("wb") as stream:
            stream.truncate(1 << 40)
    assert all(str(file) in said for file, said in zip(files, ask(*files), strict=True))


def test_a_deep_or_long_value_in_a_cell_is_a_bad_row(chatml: Any, write_jsonl: Any) -> None:
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    deep, digits = "[" * 100_000, '[{"role": "user", "content": ' + "7" * 100_000 + "}]"
    called = [{"function": {"name": "f", "arguments": '{"a": ' + "[" * 500 + "]" * 500 + "}"}}]
    rows = [
        {"messages": deep}, {"messages": digits}, {"messages": [{"role": "x" * 10**6, "content": "a"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": called}]},
        {"messages": [{"role": "user", "content": "a"}], "tools": deep}, {"messages": [{"a" * 10**6: 1}]},
        {"messages": good["messages"] * 501}, {"input_ids": [True, 1, 2]},
        {"messages": {f"k{i}": 1 for i in range(1999)}}, {"y" * 10**6: 1}, {f"k{i}": 1 for i in range(1999)},
    ]  # fmt: skip
    report = load_dataset(write_jsonl([good, *rows]), chatml).report
    assert sum(report["dropped"].values()) == len(rows) == len(report["problems"])
    assert all(len(problem) < 1000 for problem in report["problems"])
    for row in rows[2:]:  # as the first row, by which the columns are judged
        with pytest.raises(ValueError, match=r"rows") as caught:
            load_dataset(write_jsonl([row]), chatml)
        assert len(str(caught.value)) < 2000


def test_rows_in_memory_are_as_deep_as_those_of_files(chatml: Any) -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    ring: list[Any] = []
    ring.append(ring)
    for value in (deep, ring, {"a": ring}):
        with pytest.raises(ValueError, match=r"rows:1: lists and objects more than 100 deep in each other"):
            load_dataset([{"text": "a"}, {"text": value}], chatml)


WRONG: list[dict[str, Any]] = [
    {"columns": 5}, {"columns": {"text": 5}}, {"packing": "yes"}, {"max_seq_len": 5.5}, {"max_seq_len": True},
    {"seed": "a"},
    {"template": "x" * 10**5}, {"schema": "a\x1b[31m"}, {"train_on": None}, {"on_bad_row": "x" * 10**5}, {"limit": "7"},
    {"special_tokens": []}, {"num_workers": 1.0}, {"timeout_s": "1"}, {"max_dropped_share": "0.5"}, {"data_files": 7},
    {"split": ["train"]}, {"revision": 5}, {"streaming": 1}, {"buffer": None}, {"drop_duplicates": "no"},
]  # fmt: skip


@pytest.mark.parametrize("settings", WRONG)
def test_a_setting_of_another_kind_is_named(chatml: Any, settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(ValueError, match=name) as caught:
        load_dataset([{"text": "a"}], chatml, **settings)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_names_and_values_that_command_a_terminal_are_shown_as_escapes(chatml: Any, tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07\u202e\x9b31m"
    file = tmp_path / f"{evil[:3]}.jsonl"
    rows = [{"text": "a", evil: 1}, {"text": "", evil: 1}, {evil: 1}]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    (source,) = load_dataset([file], chatml).names
    report = load_dataset([file], chatml).report
    assert source == f"{tmp_path}/\\x1b]0.jsonl"
    assert all(line.isprintable() for line in (*report["notes"], *report["problems"]))
    for content in (
        "{broken\x1b[31m",
        json.dumps({evil: 1}),
        json.dumps({"messages": [{"role": evil, "content": "a"}]}),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=r"\\x1b\]0.jsonl") as caught:
            load_dataset([file], chatml)
        assert str(caught.value).isprintable()


def test_a_source_of_bad_rows_is_not_read_to_its_end(chatml: Any) -> None:
    endless = Source("endless", lambda: ((i, {"text": ""}) for i in itertools.count(1)), lambda: "")
    with pytest.raises(ValueError, match=r"endless: \d+ of [\d,]+ rows are bad .*, none can be used"):
        build([endless], chatml, Settings())


def test_a_message_list_of_many_kinds_of_nonsense_is_refused_shortly() -> None:
    for turns in ([[]], [{"role": ["user"] * 10**5, "content": 1}], [{"from": {"a": "b" * 10**6}, "value": 1}]):
        with pytest.raises(ValueError, match=".") as caught:
            read_messages(turns)
        assert len(str(caught.value)) < 1000


# ---- parquet and arrow -------------------------------------------------------------------------------------------


def table(**columns: Any) -> Any:
    return pytest.importorskip("pyarrow").table(columns)


def as_parquet(found: Any, **options: Any) -> bytes:
    out = io.BytesIO()
    pytest.importorskip("pyarrow.parquet").write_table(found, out, **options)
    return out.getvalue()


def as_arrow(found: Any, kind: str = "file") -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    out = io.BytesIO()
    new = pyarrow.ipc.new_file if kind == "file" else pyarrow.ipc.new_stream
    with new(out, found.schema) as writer:
        writer.write_table(found)
    return out.getvalue()


def test_columnar_files_that_are_broken_or_too_large_are_named(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    small, rows = table(text=["a", "b"]), table(text=["a" * 50, "b"] * 500)
    wide = pyarrow.table({f"c{i}": [1] for i in range(3000)})
    parquet, arrow = as_parquet(rows), as_arrow(rows)
    offsets = bytearray(as_arrow(small, "stream"))
    place = offsets.rindex(struct.pack("<iii", 0, 1, 2))
    offsets[place + 4 : place + 12] = struct.pack("<ii", 1 << 30, (1 << 30) + 5)  # far behind the text
    contents: dict[str, tuple[bytes, str]] = {
        "cut.parquet": (parquet[:-20], "not a whole parquet file"),
        "magic.parquet": (b"PAR1" + b"x" * 100, "not a whole parquet file"),
        "footer.parquet": (parquet[:-8] + struct.pack("<I", 2**31) + b"PAR1", "not a whole parquet file"),
        "middle.parquet": (parquet[:40] + b"\xff" * 40 + parquet[80:], "not a whole parquet file"),
        "wide.parquet": (as_parquet(wide), "3,000 columns, expected at most 2,000"),
        "cut.arrow": (arrow[: len(arrow) // 2], "not a whole arrow file"),
        "magic.arrow": (b"ARROW1\0\0" + b"x" * 100, "not a whole arrow file"),
        "offsets.arrow": (bytes(offsets), "not a whole arrow file"),
        "wide.arrow": (as_arrow(wide), "3,000 columns, expected at most 2,000"),
    }  # fmt: skip
    for name, (content, _) in contents.items():
        (tmp_path / name).write_bytes(content)
    for name, said in zip(contents, ask(*(tmp_path / name for name in contents)), strict=True):
        assert said.startswith(f"{tmp_path / name}: {contents[name][1]}"), (name, said)


def test_a_row_group_far_larger_than_its_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "bomb.parquet"
    file.write_bytes(as_parquet(table(text=["a" * 50_000] * 9), use_dictionary=False, compression="zstd"))
    assert len(list(tables.read_parquet(file))) == 9
    monkeypatch.setattr(tables, "_MAX_UNPACKED", 1000)
    monkeypatch.setattr(tables, "_MAX_RATIO", 20)
    with pytest.raises(ValueError, match=r"bomb.parquet: rows of [\d,]+ bytes in a file of [\d,]+; write it again"):
        list(tables.read_parquet(file))


def test_an_extension_type_or_pandas_metadata_unpickles_nothing(chatml: Any, tmp_path: Path) -> None:
    """pyarrow before 14.0.1 ran what such a file holds (CVE-2023-47248)."""
    pyarrow = pytest.importorskip("pyarrow")
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return open, (str(ran), "w")

    code = pickle.dumps(Evil())
    marks = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": code}
    field = pyarrow.field("text", pyarrow.string(), metadata=marks)
    pandas = {b"pandas": json.dumps({"index_columns": [], "columns": [{"metadata": base64.b64encode(code).decode()}]})}
    found = pyarrow.table([["a", "b"]], schema=pyarrow.schema([field], metadata=pandas))
    for name, content in (
        ("x.parquet", as_parquet(found)), ("x.arrow", as_arrow(found)), ("y.arrow", as_arrow(found, "stream")),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        assert len(load_dataset(tmp_path / name, chatml)) == 2
    assert not ran.exists()


def test_an_arrow_file_of_one_large_batch_is_read_in_parts(tmp_path: Path) -> None:
    """A batch of a billion nulls takes no bytes on disk."""
    pyarrow = pytest.importorskip("pyarrow")
    batch = pyarrow.RecordBatch.from_arrays([pyarrow.nulls(10**9)], ["text"])
    with pyarrow.OSFile(str(tmp_path / "x.arrow"), "wb") as out, pyarrow.ipc.new_stream(out, batch.schema) as writer:
        writer.write_batch(batch)
    rows = tables.read_arrow(tmp_path / "x.arrow")
    assert [next(rows) for _ in range(3)] == [(i, {"text": None}) for i in (1, 2, 3)]
