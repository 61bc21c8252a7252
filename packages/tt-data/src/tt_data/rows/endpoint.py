"""Where requests to the hub go: a token goes to the configured host, encrypted, and nowhere else.

A file apart from ``hub``: tt-ckpt has the same rules, and a test compares both.
"""

import logging
import os
import re
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

PUBLIC_HUB = "https://huggingface.co"
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
_HOST = re.compile(r"[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?\.?|[0-9a-f:.]+")
_PASSWORD = re.compile(r"(?<=://)[^\s/?#]*(?=@)")
_said = logging.getLogger("tt.endpoint")  # tt_ckpt has the same logger: what both say is said once


def check_url(variable: str, url: str) -> str:
    """The host of a URL that secrets are sent to. ValueError if it is malformed, or plain http to another machine."""
    shown = without_password(url) if url.isprintable() else ascii(without_password(url))
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


def without_password(text: str) -> str:
    """``text`` without what stands before the @ of a URL, which may be a password."""
    return _PASSWORD.sub("[redacted]", text)


def check_numbers() -> None:
    """Refuse a HF_..._TIMEOUT or HF_..._SIZE that is not a number: imports of the hub fail with it."""
    for name, value in os.environ.items():
        if re.fullmatch(r"HF_\w+_(TIMEOUT|SIZE)", name) and not re.fullmatch(r"\s*[0-9]*\.?[0-9]*\s*", value):
            raise ValueError(f"{name}: expected a number, found {value[:40]!a}; set it to one such as 10, or unset it")


def check_endpoint() -> None:
    """Refuse a malformed HF_ENDPOINT, or plain http to another host; report once a token for another host."""
    check_numbers()
    import datasets
    from huggingface_hub import constants

    host = check_url("HF_ENDPOINT", constants.ENDPOINT)
    check_url("HF_ENDPOINT", datasets.config.HF_ENDPOINT)
    if _token() and constants.ENDPOINT.rstrip("/") != PUBLIC_HUB:
        refuse_proxy("HF_ENDPOINT", constants.ENDPOINT)
        _say_once(
            f"your Hugging Face token is sent to {host} (HF_ENDPOINT), not to {PUBLIC_HUB}",
            constants.ENDPOINT.rpartition("@")[2],
        )
    _guard_requests()


def _token() -> str | None:
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


# ---- every request of huggingface_hub, and so of datasets ------------------------------------------------------------


def _guard_requests() -> None:
    import huggingface_hub
    from huggingface_hub.utils import _http

    before: Any = getattr(_http, "_GLOBAL_CLIENT_FACTORY", None)
    if before is None or hasattr(before, "guard_of"):  # None: a version that speaks through requests
        return

    def guarded() -> Any:
        client = before()
        client.event_hooks = {**client.event_hooks, "request": [*client.event_hooks["request"], _check_request]}
        return client

    guarded.guard_of = "tt_data"  # type: ignore[attr-defined]
    huggingface_hub.set_client_factory(guarded)


def _check_request(request: Any) -> None:
    """The token leaves neither the endpoint nor, unencrypted, this machine."""
    from huggingface_hub import constants

    url, home = request.url, urlsplit(constants.ENDPOINT)
    if "authorization" not in request.headers:
        return
    secret = _token()
    if secret and secret in request.headers["authorization"] and not _is_home(url, home):
        del request.headers["authorization"]
    elif url.scheme != "https" and url.host not in LOCAL_HOSTS:
        raise ValueError(f"{url.host}: a token would go there over plain http; refused")


def _is_home(url: Any, home: Any) -> bool:
    port = {"http": 80, "https": 443}
    if url.host == home.hostname:
        return (url.scheme, url.port or port.get(url.scheme)) == (home.scheme, home.port or port.get(home.scheme))
    names = (url.host, home.hostname)
    return url.scheme == "https" and (url.host.endswith(f".{home.hostname}") or names == ("hf.co", "huggingface.co"))
