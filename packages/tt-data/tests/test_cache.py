"""The token cache: the same rows, made once, and made again where it is broken."""

from __future__ import annotations

import json
import logging
import pickle
import stat
import subprocess
import sys
import time
from array import array
from pathlib import Path
from typing import Any

import pytest

from tt_data import (
    InstructTemplate,
    Schema,
    batches,
    load_dataset,
    load_tokenizer,
    register_instruct_template,
    register_schema,
    show,
)
from tt_data.encoding import encode
from tt_data.examples import Completion
from tt_data.loading import cache as cache_files
from tt_data.rows import schemas
from tt_data.template import prompts
from tt_data.token_rows.dataset import write_numbers

ROWS: list[dict[str, Any]] = [
    {"prompt": [{"role": "user", "content": f"hello {i}"}], "completion": [{"role": "assistant", "content": "the cat"}],
     "label": i % 2 == 0}
    for i in range(9)
]  # fmt: skip


@pytest.fixture
def path(write_jsonl: Any) -> Path:
    found: Path = write_jsonl([*ROWS, {"prompt": "a", "completion": "", "label": True}])
    return found


def test_cached_rows_are_the_same_and_are_not_encoded_again(
    chatml: Any, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    plain = load_dataset(path, chatml, max_seq_len=22)
    made = load_dataset(path, chatml, max_seq_len=22, cache_dir=cache)
    monkeypatch.setattr(encode, "encode_rows", None)
    read = load_dataset(path, chatml, max_seq_len=22, cache_dir=str(cache))
    for dataset in (made, read, pickle.loads(pickle.dumps(read))):
        assert list(dataset) == list(plain)
        assert dataset.report == plain.report
        assert dataset.fingerprint == plain.fingerprint
        assert show(dataset, limit=9) == show(plain, limit=9)
    (entry,) = cache.iterdir()
    assert stat.S_IMODE(entry.stat().st_mode) == 0o755
    with pytest.raises(TypeError):  # other settings are another entry
        load_dataset(path, chatml, max_seq_len=23, cache_dir=cache)


@pytest.mark.parametrize("name", ["0.ids", "0.id_ends", "0.spans", "places", "desirable", "meta.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "bit"])
def test_a_broken_cache_is_made_again(
    chatml: Any, path: Path, tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    plain = load_dataset(path, chatml, cache_dir=cache)
    (entry,) = cache.iterdir()
    if damage == "gone":
        (entry / name).unlink()
    elif damage == "bit":
        content = bytearray((entry / name).read_bytes())
        content[len(content) // 2] ^= 1
        (entry / name).write_bytes(content)
    else:
        (entry / name).write_bytes((entry / name).read_bytes()[:-2])
    with caplog.at_level(logging.WARNING):
        assert list(load_dataset(path, chatml, cache_dir=cache)) == list(plain)
    assert "the token cache is broken" in caplog.text
    caplog.clear()
    assert list(load_dataset(path, chatml, cache_dir=cache)) == list(plain)
    assert not caplog.text


def test_a_cache_that_cannot_be_written_is_a_warning(
    chatml: Any, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tt_data.loading.cache.write_numbers", full)
    with caplog.at_level(logging.WARNING):
        assert len(load_dataset(path, chatml, cache_dir=tmp_path / "cache")) == 9
    assert "the token cache was not written ([Errno 28] No space left on device)" in caplog.text
    assert list((tmp_path / "cache").iterdir()) == []


def test_names_in_a_cache_stay_in_its_folder(chatml: Any, path: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    load_dataset(path, chatml, cache_dir=cache)
    (entry,) = cache.iterdir()
    meta = json.loads((entry / "meta.json").read_text())
    del meta["check"]
    meta["content"]["../../secret"] = "5"
    (entry / "meta.json").write_text(json.dumps({**meta, "check": cache_files._check(meta)}))
    (tmp_path / "secret").write_text("12345")
    assert len(load_dataset(path, chatml, cache_dir=cache)) == 9
    assert (tmp_path / "secret").read_text() == "12345"


def test_a_registered_function_that_changes_makes_the_rows_again(chatml: Any, write_jsonl: Any, tmp_path: Path) -> None:
    ours = dict(schemas.SCHEMAS)
    path = write_jsonl([{"q": "a", "output": "b"}])

    def texts(**options: Any) -> str:
        return "".join(t for t, _ in load_dataset(path, chatml, cache_dir=tmp_path / "cache", **options).rendered(0))

    try:
        for answer, template in (
            ("1: a b", InstructTemplate(("q",), lambda row: f"1: {row['q']} ")),
            ("2: a b", InstructTemplate(("q",), lambda row: f"2: {row['q']} ")),
        ):
            register_instruct_template("quiz", template)
            assert texts(template="quiz") == answer + "<|im_end|>"
        for answer, schema in (
            ("3: a b", Schema("quiz", (("q",),), lambda row, columns: Completion(f"3: {row['q']} ", row["output"]))),
            ("4: a b", Schema("quiz", (("q",),), lambda row, columns: Completion(f"4: {row['q']} ", row["output"]))),
        ):
            register_schema(schema)
            assert texts() == answer + "<|im_end|>"
    finally:
        prompts.INSTRUCT_TEMPLATES.pop("quiz", None)
        schemas.SCHEMAS.clear()
        schemas.SCHEMAS.update(ours)
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_generation_settings_change_neither_rows_nor_their_key(tmp_path: Path, make_model: Any) -> None:
    """Which tokens stop generation may be changed after training: the rows stay as they were."""
    source = "{% for m in messages %}{{ m.content }}<|eot|>{% endfor %}"
    model = make_model(tmp_path / "model", ["<e>", "<|eot|>", "<|x|>"], eos_token="<e>", chat_template=source)
    rows = [{"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "cat <|x|>"}]}]
    before = load_tokenizer(model)
    (model / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    after = load_tokenizer(model)
    assert after.eos_ids != before.eos_ids
    assert after.fingerprint == before.fingerprint
    assert load_dataset(rows, after)[0] == load_dataset(rows, before)[0]


WRITE = """
import sys, time
import tt_data
tokenizer = tt_data.load_tokenizer(sys.argv[1])
while time.time() < float(sys.argv[4]):
    pass
for n in range(20):
    dataset = tt_data.load_dataset(sys.argv[2], tokenizer, cache_dir=sys.argv[3], max_seq_len=20 + n)
    assert len(dataset) == 200, len(dataset)
    assert all(len(row["input_ids"]) == len(row["labels"]) for row in dataset)
"""


def test_processes_that_write_at_once_do_not_disturb_each_other(
    chatml: Any, chatml_dir: Path, write_jsonl: Any, make_chat_rows: Any, tmp_path: Path
) -> None:
    path, cache = write_jsonl(make_chat_rows(200)), tmp_path / "cache"
    arguments = [str(chatml_dir), str(path), str(cache), str(time.time() + 2)]
    command = [sys.executable, "-W", "error", "-c", WRITE, *arguments]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in running:
        _, errors = process.communicate(timeout=100)
        assert (process.returncode, errors) == (0, "")  # no warning either
    assert len(list(cache.iterdir())) == 20
    assert not [entry for entry in cache.iterdir() if entry.name.startswith(".")]


def _rewritten(folder: Path, **changes: Any) -> None:
    """meta.json with other values, and a check that fits them: what an attacker writes."""
    meta = json.loads((folder / "meta.json").read_text())
    meta.pop("check")
    meta |= changes
    (folder / "meta.json").write_text(json.dumps({**meta, "check": cache_files._check(meta)}))


HOSTILE: list[dict[str, Any]] = [
    {"stores": 10**9}, {"stores": "x"}, {"stores": None}, {"names": [7]}, {"names": "a"}, {"names": []}, {"schema": 5},
    {"tally": []}, {"tally": {}}, {"tally": {"dropped": 5}}, {"content": []}, {"content": {"../x": "0"}},
]  # fmt: skip


@pytest.mark.parametrize("changes", HOSTILE)
def test_a_hostile_cache_is_made_again(chatml: Any, tmp_path: Path, changes: dict[str, Any], caplog: Any) -> None:
    rows = [{"text": "a"}, {"text": "b"}]
    load_dataset(rows, chatml, cache_dir=tmp_path)
    (folder,) = tmp_path.iterdir()
    _rewritten(folder, **changes)
    with caplog.at_level(logging.WARNING):
        assert len(load_dataset(rows, chatml, cache_dir=tmp_path)) == 2
    assert "the token cache is broken" in caplog.text
    assert len(load_dataset(rows, chatml, cache_dir=tmp_path)) == 2


@pytest.mark.parametrize(("name", "numbers"), [
    ("0.id_ends", [0, 5, 2]), ("0.id_ends", [0, 1, 10**9]), ("0.span_ends", [0, 2]), ("truncated", [1] * 9),
    ("places", [7, 1, 7, 2]),
])  # fmt: skip
def test_numbers_of_a_cache_that_lead_out_of_its_rows_are_noticed(
    chatml: Any, tmp_path: Path, name: str, numbers: list[int]
) -> None:
    rows = [{"text": "a"}, {"text": "b"}]
    whole = load_dataset(rows, chatml, cache_dir=tmp_path)
    (folder,) = tmp_path.iterdir()
    write_numbers(folder / name, array("b" if name == "truncated" else "q", numbers))
    content = {path.name: cache_files._digest(path) for path in folder.iterdir() if path.name != "meta.json"}
    _rewritten(folder, content=content)
    again = load_dataset(rows, chatml, cache_dir=tmp_path)
    assert [again[i] for i in range(2)] == [whole[i] for i in range(2)]


def test_links_in_a_cache_are_not_followed(chatml: Any, tmp_path: Path) -> None:
    rows, folder = [{"text": "a"}, {"text": "b"}], tmp_path / "cache"
    load_dataset(rows, chatml, cache_dir=folder)
    (cached,) = folder.iterdir()
    other = tmp_path / "other"
    (cached / "meta.json").rename(other)
    (cached / "meta.json").symlink_to(other)
    load_dataset(rows, chatml, cache_dir=folder)
    assert not (cached / "meta.json").is_symlink()
    cached.rename(tmp_path / "moved")
    cached.symlink_to(tmp_path / "moved")
    before = {path.name: path.read_bytes() for path in (tmp_path / "moved").iterdir()}
    assert len(load_dataset(rows, chatml, cache_dir=folder)) == 2
    assert {path.name: path.read_bytes() for path in (tmp_path / "moved").iterdir()} == before


@pytest.mark.parametrize("content", [b"[" * 10**5, b"{}", b'{"counts": [1.5], "tokens": [true]}', b"\xff", b"[1]"])
def test_a_hostile_index_of_packs_is_written_again(chatml: Any, tmp_path: Path, content: bytes) -> None:
    options: dict[str, Any] = {"streaming": True, "packing": True, "max_seq_len": 16, "cache_dir": tmp_path}
    rows = [{"text": f"row {i}"} for i in range(20)]
    want = next(batches(load_dataset(rows, chatml, **options), batch_size=2))["input_ids"].tolist()
    (index,) = tmp_path.iterdir()
    secret = tmp_path / "secret"
    secret.write_bytes(content)
    for make in (lambda: index.write_bytes(content), lambda: index.symlink_to(secret)):
        index.unlink()
        make()
        assert next(batches(load_dataset(rows, chatml, **options), batch_size=2))["input_ids"].tolist() == want
    assert secret.read_bytes() == content
    assert json.loads(index.read_text())["counts"]
