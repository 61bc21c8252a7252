"""The token cache: the same rows, made once, and made again where it is broken."""

from __future__ import annotations

import json
import logging
import pickle
import stat
from pathlib import Path
from typing import Any

import pytest

from tt_data import cache as cache_files
from tt_data import load_dataset, row_encoder, show

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
    monkeypatch.setattr(row_encoder, "encode_examples", None)
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

    monkeypatch.setattr("tt_data.cache.write_numbers", full)
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
