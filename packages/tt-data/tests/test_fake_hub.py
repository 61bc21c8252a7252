"""The hub as ``datasets`` talks to it: a small one on the loopback, asked by a process of its own."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
pytest.importorskip("datasets")

SHA = "a" * 40
LINES = "".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(5)).encode()
CARD = b"---\nconfigs:\n- config_name: main\n  data_files: m.jsonl\n- config_name: other\n  data_files: o.jsonl\n---\n"
ERRORS = {"gone": (401, "RepoNotFound"), "gated": (403, "GatedRepo"), "file": (404, "EntryNotFound")}


def table() -> bytes:
    out = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": [f"row {i}" for i in range(7)]}), out)
    return out.getvalue()


REPOSITORIES: dict[str, dict[str, bytes]] = {
    "org/table": {"data/train-00000-of-00001.parquet": table(), "README.md": b"# A table\n"},
    "org/lines": {"train.jsonl": LINES, "test.jsonl": LINES[:38]},
    "org/configs": {"README.md": CARD, "m.jsonl": LINES, "o.jsonl": LINES[:38]},
    "org/broken": {"train.jsonl": b'{"text": "a"}\n{"text": \n'},
    "org/script": {"script.py": b"raise SystemExit", "README.md": b""},
    "evil/here": {"README.md": CARD.replace(b"m.jsonl", b"SECRET"), "o.jsonl": LINES},
    "evil/above": {"README.md": CARD.replace(b"m.jsonl", b"../../../../../../../..SECRET"), "o.jsonl": LINES},
    "evil/address": {"README.md": CARD.replace(b"m.jsonl", b"HUB/datasets/org/lines/resolve/main/train.jsonl")},
    "evil/other": {"README.md": CARD.replace(b"m.jsonl", b"hf://datasets/org/lines/train.jsonl"), "o.jsonl": LINES},
    "evil/tar": {"rows.tar": b"x"},
    "yahma/alpaca-cleaned": {"rows.json": b'[{"instruction": "Say hi", "input": "", "output": "hi"}]'},
}


class FakeHub(BaseHTTPRequestHandler):
    """The answers that ``huggingface_hub`` needs to list the files of a data set and to read them."""

    def log_message(self, format: str, *args: Any) -> None:  # not to the terminal
        pass

    def answer(self, code: int, body: Any = b"", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, why: str) -> None:
        code, name = ERRORS[why]
        self.answer(code, {"error": name}, X_Error_Code=name, X_Error_Message=name)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        listing = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/(tree|revision|paths-info)/[^/]+(?:/(.*))?)?", path)
        file = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.*)", path)
        found = listing or file
        if found is None:
            self.answer(404, {"error": "no such page"})
        elif found[1] not in REPOSITORIES:
            self.refuse("gated" if found[1].startswith("gated/") else "gone")
        elif file:
            self.send_file(REPOSITORIES[file[1]].get(file[2]))
        elif listing:
            self.list_files(listing[1], listing[2], listing[3] or "", sent)

    do_HEAD = do_POST = do_GET  # noqa: N815

    def list_files(self, name: str, kind: str | None, folder: str, sent: bytes) -> None:
        files = REPOSITORIES[name]
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in files.items()
        ]
        if kind == "paths-info":
            self.answer(200, [entry for entry in entries if str(entry["path"]) in unquote(sent.decode())])
        elif kind == "tree":
            here = [e for e in entries if str(e["path"]).rpartition("/")[0] == folder]
            below = {path.partition("/")[0] for path in files if "/" in path and not folder}
            here += [{"type": "directory", "path": path, "size": 0, "oid": "0"} for path in below]
            self.answer(200, here) if here else self.refuse("file")
        else:
            siblings = [{"rfilename": path} for path in files]
            self.answer(200, {"id": name, "sha": SHA, "private": False, "gated": False, "siblings": siblings})

    def send_file(self, content: bytes | None) -> None:
        if content is None:
            self.refuse("file")
            return
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X_Repo_Commit": SHA, "Accept_Ranges": "bytes"}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if part is None:
            self.answer(200, content, **headers)
        else:
            start, end = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
            place = f"bytes {start}-{end}/{len(content)}"
            self.answer(206, content[start : end + 1], **headers, Content_Range=place)


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


ASK = """
import json, sys
import tt_data
tokenizer = tt_data.load_tokenizer(sys.argv[1])
for name, split, streaming in json.loads(sys.argv[2]):
    try:
        dataset = tt_data.load_dataset(name, tokenizer, split=split, streaming=streaming)
        batch = next(tt_data.batches(dataset, batch_size=1, shuffle=False))
        answer = [dataset.count_rows() if streaming else len(dataset), tokenizer.decode(batch["input_ids"][0].tolist())]
    except (ValueError, FileNotFoundError) as error:
        answer = [type(error).__name__, str(error)]
    print(json.dumps(answer))
"""
Question = tuple[str, str | None, bool]


def ask(endpoint: str, model: Path, home: Path, questions: list[Question], **environment: str) -> list[Any]:
    """Answers of a process that knows no other hub: rows and the first one's text, or the error."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    out = subprocess.run(
        [sys.executable, "-c", ASK, str(model), json.dumps(questions)], text=True, capture_output=True, timeout=100,
        env={**kept, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), **environment}, cwd=home,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    return [json.loads(line) for line in out.stdout.splitlines()]


def test_the_page_of_a_data_set_does_not_lead_out_of_it(
    hub: str, chatml_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    home, secret = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("other") / "secret.jsonl"
    secret.write_text('{"text": "a secret"}\n')
    evil = [name for name in REPOSITORIES if name.startswith("evil/")]
    for name in evil:
        card = REPOSITORIES[name].get("README.md", b"")
        REPOSITORIES[name]["README.md"] = card.replace(b"SECRET", str(secret).encode()).replace(b"HUB", hub.encode())
    questions: list[Question] = [
        (f"{name}{'' if name == 'evil/tar' else ':main'}", None, streaming)
        for name in evil for streaming in (False, True)
    ]  # fmt: skip
    for (name, _, _), (kind, text) in zip(questions, ask(hub, chatml_dir, home, questions), strict=True):
        assert kind in ("ValueError", "FileNotFoundError"), (name, kind)
        assert "a secret" not in text
        assert text.startswith(f"{name}: ")
    texts = [text for _, text in ask(hub, chatml_dir, home, questions)]
    own = "names a file that is not its own, .*; it is not read|Data files don't belong to"  # datasets 5 says so itself
    assert all(re.search(own, text) for text in texts[:2])
    assert "its files are read as 'webdataset', expected one of json, csv" in texts[-1]


def test_data_sets_of_the_hub_are_read_and_their_absence_explained(
    hub: str, chatml_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    home = tmp_path_factory.mktemp("home")
    there: dict[Question, list[Any]] = {
        ("org/table", None, False): [7, "row 0"],
        ("org/table", None, True): [7, "row 0"],
        ("org/lines", None, False): [5, "line 0"],
        ("org/lines", "test", True): [2, "line 0"],
        ("org/configs:other", None, False): [2, "line 0"],
        ("org/configs:main", None, True): [5, "line 0"],
        ("alpaca_cleaned", None, False): [1, "user\nSay hi\nassistant\nhi\n"],
    }
    answers = ask(hub, chatml_dir, home, list(there))
    assert dict(zip(there, answers, strict=True)) == there

    here = rf"no such file here \(looked in {home}\), and it could not be loaded from the hub"
    missing = {
        "nobody/nothing": rf"nobody/nothing: {here}: there is no data set with this name, or it is private \(hf auth",
        "gated/rows": rf"gated/rows: a gated data set; ask for access at {hub}/datasets/gated/rows, then log in",
        "org/configs": "org/configs: contains several data sets; name one of org/configs:main, org/configs:other",
        "org/script": rf"org/script: {here} \(Dataset scripts are no longer supported, but found script.py\)",
        "org/broken": r"train.jsonl:2:10: broken JSON|org/broken: row 0 or a later one cannot be read \(JSON",
    }
    questions = [(name, None, streaming) for name in missing for streaming in (False, True)]
    for (name, _, streaming), (kind, text) in zip(questions, ask(hub, chatml_dir, home, questions), strict=True):
        assert re.search(missing[name], text), (name, streaming, text)
        assert kind in ("ValueError", "FileNotFoundError")
        if name == "org/broken" and not streaming:  # datasets hides where
            assert "train.jsonl:2:10: " in text
        assert "\n" not in text
    splits = ask(hub, chatml_dir, home, [("org/lines", "tset", False), ("org/lines", "tset", True)])
    assert all("org/lines: " in text and "'train', 'test'" in text for _, text in splits)

    known, unknown = ask(
        hub, chatml_dir, home, [("org/lines", None, False), ("org/else", None, True)], HF_HUB_OFFLINE="1"
    )
    assert known == [5, "line 0"]  # from the cache
    assert "which is switched off (HF_HUB_OFFLINE or HF_DATASETS_OFFLINE); not in its cache" in unknown[1]
