"""What a source may be called, and which files a name or a folder leads to."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tt_data import load_dataset
from tt_data.rows.sources import open_sources

GOOD = '{"text": "good"}\n'
BUILDERS = (
    "text json csv parquet arrow xml imagefolder audiofolder webdataset pandas hdf5 lance eval conll pdffolder TEXT "
    "Json text:main"
).split()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with things that nobody named."""
    folder = tmp_path / "project"
    (folder / "notes").mkdir(parents=True)
    (folder / "rows.jsonl").write_text(GOOD)
    (folder / "diary.txt").write_text("my private diary\n")
    (tmp_path / "secret.jsonl").write_text('{"text": "secret"}\n')
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_bare_word_is_refused_and_reads_nothing(chatml: Any, here: Path, name: str, streaming: bool) -> None:
    for source in (name, [name], {name: 1}):
        with pytest.raises(FileNotFoundError, match=rf"^{name}: no such file or folder \(looked in ") as caught:
            load_dataset(source, chatml, streaming=streaming)
        assert "data sets of the hub are called org/name" in str(caught.value)
        assert "diary" not in str(caught.value)


@pytest.mark.parametrize(("name", "near"), [
    ("rows", "rows.jsonl"), ("alpca", "alpaca"), ("note", "notes"), ("Samsum", "samsum"), ("ROWS", "rows.jsonl"),
])  # fmt: skip
def test_the_nearest_name_is_suggested(chatml: Any, here: Path, name: str, near: str) -> None:
    with pytest.raises(FileNotFoundError, match=rf"; did you mean {near}\?$"):
        load_dataset(name, chatml)


NAMES = [
    ("", "'' is not a name of a file"), (" ", "is not a name of a file"), ("a\0.jsonl", r"'a\x00.jsonl' is not a"),
    ("rows\n.jsonl", r"'rows\n.jsonl' is not a name"), ("\x1b[31mrows", r"'\x1b[31mrows' is not a name"),
    ("https://x.org/a.jsonl", "an address, expected a file, a folder or a data set of the hub; download it, and give"),
    ("file:///etc/passwd", "an address, expected a file, a folder or a data set of the hub; give the path: /etc"),
    ("hf://datasets/org/name@main/a.jsonl", "give its id: org/name"), ("s3://b/a.jsonl", "download it"),
    ("a/b/c", "no such file (looked in"), ("../x/y", "no such file (looked in"), ("/nowhere", "no such file"),
    ("C:\\data\\rows.jsonl", "a path is written with / here"), ("~not-a-user/r", "there is no such home folder"),
    ("*.parquet", "no file with this name"), ("**x/rows", "not a pattern of files|no file with this name"),
    ("x" * 5000, "is not a name of a file"), ("x" * 400, "no such file"),
    ("org/name/extra", "no such file"), ("./text", "no such file"), ("-", "no such file"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text"), NAMES)
def test_what_is_no_name_is_refused_in_one_line(chatml: Any, here: Path, name: str, text: str) -> None:
    for streaming in (False, True):
        with pytest.raises((ValueError, FileNotFoundError), match="|".join(map(re.escape, text.split("|")))) as caught:
            load_dataset(name, chatml, streaming=streaming)
        assert str(caught.value).isprintable()


def test_files_folders_patterns_and_the_home_folder_are_names(
    chatml: Any, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(here))
    (here / "text").mkdir()
    (here / "text" / "a.jsonl").write_text(GOOD)
    for name in (
        "rows.jsonl",
        "*.jsonl",
        "~/rows.jsonl",
        "../project/rows.jsonl",
        "text",
        "text/*",
        str(here / "r*.jsonl"),
    ):
        assert len(load_dataset(name, chatml)) == 1


OUTSIDE = ["../secret.jsonl", "../*.jsonl", "/etc/passwd", "x/../../secret.jsonl", "https://x.org/a", "a\0b", "..", 7]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("key", ["data_files", "data_dir"])
def test_a_part_of_a_folder_is_inside_of_it(chatml: Any, here: Path, name: Any, key: str) -> None:
    with pytest.raises(ValueError, match=f"{key}.*(is not inside the|is not a name or pattern|must be a name)"):
        load_dataset(here, chatml, **{key: name})


def test_nothing_in_a_folder_is_run_or_leads_out_of_it(chatml: Any, here: Path, tmp_path: Path) -> None:
    """A script, and settings of ``datasets`` that name other files: rows are read as they are."""
    ran = tmp_path / "ran"
    for name in ("dataset.py", "work.py", "__init__.py"):
        (here / name).write_text(f"open({str(ran)!r}, 'w')")
    for path in ("../secret.jsonl", str(tmp_path / "secret.jsonl"), "https://example.invalid/x.jsonl", "../*"):
        (here / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {path}\n---\n")
        (here / "dataset_infos.json").write_text(
            json.dumps({"default": {"data_files": path, "builder_name": "pandas"}})
        )
        for source in (here, str(here), "../project"):
            assert load_dataset(source, chatml).rendered(0) == [("good<|im_end|>", True)]
    assert not ran.exists()


def test_links_out_of_a_folder_are_refused_and_others_followed(chatml: Any, here: Path, tmp_path: Path) -> None:
    (here / "more.jsonl").symlink_to("rows.jsonl")
    assert len(load_dataset(here, chatml)) == 1  # the same row twice
    (here / "out").symlink_to(tmp_path)
    report = load_dataset(here, chatml).report
    assert str(here / "out") in report["files_left_out"]  # a link to a folder is not entered
    for pattern in ("out/*.jsonl", "out/secret.jsonl"):
        with pytest.raises(ValueError, match="out/secret.jsonl: a link out of its folder, to .*; copy "):
            load_dataset(here, chatml, data_files=pattern)
    (here / "x.jsonl").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="x.jsonl: a link out of its folder, to /dev/zero"):
        load_dataset(here, chatml)
    (here / "x.jsonl").unlink()
    (here / "x.jsonl").symlink_to("nothing.jsonl")
    with pytest.raises(FileNotFoundError, match="x.jsonl: a link to .*nothing.jsonl, which does not exist"):
        load_dataset(here, chatml)


@pytest.mark.parametrize("pattern", ["*.jsonl", "*/secret.jsonl", "o*", "../project/[x]*.jsonl"])
def test_what_a_pattern_finds_may_not_lead_out_of_the_folder_that_is_typed(
    chatml: Any, here: Path, tmp_path: Path, pattern: str
) -> None:
    (here / "x.jsonl").symlink_to(tmp_path / "secret.jsonl")
    (here / "out").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="(out|x.jsonl|secret.jsonl): a link out of .*; or list it by its own name"):
        load_dataset(pattern, chatml)
    assert load_dataset("out/secret.*", chatml).rendered(0)[0][0].startswith("secret")  # this folder is typed


def test_a_file_that_the_user_names_may_be_a_link(chatml: Any, here: Path, tmp_path: Path) -> None:
    (here / "x.jsonl").symlink_to(tmp_path / "secret.jsonl")
    assert load_dataset("x.jsonl", chatml).rendered(0)[0][0].startswith("secret")


def test_the_cache_of_the_hub_links_to_its_blobs(chatml: Any, tmp_path: Path) -> None:
    snapshot = tmp_path / "datasets--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    blobs = tmp_path / "datasets--org--name" / "blobs"
    blobs.mkdir()
    (blobs / "123").write_text(GOOD)
    (snapshot / "rows.jsonl").symlink_to("../../blobs/123")
    assert len(load_dataset(snapshot, chatml)) == 1


def make(kind: str, path: Path) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(os.path.relpath(path))
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")


READ = """
import sys, tt_data
tt_data.load_dataset(sys.argv[1], tt_data.load_tokenizer(sys.argv[2]), streaming=bool(sys.argv[3]))
"""


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder"])
@pytest.mark.parametrize("streaming", ["", "1"])
def test_what_is_no_regular_file_is_refused_without_waiting(
    chatml_dir: Path, here: Path, kind: str, streaming: str
) -> None:
    told = {
        "pipe": ("a pipe, which can be read only once; write it into a file first: cat", "a pipe, expected a regular"),
        "socket": ("a socket, expected a regular file",) * 2,
        "device": ("a device, expected a regular file", "a link out of its folder, to /dev/zero"),
        "folder": ("no data file in this directory",) * 2,
    }[kind]
    for ending in ("jsonl", "json", "csv", "parquet", "arrow", "jsonl.gz"):
        folder = here / ending
        folder.mkdir()
        make(kind, folder / f"x.{ending}")
        for source, text in zip((folder / f"x.{ending}", folder), told, strict=True):
            if ending != "jsonl":
                with pytest.raises(ValueError, match=text):
                    open_sources(source)
                continue
            words = [sys.executable, "-c", READ, str(source), str(chatml_dir), streaming]
            done = subprocess.run(words, capture_output=True, text=True, timeout=60)
            assert text in done.stderr.splitlines()[-1]


def test_a_pipe_of_the_command_line_is_refused_with_the_cure(here: Path) -> None:
    reading, writing = os.pipe()
    try:
        with pytest.raises(
            ValueError, match=r"a pipe, which can be read only once; write it into a file first: cat /dev/fd/"
        ):
            open_sources(f"/dev/fd/{reading}")
    finally:
        os.close(reading)
        os.close(writing)
    (here / "x.jsonl").symlink_to("/dev/null")
    with pytest.raises(ValueError, match=r"^x.jsonl: a device, expected a regular file"):
        open_sources("x.jsonl")
    with pytest.raises(ValueError, match="/dev/null: a device, expected a regular file"):
        open_sources("/dev/null")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8\nsize 123456\n"
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"


@pytest.mark.parametrize("name", [
    "a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.arrow", "a.jsonl.gz", "a.csv.zst", "a.txt", "a.jsonl.xz",
])  # fmt: skip
def test_pointers_and_web_pages_in_the_place_of_data_are_named(chatml: Any, here: Path, name: str) -> None:
    for content, text in (
        (POINTER, "this is a git-lfs pointer .*123,456 bytes.*run: git lfs pull"),
        (PAGE, "a web page"),
    ):
        (here / name).write_bytes(content)
        for streaming in (False, True):
            with pytest.raises(ValueError, match=rf"{name}: .*{text}"):
                load_dataset(here / name, chatml, streaming=streaming)
