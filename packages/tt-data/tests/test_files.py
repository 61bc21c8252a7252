"""The rule for files: regular, inside their folder, of a sensible size; written whole, and never through a link."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tt_data.files import read_bytes, read_json, read_object, read_text, regular, write_bytes

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 17209920\n"
PAGES = [b"<!DOCTYPE html>\n<html>", b"\n <HTML lang=en>", b"\xef\xbb\xbf<html>", b"<?xml version='1.0'?>\n<Error>"]


def test_a_link_out_of_the_folder_is_refused_and_named(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    secret = tmp_path / "home" / "secret"
    secret.write_text("KEEP")
    model = tmp_path / "model"
    model.mkdir()
    (model / "a.json").symlink_to(secret)
    (model / "b.json").symlink_to("a.json")  # a link to a link
    (model / "sub").symlink_to("../home")
    for path, root in [(model / "a.json", None), (model / "b.json", None), (model / "sub" / "secret", model)]:
        with pytest.raises(
            ValueError, match="a link out of its folder, to .*secret; copy what it leads to into the folder"
        ):
            read_text(path, root, limit=100)


def test_links_inside_a_folder_and_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "0123"
    (snapshot / "original").mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "abc").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    (snapshot / "original" / "x.json").symlink_to("../../../blobs/abc")
    (snapshot / "inside.json").symlink_to("original/x.json")
    (tmp_path / "base").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "base"):
        assert read_json(folder / "config.json") == {}
        assert read_json(folder / "original" / "x.json", folder) == {}
        assert read_json(folder / "inside.json") == {}


def test_the_blobs_of_a_cache_may_be_no_link_and_only_a_snapshot_has_any(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "secret").write_text("KEEP")
    snapshot = tmp_path / "repository" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "repository" / "blobs").symlink_to("../home")
    (snapshot / "config.json").symlink_to("../../blobs/secret")
    (tmp_path / "plain").mkdir()
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "x").write_text("{}")
    (tmp_path / "plain" / "config.json").symlink_to("../blobs/x")
    for folder in (snapshot, tmp_path / "plain"):
        with pytest.raises(ValueError, match="a link out of its folder"):
            regular(folder / "config.json")


def test_a_pipe_a_device_and_a_folder_are_refused_before_they_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("pipe")
    for name, words in [("pipe", "a pipe"), ("folder", "a folder"), ("link", "a pipe")]:
        with pytest.raises(ValueError, match=f"{name}: {words}, expected a regular file"):
            read_bytes(tmp_path / name, limit=100)
    with pytest.raises(ValueError, match="/dev/zero: a device"):
        read_bytes(Path("/dev/zero"), limit=100)


def test_a_file_that_is_not_there_and_a_link_that_leads_nowhere_or_round_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="x.json: no such file"):
        read_json(tmp_path / "x.json")
    assert read_object(tmp_path / "x.json") == {}
    (tmp_path / "x.json").symlink_to("y.json")
    with pytest.raises(FileNotFoundError, match=r"x.json: a link to .*y.json, which does not exist"):
        read_object(tmp_path / "x.json")
    (tmp_path / "y.json").symlink_to("x.json")
    with pytest.raises((ValueError, OSError)):
        read_object(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (POINTER, r"a git-lfs pointer \(oid 01234567..., 17,209,920 bytes\), not the file; run: git lfs pull"),
        *((page, "a web page, not the file; download the file again") for page in PAGES),
        (b"", "0 bytes without any content"),
        (bytes(50), "50 bytes without any content"),
        (b'{"a": 1', "x.json:1:8: broken JSON .* the file ends here.*it was cut off"),
        (b'{"a":\n tru}', r"x.json:2:2: broken JSON .*near '\{\"a\":"),
        (b'{"a": 1, "a": 2}', "the key 'a' is given twice, with different values"),
        (b"[" * 100_000, "nested too deeply"),
        (b"9" * 10_000, "4300 digits"),
        ("{}".encode("utf-16"), "UTF-16 text; save it as UTF-8"),
        (b"\x1f\x8b\x08\x00", "compressed by gzip"),
        (b'{"a": "\xff"}', "not UTF-8 text .byte 7, 0xff, on line 1"),
        (b" " * 200, "200 bytes, expected at most 100"),
    ],
)
def test_what_is_no_json_is_named_with_the_cure(tmp_path: Path, data: bytes, words: str) -> None:
    file = tmp_path / "x.json"
    file.write_bytes(data)
    limit = 100 if data == b" " * 200 else 1 << 20
    with pytest.raises(ValueError, match=words) as error:
        read_json(file, limit=limit)
    assert str(error.value).startswith(str(file))
    assert str(error.value).isprintable()


def test_a_byte_order_mark_and_a_key_repeated_with_one_value_are_read(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1, "a": 1}')
    assert read_object(file) == {"a": 1}
    file.write_bytes(b"[1]")
    with pytest.raises(ValueError, match="expected a JSON object with keys, found a list"):
        read_object(file)


def test_writing_replaces_a_link_and_leaves_nothing_behind(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("KEEP")
    out = tmp_path / "out"
    out.mkdir()
    (out / "x").symlink_to(secret)
    write_bytes(out / "x", b"new")
    assert secret.read_text() == "KEEP"
    assert not (out / "x").is_symlink()
    assert (out / "x").read_bytes() == b"new"
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((out / "x").stat().st_mode) == 0o666 & ~mask
    (out / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_bytes(out / "folder", b"new")
    assert sorted(p.name for p in out.iterdir()) == ["folder", "x"]
