"""S10 for data sets: a token goes to the configured host, encrypted, and nowhere else."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tt_data.rows.endpoint import check_numbers, check_url

pytest.importorskip("datasets")
CANARY = "hf_CANARYcanaryCANARYcanary123"


@pytest.mark.parametrize(
    "url", ["https://huggingface.co", "https://mirror.example/hf", "http://localhost:1", "http://[::1]"]
)
def test_https_and_this_machine_are_accepted(url: str) -> None:
    assert check_url("HF_ENDPOINT", url)


@pytest.mark.parametrize(
    "url",
    [
        "http://hub.example.com",
        "HTTP://hub.example",
        "http://127.0.0.2",
        "http://localhost.evil.com",
        "http://localhost.",
        "http://127.1",
        "http://2130706433",
        "http://user:pw@localhost@evil",
        "http://localhost@evil.com",
        "http://loc\nalhost",
        "http://[::ffff:127.0.0.1]",
        "",
        "huggingface.co",
        "ftp://localhost",
        "https://host:port",
        "https://[::1",
        "https://user:p@ss:w@host",
        "http://\u24dbocalhost",
        "https://host?x",
    ],
)
def test_plain_http_elsewhere_and_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="^HF_ENDPOINT: ") as caught:
        check_url("HF_ENDPOINT", url)
    assert str(caught.value).isprintable()
    assert "pw" not in str(caught.value)
    assert "ss:w" not in str(caught.value)


class Hub(ThreadingHTTPServer):
    """Redirects everything to ``other``, if there is one; remembers what it was sent."""

    def __init__(self, address: str, other: str | None = None) -> None:
        super().__init__((address, 0), Handler)
        self.other = other
        self.got: list[dict[str, str]] = []
        self.url = f"http://{address}:{self.server_port}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.server.got.append(dict(self.headers))
        self.send_response(307 if self.server.other else 404)
        if self.server.other:
            self.send_header("Location", self.server.other + self.path)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_POST = do_GET  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hubs() -> Iterator[tuple[Hub, Hub]]:
    """One that redirects to another; the other's name is not localhost's."""
    other = Hub("127.0.0.2")
    first = Hub("127.0.0.1", other.url)
    yield first, other
    for hub in (first, other):
        hub.shutdown()
        hub.server_close()


ASK = """
import sys
from tt_data.rows.hub import Part, open_hub
for streaming in (False, True):
    try:
        open_hub("org/rows", Part(revision=sys.argv[1] or None), streaming=streaming)
    except (ValueError, OSError) as error:
        print(type(error).__name__, error)
"""


def ask(endpoint: str, home: Path, revision: str = "") -> tuple[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment = {**kept, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_TOKEN": CANARY}
    done = subprocess.run(
        [sys.executable, "-c", ASK, revision], text=True, capture_output=True, timeout=100, env=environment, cwd=home
    )
    assert done.returncode == 0, done.stderr
    assert CANARY not in done.stdout + done.stderr
    return done.stdout, done.stderr


def test_no_data_set_is_asked_for_over_plain_http_to_another_host(hubs: tuple[Hub, Hub], tmp_path: Path) -> None:
    _, other = hubs
    said, _ = ask(other.url, tmp_path)
    assert said.count("ValueError HF_ENDPOINT: refused") == 2
    assert other.got == []


def test_a_redirect_to_another_host_carries_no_token_and_the_host_is_named_once(
    hubs: tuple[Hub, Hub], tmp_path: Path
) -> None:
    first, other = hubs
    _, warned = ask(first.url, tmp_path)
    assert any(CANARY in str(headers) for headers in first.got)
    assert not [headers for headers in other.got if CANARY in str(headers)]
    assert warned.count("your Hugging Face token is sent to 127.0.0.1 (HF_ENDPOINT)") == 1


def test_a_revision_that_would_be_a_path_is_refused_before_a_request(hubs: tuple[Hub, Hub], tmp_path: Path) -> None:
    first, _ = hubs
    said, _ = ask(first.url, tmp_path, "../../x")
    assert said.count("ValueError revision: '../../x' is not a branch, tag or commit") == 2
    assert first.got == []


def test_the_password_of_an_endpoint_is_in_no_message(hubs: tuple[Hub, Hub], tmp_path: Path) -> None:
    first, _ = hubs
    first.other = None
    said, warned = ask(first.url.replace("://", "://joe:pa55word@"), tmp_path)
    assert "org/rows" in said
    assert "pa55word" not in said + warned


@pytest.mark.parametrize("name", ["HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT", "HF_DATASETS_IN_MEMORY_MAX_SIZE"])
def test_a_variable_that_is_not_a_number_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "10")
    check_numbers()
    monkeypatch.setenv(name, "ten")
    with pytest.raises(ValueError, match=f"{name}: expected a number, found 'ten'; set it to one such as 10"):
        check_numbers()
