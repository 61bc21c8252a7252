"""The one rule by which files of a model folder or run directory are opened, and written."""

import os
import socket
import stat
import subprocess
import sys

import pytest

from tt_ckpt import files
from tt_ckpt.shown import plain, quoted

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 4900000000\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "secret").write_text("KEEP")
    return tmp_path / "model"


# ---- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["../secret", "/etc/passwd", "../model/../secret", "loop", "nothing"])
def test_a_link_that_leaves_its_folder_is_not_read(folder, target):
    (folder / "loop").symlink_to("loop")
    (folder / "x").symlink_to(target)
    for read in (files.regular, files.read_bytes, files.read_text, files.read_json):
        with pytest.raises(ValueError, match=r"model/x: refused: a link .* copy the file"):
            read(folder / "x")
    assert files.read_text(folder.parent / "secret") == "KEEP"


def test_a_link_by_way_of_a_folder_is_not_read(folder):
    (folder.parent / "home").mkdir()
    (folder.parent / "home" / "config.json").write_text("{}")
    (folder / "sub").symlink_to("../home")
    with pytest.raises(ValueError, match="a link that leaves"):
        files.read_json(folder / "sub" / "config.json", folder)


def test_links_inside_hard_links_and_a_linked_folder_are_read(folder):
    (folder / "a").write_text("{}")
    (folder / "b").symlink_to("a")
    os.link(folder / "a", folder / "c")
    (folder.parent / "named").symlink_to("model")
    for name in "abc":
        assert files.read_json(folder.parent / "named" / name) == {}


@pytest.mark.parametrize("shared", [False, True])
def test_the_links_of_the_hub_cache_are_read_and_no_others(tmp_path, shared):
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / "abc"
    blobs = tmp_path / "hub" / "blobs" / "0f" if shared else snapshot.parents[1] / "blobs"
    for path in (snapshot / "original", blobs, tmp_path / "hub" / "models--c--d" / "blobs"):
        path.mkdir(parents=True)
    (blobs / "123").write_text("{}")
    (tmp_path / "hub" / "models--c--d" / "blobs" / "123").write_text("{}")
    (snapshot / "x").symlink_to(os.path.relpath(blobs / "123", snapshot))
    (snapshot / "original" / "x").symlink_to(os.path.relpath(blobs / "123", snapshot / "original"))
    (snapshot / "y").symlink_to("../../../models--c--d/blobs/123")
    assert files.read_json(snapshot / "x") == files.read_json(snapshot / "original" / "x") == {}
    with pytest.raises(ValueError, match="a link that leaves"):
        files.read_json(snapshot / "y")
    plain_folder = tmp_path / "snapshots" / "abc"  # looks like one, but is of no repository
    plain_folder.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "z").write_text("{}")
    (plain_folder / "z").symlink_to("../../blobs/z")
    with pytest.raises(ValueError, match="a link that leaves"):
        files.read_json(plain_folder / "z")


def test_pipes_sockets_devices_and_folders_are_refused_before_they_are_opened(folder):
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        here = os.open(".", os.O_RDONLY)
        os.chdir(folder)
        server.bind("socket")
        os.chdir(here)
        os.close(here)
        for name, what in (("pipe", "a pipe"), ("folder", "a folder"), ("socket", "a socket")):
            with pytest.raises(ValueError, match=f"{name}: {what}, not a regular file"):
                files.read_bytes(folder / name)
    with pytest.raises(ValueError, match="null: a device"):
        files.read_bytes("/dev/null")
    with pytest.raises(FileNotFoundError, match="x: no such file"):
        files.read_bytes(folder / "x")


@pytest.mark.parametrize("read", [files.read_bytes, files.read_text, files.read_json, files.read_start])
def test_what_is_in_the_place_of_a_file_is_named_with_its_cure(folder, read):
    (folder / "x").write_bytes(POINTER)
    with pytest.raises(ValueError, match=r"x: a git-lfs pointer \(oid sha256:abababababab.*, 4.9 GB\).*git lfs pull"):
        read(folder / "x")
    for page in (b"<!DOCTYPE html><html>", b"\n <HTML lang=en>", b"\xef\xbb\xbf<!doctype html>", b"<?xml?><Error>",
                 b"<!-- a -->\n<!-- b --><!DOCTYPE html>", b"<head>"):  # fmt: skip
        (folder / "x").write_bytes(page)
        with pytest.raises(ValueError, match="x: a web page, not the file itself; .*download it again"):
            read(folder / "x")
    (folder / "x").write_bytes(b"Entry not found")
    with pytest.raises(ValueError, match="the answer of a web server"):
        read(folder / "x")


def test_a_license_may_be_a_web_page_and_no_pointer(folder):
    (folder / "LICENSE.html").write_bytes(b"<!DOCTYPE html><html>")
    files.copy(folder / "LICENSE.html", folder / "copy")
    assert (folder / "copy").read_bytes() == (folder / "LICENSE.html").read_bytes()
    (folder / "LICENSE").write_bytes(POINTER)
    with pytest.raises(ValueError, match="git lfs pull"):
        files.copy(folder / "LICENSE", folder / "other")


def test_a_link_out_of_a_folder_is_answered_with_the_command_that_copies_it_without_links(folder):
    (folder / "my model").mkdir()
    (folder / "shard").write_bytes(b"data")
    (folder / "my model" / "shard").symlink_to(folder / "shard")
    with pytest.raises(ValueError, match="copy the file there .*cp -RL '.*/my model' NEW"):
        files.regular(folder / "my model" / "shard")


def test_a_pointer_with_a_hostile_oid_says_nothing_of_it(folder):
    (folder / "x").write_bytes(POINTER.replace(b"abab", b"\x1b]0;", 1).replace(b"size 49", b"size \x1b["))
    with pytest.raises(ValueError, match=r"a git-lfs pointer \(oid unknown, of unknown size\)"):
        files.read_bytes(folder / "x")


def test_an_interrupted_download_is_named(folder):
    (folder / "config.json.incomplete").write_text("{")
    with pytest.raises(FileNotFoundError, match=r"only config\.json\.incomplete of an interrupted download"):
        files.read_json(folder / "config.json")


def test_a_file_beyond_its_limit_is_not_read(folder):
    with (folder / "x").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match=r"x: 1\.1 TB, more than 32\.0 MB"):
        files.read_json(folder / "x")
    with pytest.raises(ValueError, match="too large to be copied"):
        files.copy(folder / "x", folder / "y")
    assert not (folder / "y").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "x: 0 bytes"),
        (b" \n", "x: only white space"),
        (b'{"a": 1,\n "b" 2}', "x:2:6: not valid JSON"),
        (b"[" * 100_000, "x: not valid JSON: nested too deeply"),
        (b'{"a": ' * 100_000, "x: not valid JSON: nested too deeply"),
        (b"[" + b"9" * 5000 + b"]", "a whole number of thousands of digits"),
        (b'{"a": 1, "a": 2}', "'a' is given twice, with different values"),
        (b'{"\\u001b[31m": 1, "\\u001b[31m": 2}', r"'\\x1b\[31m' is given twice"),
        (b'["\\ud800"]', "half of a surrogate pair"),
        (b'{"a": "\xff"}', "x:1: not UTF-8"),
        (b"\xff\xfe{\x00}\x00", "x:1: not UTF-8"),
    ],
)
def test_invalid_json_is_reported_with_its_place(folder, data, message):
    (folder / "x").write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        files.read_json(folder / "x")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_json_as_others_write_it_is_read(folder):
    (folder / "x").write_bytes(b'\xef\xbb\xbf{"a": 1, "a": 1, "b": "\\ud83d\\ude00", "c": Infinity}')
    assert files.read_json(folder / "x") == {"a": 1, "b": "\U0001f600", "c": float("inf")}


# ---- writing ---------------------------------------------------------------------------------------------------------


def test_a_link_is_replaced_and_not_written_through(folder):
    (folder / "x").symlink_to("../secret")
    files.replace_text(folder / "x", "new")
    assert (folder / "x").read_text() == "new"
    assert not (folder / "x").is_symlink()
    assert (folder.parent / "secret").read_text() == "KEEP"
    assert [path.name for path in folder.iterdir()] == ["x"]


def test_a_replacement_that_fails_leaves_what_was_there(folder):
    files.replace_text(folder / "x", "old")
    with pytest.raises(ValueError, match="closed"), files.replacing(folder / "x") as file:
        file.close()
    assert (folder / "x").read_text() == "old"
    assert [path.name for path in folder.iterdir()] == ["x"]
    with pytest.raises(IsADirectoryError, match="a folder is there"):
        files.replace_text(folder, "x")


def test_files_have_the_modes_of_the_umask(folder):
    old = os.umask(0o027)
    try:
        files.replace_text(folder / "a", "")
        files.append_text(folder / "b", "")
        files.copy(folder / "a", folder / "c")
    finally:
        os.umask(old)
    assert {stat.S_IMODE((folder / name).stat().st_mode) for name in "abc"} == {0o640}


def test_nothing_is_appended_through_a_link_or_to_a_pipe(folder):
    (folder / "link").symlink_to("../secret")
    (folder / "new").symlink_to("../created")
    os.mkfifo(folder / "pipe")
    for name in ("link", "new", "pipe"):
        with pytest.raises(ValueError, match="a link or special file, which is not written to"):
            files.append_text(folder / name, "x")
    assert (folder.parent / "secret").read_text() == "KEEP"
    assert not (folder.parent / "created").exists()
    files.append_text(folder / "log", "a\n")
    files.append_text(folder / "log", "b\n")
    assert (folder / "log").read_text() == "a\nb\n"


def test_with_a_root_nothing_is_written_by_way_of_a_folder_that_is_a_link(folder):
    (folder.parent / "home").mkdir()
    (folder / "sub").symlink_to("../home")
    for write in (files.replace_text, files.append_text):
        with pytest.raises(ValueError, match="a link that leaves"):
            write(folder / "sub" / "x", "text", folder)
    assert list((folder.parent / "home").iterdir()) == []


def test_a_folder_is_copied_without_what_its_links_lead_to(folder):
    (folder / "sub" / "deep").mkdir(parents=True)
    (folder / "sub" / "a").write_text("a")
    (folder / "sub" / "deep" / "b").write_text("b")
    files.copy(folder / "sub", folder / "copy")
    assert (folder / "copy" / "deep" / "b").read_text() == "b"
    (folder / "sub" / "deep" / "c").symlink_to("../../../secret")
    with pytest.raises(ValueError, match="a link that leaves"):
        files.copy(folder / "sub", folder / "copy2")
    (folder / "linked").symlink_to("..")
    with pytest.raises(ValueError, match="a link that leaves"):
        files.copy(folder / "linked", folder / "copy3")
    (folder / "sub" / "deep" / "c").unlink()
    (folder / "sub" / "deep" / "c").symlink_to(".")
    with pytest.raises(ValueError, match="a link to a folder"):
        files.copy(folder / "sub", folder / "copy4")


# ---- what is shown ---------------------------------------------------------------------------------------------------


def test_what_a_file_says_is_shown_short_and_printable():
    deep, odd = [[[[0] * 9] * 9] * 9] * 9, {"\x1b" * 99: "\x1b" * 99}
    for value in ("x" * 70000, "\x1b]0;x\x07\n", "\u202e", "\ud800", deep, odd, 10**5000, [10**5000]):
        for show in (quoted, plain):
            assert show(value).isprintable()
            assert len(show(value)) <= 200


def test_a_plain_name_is_shown_as_it_is():
    assert plain("model.layers.0") == "model.layers.0"
    assert plain("a\nb") == "'a\\nb'"


def test_the_rule_for_files_comes_without_torch_and_every_name_is_there():
    code = (
        "import sys, tt_ckpt; from tt_ckpt import files\n"
        "assert 'torch' not in sys.modules\n"
        "import tt_ckpt.hub.upload, tt_ckpt.formats.convert, tt_ckpt.redaction\n"
        "assert all(callable(getattr(tt_ckpt, name)) for name in tt_ckpt.__all__)\n"
        "assert tt_ckpt.commit.sha256_of and not hasattr(tt_ckpt, 'nothing')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
