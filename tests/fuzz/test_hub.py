"""Repository ids and revisions, listings of the hub, endpoints, and texts of which secrets are taken out."""

import os
import time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import strategies as st

from tt_ckpt.hub import download as hub
from tt_ckpt.hub.endpoint import check_url
from tt_ckpt.hub.names import check_listing, check_repo_id, check_revision
from tt_ckpt.redaction import MARK, redact, redact_data, secret_line

VALUE = "canary/Value+\"quotes'<&"
TEXTS = [
    b'{"password": "hunter2", "api_key": "abcd1234", "token": "0123456789abcdef0123"}',
    b"GET https://user:p@ss:w@host/x Authorization: Bearer abcdef1234567890 hf_" + b"aB1" * 10,
    b"-----BEGIN PRIVATE KEY-----\nMIIE\n-----END PRIVATE KEY-----\nsk-proj-" + b"a" * 30 + b" ghp_" + b"a1" * 18,
    b"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3 password='a' secret=\\\"x\\\" --token abcdefgh1",
    b"lr: 1e-5\nmax_tokens: 512\neos_token: </s>\n" + VALUE.encode() + b" [redacted] ted]",
]
NAMES = [
    b"Qwen/Qwen3-0.6B",
    b"https://huggingface.co/org/name",
    b"org/name@refs/pr/1",
    b"model-00001-of-00002.safetensors",
]
URLS = [
    b"https://user:pw@hub.example:443/mirror",
    b"http://localhost:8080",
    b"http://[::1]:80/",
    b"HTTPS://huggingface.co",
]


@pytest.fixture(autouse=True)
def secrets_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", VALUE)
    monkeypatch.setenv("HF_ENDPOINT", "https://joe:p@ss/wo:rd@host.example")


def check_redact(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    once = redact(text)
    assert redact(once) == once, "not idempotent"
    assert VALUE not in once
    assert (secret_line(text) is None) == (once == text)


def test_redact_takes_any_text_and_twice_is_once(fuzz: Any) -> None:
    fuzz(check_redact, fuzz.mutated(*TEXTS))


def test_redact_takes_long_texts_in_time(fuzz: Any) -> None:
    def check(pieces: list[bytes]) -> None:
        start = time.process_time()
        redact((b"".join(pieces) * (100_000 // max(1, sum(map(len, pieces))))).decode("utf-8", "replace"))
        assert time.process_time() - start < 3

    words = [
        b"hf_",
        b"sk-",
        b"eyJ",
        b".",
        b"password",
        b":",
        b"=",
        b'"',
        b"\\",
        b"'",
        b" ",
        b"://",
        b"@",
        b"token",
        b"\n",
        b"-----BEGIN PRIVATE KEY-----",
        b"secret",
        b"bearer ",
        b"--",
        b"a",
        b"authorization",
        b"/",
        b"_",
        b"1",
    ]
    fuzz(check, st.lists(st.sampled_from(words), min_size=1, max_size=6))


def test_redact_takes_any_data(fuzz: Any) -> None:
    def check(value: object) -> None:
        once = redact_data(value)
        assert repr(redact_data(once)) == repr(once)

    fuzz(check, fuzz.mutated_json({"password": "x", "a": [1, "hf_" + "a1" * 12, {"b": None}], "token": MARK}))


def test_any_repository_id_and_revision_is_accepted_or_one_of_our_errors(fuzz: Any) -> None:
    def check(data: bytes) -> None:
        text = data.decode("utf-8", "surrogateescape")
        problems = 0
        for accept in (check_repo_id, check_revision):
            try:
                accept(text)
                assert text.isprintable()
                assert ".." not in text
                assert not text.startswith(("/", "-"))
            except ValueError as error:
                problems, last = problems + 1, error
        if problems:
            raise last

    fuzz(check, fuzz.mutated(*NAMES))


def test_any_endpoint_is_a_host_or_one_of_our_errors(fuzz: Any) -> None:
    def check(data: bytes) -> None:
        host = check_url("HF_ENDPOINT", data.decode("utf-8", "surrogateescape"))
        assert data.lower().startswith(b"https://") or host in ("localhost", "127.0.0.1", "::1")

    fuzz(check, fuzz.mutated(*URLS))


def test_any_listing_is_read_or_one_of_our_errors(fuzz: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [
        {"rfilename": "config.json", "size": 12, "blob_id": "b" * 40, "lfs": None},
        {"rfilename": "sub/model.safetensors", "size": 1 << 33, "blob_id": None, "lfs": {"sha256": "a" * 64}},
    ]

    def check(listing: Any) -> None:
        from huggingface_hub.hf_api import ModelInfo

        sent = listing if isinstance(listing, dict) else {"siblings": listing}
        api = SimpleNamespace(model_info=lambda *_, **__: ModelInfo(**{"id": "a/b", **sent}))
        monkeypatch.setattr(hub, "api", lambda: api)
        hub.retrying("a/b", 0.0, lambda: hub._list_files("a/b", None))

    fuzz(check, fuzz.mutated_json({"sha": "c" * 40, "siblings": files}))


def test_any_names_are_plain_files_of_one_folder_or_one_of_our_errors(fuzz: Any) -> None:
    def check(names: list[str]) -> None:
        check_listing("a/b", names)
        for name in names:
            assert os.path.normpath(name) == name
            assert not name.startswith(("/", ".."))

    fuzz(
        check,
        st.lists(
            st.sampled_from(["a", "..", "A", ".git", "b", ".", "", "\0", "\u202e", "x" * 300]), min_size=1, max_size=5
        ).map(lambda parts: ["/".join(parts), *parts]),
    )
