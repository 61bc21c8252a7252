"""Where requests to the hub may go: a token is sent encrypted to the configured host and nowhere else."""

import logging
import os
import re
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from tt_ckpt.redaction import redact

PUBLIC_HUB = "https://huggingface.co"
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
_HOST = re.compile(r"[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?\.?|[0-9a-f:.]+")
_PLAIN = re.compile(r"[\w.+=:~-]{1,200}", re.ASCII)
_ANSWER_BYTES = 64_000_000  # of an answer of the API
_PACKED_BYTES = 1_000_000  # of a compressed answer, which was not asked for and may become 1000 times as large
_PACKED_FILE_BYTES = 32_000_000
_ANSWER_S = 60.0
_SILENCE_S = 30.0  # until an answer begins, and between two pieces of it

_said = logging.getLogger("tt.endpoint")  # tt_data uses the same logger, so that a warning of both is shown once
_body_limit: int | None = None


def check_url(variable: str, url: str) -> str:
    """The host of a URL that receives secrets. ValueError if it is malformed, or is plain http to another machine."""
    shown = redact(url) if url.isprintable() else ascii(redact(url))
    if not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        raise ValueError(f"{variable}: {shown[:200]!r} is not a URL; expected one such as {PUBLIC_HUB}")
    if url.partition("://")[2].partition("/")[0].count("@") > 1:
        raise ValueError(f"{variable}: refused {shown[:200]}: two @ before the host; write %40 for one")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, port = "", -1
    if not _HOST.fullmatch(host) or port == 0 or parts.scheme not in ("http", "https") or parts.query or parts.fragment:
        raise ValueError(f"{variable}: {shown[:200]!r} is not the URL of a host; expected one such as {PUBLIC_HUB}")
    if parts.scheme != "https" and host not in LOCAL_HOSTS:
        raise ValueError(f"{variable}: refused {shown[:200]}: expected https (http only for localhost)")
    return host


def refuse_proxy(variable: str, url: str) -> None:
    """ValueError if plain http to this machine would go through a proxy of another, which sees the token."""
    host = urlsplit(url).hostname or ""
    proxies = getproxies()
    if urlsplit(url).scheme == "http" and (proxies.get("http") or proxies.get("all")) and not proxy_bypass(host):
        what = f"plain http to {host} would go through HTTP_PROXY, token included"
        raise ValueError(f"{variable}: {what}; set NO_PROXY={host}")


def check_numbers() -> None:
    """ValueError if a HF_..._TIMEOUT or HF_..._SIZE is not a number, with which importing the hub's library fails."""
    for name, value in os.environ.items():
        if re.fullmatch(r"HF_\w+_(TIMEOUT|SIZE)", name) and not re.fullmatch(r"\s*[0-9]*\.?[0-9]*\s*", value):
            raise ValueError(f"{name}: expected a number, found {value[:40]!a}; set it to one such as 10, or unset it")


def check_endpoint() -> None:
    """Refuse a malformed HF_ENDPOINT, or plain http to another host; report once a token for another host."""
    check_numbers()
    from huggingface_hub import constants

    host = check_url("HF_ENDPOINT", constants.ENDPOINT)
    if token() and constants.ENDPOINT.rstrip("/") != PUBLIC_HUB:
        refuse_proxy("HF_ENDPOINT", constants.ENDPOINT)
        _say_once(
            f"your Hugging Face token is sent to {host} (HF_ENDPOINT), not to {PUBLIC_HUB}",
            constants.ENDPOINT.rpartition("@")[2],
        )
    _guard_requests()


def token() -> str | None:
    """The token that huggingface_hub sends; ValueError if a request cannot carry it."""
    from huggingface_hub import get_token

    cure = "set HF_TOKEN again, or run hf auth login"
    try:
        found: str | None = get_token()
    except (OSError, ValueError) as error:
        raise ValueError(f"the Hugging Face token cannot be read ({type(error).__name__}); {cure}") from None
    if found and not re.fullmatch(r"[!-~]+", found):
        raise ValueError(f"the Hugging Face token contains characters that no token has; {cure}")
    return found


class _Once(logging.Filter):
    keys: set[str]

    def filter(self, record: logging.LogRecord) -> bool:
        key, keys = str(record.__dict__.get("once")), self.__dict__.setdefault("keys", set())
        is_new = key not in keys
        keys.add(key)
        return is_new


def _say_once(text: str, key: str) -> None:
    """A warning, once for a key, whichever package of this process has it to say."""
    if not _said.filters:
        _said.addFilter(_Once())
    _said.warning("%s", text, extra={"once": key})


def limit_bodies(nbytes: int | None) -> None:
    """Set the largest size of the files that are fetched from now on."""
    global _body_limit
    _body_limit = nbytes


# ---- every request of huggingface_hub, and so of datasets ------------------------------------------------------------


def _guard_requests() -> None:
    import huggingface_hub
    from huggingface_hub.utils import _http

    before: Any = getattr(_http, "_GLOBAL_CLIENT_FACTORY", None)
    if before is None or getattr(before, "guard_of", None) == "tt_ckpt":  # None: a version that speaks through requests
        return

    def guarded() -> Any:
        client = before()
        hooks = client.event_hooks
        client.event_hooks = {
            "request": [*hooks["request"], _check_request],
            "response": [*hooks["response"], _check_response],
        }
        return client

    guarded.guard_of = "tt_ckpt"  # type: ignore[attr-defined]
    huggingface_hub.set_client_factory(guarded)


def _check_request(request: Any) -> None:
    """Remove the token from requests to other hosts, refuse to send it unencrypted, and set timeouts."""
    from huggingface_hub import constants

    url, home = request.url, urlsplit(constants.ENDPOINT)
    if "authorization" in request.headers:
        secret = token()
        if secret and secret in request.headers["authorization"] and not _is_home(url, home):
            del request.headers["authorization"]
        elif url.scheme != "https" and url.host not in LOCAL_HOSTS:
            raise ValueError(f"{url.host}: a token would go there over plain http; refused")
    request.headers["accept-encoding"] = "identity"
    waits = request.extensions.get("timeout") or {}
    limits = {name: waits.get(name) or _SILENCE_S for name in ("connect", "read", "write", "pool")}
    request.extensions = {**request.extensions, "timeout": limits}


def _is_home(url: Any, home: Any) -> bool:
    port = {"http": 80, "https": 443}
    if url.host == home.hostname:
        return (url.scheme, url.port or port.get(url.scheme)) == (home.scheme, home.port or port.get(home.scheme))
    names = (url.host, home.hostname)
    return url.scheme == "https" and (url.host.endswith(f".{home.hostname}") or names == ("hf.co", "huggingface.co"))


def _check_response(response: Any) -> None:
    """Refuse headers that are not plain words, since they become paths of the cache, and limit the size of bodies."""
    for name in ("etag", "x-linked-etag", "x-repo-commit"):
        value = response.headers.get(name)
        word = "" if value is None else value.removeprefix("W/").strip('"')
        if value is not None and (not _PLAIN.fullmatch(word) or word.strip(".") == ""):
            raise OSError(f"{response.request.url.host}: refused its answer: {name} {word[:60]!r} is not a plain word")
    is_file = "/api/" not in response.request.url.path and response.request.method == "GET"
    packed = response.headers.get("content-encoding", "identity") not in ("", "identity")
    limit = _body_limit if is_file else _ANSWER_BYTES
    if packed:
        most = _PACKED_FILE_BYTES if is_file else _PACKED_BYTES
        limit = most if limit is None else min(limit, most)
    if limit is not None:
        until = None if is_file else time.monotonic() + _ANSWER_S
        response.stream = _limited(response.stream, response.request.url.host, limit, until)


def _limited(stream: Any, host: str, limit: int, until: float | None) -> Any:
    (base,) = [kind for kind in type(stream).__mro__ if kind.__name__ == "SyncByteStream"] or [object]

    class Limited(base):  # type: ignore[misc, valid-type]
        def __iter__(self) -> Iterator[bytes]:
            size = 0
            for piece in stream:
                size += len(piece)
                if size > limit:
                    raise OSError(f"{host}: sent more than {limit} bytes, which cannot be right; stopped")
                if until is not None and time.monotonic() > until:
                    raise OSError(f"{host}: its response had not ended after {_ANSWER_S:.0f} s; stopped")
                yield piece

        def close(self) -> None:
            stream.close()

    return Limited()
