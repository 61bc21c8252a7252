"""S10: a token goes to the configured host, encrypted, and nowhere else."""

import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import tt_ckpt
from tt_ckpt.hub import download as hub
from tt_ckpt.hub.endpoint import check_endpoint, check_url

pytest.importorskip("huggingface_hub")
CANARY = "hf_CANARYcanaryCANARYcanary123"
REPO = "someone/some-model"


@pytest.mark.parametrize(
    "url",
    [
        "https://huggingface.co",
        "https://hub.example.com/mirror",
        "https://joe:pw@hub.example",
        "HTTPS://Hub.Example",
        "http://localhost:8080",
        "http://127.0.0.1",
        "http://[::1]:80",
        "HTTP://LOCALHOST/",
        "https://hub.example:8443",
    ],
)
def test_https_and_this_machine_are_accepted(url):
    assert check_url("HF_ENDPOINT", url)


@pytest.mark.parametrize(
    "url",
    [
        "http://hub.example.com",
        "HTTP://hub.example.com",
        "http://127.0.0.2",
        "http://localhost.evil.com",
        "http://localhost.",
        "http://127.0.0.1.",
        "http://127.1",
        "http://2130706433",
        "http://0x7f000001",
        "http://0177.0.0.1",
        "http://127.0.0.1.evil.com",
        "http://localhost@evil.com",
        "http://user:pw@localhost@evil.com",
        "http://user:pw@evil.com",
        "http://evil@127.0.0.2",
        "http://[::ffff:127.0.0.1]",
        "http://[0:0:0:0:0:0:0:1]",
        "http://[::1%25lo]",
        "http://0.0.0.0",
        "http://0",
        "http://localhost%2eevil.com",
        "http://localhost\\@evil.com",
        "http://evil.com#@localhost",
        "http://evil.com?@localhost",
        "http://\u24db\u24deocalhost",
        "http://loc\nalhost",
        "http://evil.com\\@localhost",
        "http:// localhost",
        "http://localhost :80",
        "http://xn--localhost-.com",
    ],
)
def test_plain_http_elsewhere_is_refused_in_any_spelling(url):
    with pytest.raises(ValueError, match="^HF_ENDPOINT: ") as caught:
        check_url("HF_ENDPOINT", url)
    assert str(caught.value).isprintable()
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "huggingface.co",
        "localhost:8080",
        "ftp://localhost",
        "file:///etc/passwd",
        "https://",
        "https:///path",
        "https://host:99999",
        "https://host:port",
        "https://[::1",
        "//host",
        "https://ho\x00st",
        "https://ho\x1bst",
        "https://host?x=1",
        "https://host/#a",
        "javascript:1",
        "https://-",
        "https://a b",
        "https://user:p@ss:w@host",
        "https://u:p/w@host:1",
    ],
)
def test_what_is_not_the_url_of_a_host_is_answered_in_one_line(url):
    with pytest.raises(
        ValueError, match=r"^HF_ENDPOINT: .*(expected one such as https://huggingface.co|two @)"
    ) as caught:
        check_url("HF_ENDPOINT", url)
    assert str(caught.value).isprintable()
    assert "ss:w" not in str(caught.value)


@pytest.mark.parametrize("endpoint", ["http://127.0.0.2:9", "", "http://user:pw@localhost@evil", "https://host:port"])
def test_nothing_is_sent_to_a_refused_endpoint(monkeypatch, server, model_dir, endpoint):
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection was made"))
    for action in (
        lambda: tt_ckpt.download(REPO),
        lambda: tt_ckpt.resolve(REPO),
        lambda: tt_ckpt.upload(model_dir(), REPO),
    ):
        with pytest.raises(ValueError, match="HF_ENDPOINT"):
            action()


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_no_token_goes_through_a_proxy_in_clear(server, repository, monkeypatch, name):
    monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("HF_TOKEN", CANARY)
    with pytest.raises(ValueError, match="would go through HTTP_PROXY, token included; set NO_PROXY=127.0.0.1"):
        tt_ckpt.download(REPO)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    check_endpoint()


def test_another_host_is_named_once_with_the_variable_and_without_the_token(monkeypatch, caplog):
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setattr(constants, "ENDPOINT", "https://joe:pa55word@mirror.example/hf")
    with caplog.at_level(logging.WARNING):
        check_endpoint()
        check_endpoint()
    (record,) = caplog.records
    assert record.getMessage() == (
        "your Hugging Face token is sent to mirror.example (HF_ENDPOINT), not to https://huggingface.co"
    )


@pytest.mark.parametrize("token", ["hf_CANARY canary", "hf_CANARY\x01canary", "hf_CANARY\u00e9canary", "a\rb canary"])
def test_a_token_that_no_request_can_carry_is_refused_without_showing_it(monkeypatch, server, token):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ValueError, match="token contains characters that no token has; set HF_TOKEN again") as caught:
        tt_ckpt.download(REPO)
    assert "CANARY" not in str(caught.value)
    assert server.log == []


def test_a_token_file_that_is_no_text_is_named_by_its_kind(monkeypatch, server, tmp_path):
    from huggingface_hub import constants

    (tmp_path / "token").write_bytes(b"\xff\xfe\x00")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(ValueError, match=r"the Hugging Face token (cannot be read|has characters)"):
        tt_ckpt.download(REPO)


@pytest.fixture
def other_host():
    """Another server; its list holds the headers of each request that it got."""
    got = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            got.append({name.lower(): value for name, value in self.headers.items()})
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    other = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=other.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{other.server_port}", got
    other.shutdown()
    other.server_close()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("what", ["/api/models/", "/resolve/"])
def test_a_redirect_to_another_host_carries_no_token(server, repository, other_host, monkeypatch, status, what):
    url, got = other_host
    monkeypatch.setenv("HF_TOKEN", CANARY)

    def answer(handler, path):
        if what not in path:
            return False
        handler.reply(
            status, b"", {"Location": url + path, "X-Repo-Commit": "c" * 40, "ETag": '"e"', "X-Linked-Size": "9"}
        )
        return True

    server.answer = answer
    with pytest.raises(Exception):  # noqa: B017, PT011  (the other host has nothing)
        tt_ckpt.download(REPO, retry_s=1)
    assert any(CANARY in str(headers) for _, _, headers in server.log)
    assert got
    assert not [headers for headers in got if "authorization" in headers or CANARY in str(headers)]


def test_a_next_page_on_another_host_gets_no_token(server, repository, other_host, monkeypatch):
    url, got = other_host
    monkeypatch.setenv("HF_TOKEN", CANARY)

    def answer(handler, path):
        if "/tree/" not in path:
            return False
        handler.reply(200, [], {"Link": f'<{url}/next>; rel="next"'})
        return True

    server.answer = answer
    with pytest.raises(Exception):  # noqa: B017, PT011
        tt_ckpt.download(REPO, retry_s=1)
    assert not [headers for headers in got if CANARY in str(headers)]


def test_an_upload_to_another_host_gets_no_token_of_the_hub(server, model_dir, other_host, monkeypatch):
    url, got = other_host
    monkeypatch.setenv("HF_TOKEN", CANARY)
    server.upload_url = url
    with pytest.raises(OSError, match=REPO):
        tt_ckpt.upload(model_dir(), REPO)
    assert got
    assert not [headers for headers in got if CANARY in str(headers)]


@pytest.mark.parametrize("name", ["HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"])
def test_a_variable_that_is_not_a_number_is_named(monkeypatch, name):
    monkeypatch.setenv(name, "ten")
    with pytest.raises(ValueError, match=f"{name}: expected a number, found 'ten'; set it to one such as 10"):
        hub.snapshot("org/name")
