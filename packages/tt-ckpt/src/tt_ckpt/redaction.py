"""Secrets are removed from all output: known values in every spelling, and text that looks like a secret."""

import base64
import html
import json
import os
import re
import stat
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus, unquote

MARK = "[redacted]"
_SHORTEST = 8  # shorter values of variables are words, not secrets
_SHORTEST_IN_URL = 6
_FILE_LIMIT = 1 << 16  # bytes; files of tokens are smaller

_NAMES = re.compile(
    r"(.*[_-])?(TOKEN|KEY|SECRET|PASS|PASSPHRASE|PAT|CREDENTIALS?|AUTH)|.*(PASSWORD|PASSWD|SECRET|TOKEN|APIKEY)|.+_PWD",
    re.IGNORECASE,
)
_NAMES_MORE = re.compile(r"(.*[_-])?(?!api|access|secret|private|master)[a-z]+[_-](KEY|AUTH|PAT)|KEY", re.IGNORECASE)
_WORD = re.compile(r"[a-z]{1,15}|[A-Z]{1,15}")  # SORT_KEY=messages: the name of a column
_LOGIN = re.compile(r"\b(?:hf_token\s*=|password)\s*(\S+)")  # in stored_tokens and in netrc

# ---- what secrets look like ------------------------------------------------------------------------------------------

_FORMS = re.compile(
    r"(?<![A-Za-z0-9]_)(?:hf_|api_org_)[A-Za-z0-9]{20,}"
    r"|(?<![A-Za-z0-9])sk-(?:(?:proj|ant|svcacct|admin|or)-[\w-]{20,}|[A-Za-z0-9]{20,})"
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}|dckr_pat_[\w-]{20,}"
    r"|xox[abeoprs]-[A-Za-z0-9-]{10,}|xapp-[A-Za-z0-9-]{10,}|npm_[A-Za-z0-9]{36}|pypi-AgE[\w-]{40,}"
    r"|(?<![A-Za-z0-9+/])A[KS]IA[A-Z0-9]{16}(?![A-Za-z0-9+/])|(?<![A-Za-z0-9+/_-])AIza[\w-]{35}(?![\w-])"
    r"|nvapi-[\w-]{40,}|AGE-SECRET-KEY-1[A-Z0-9]{40,}"
    r"|-----BEGIN (?:[A-Z0-9]+ ){0,4}PRIVATE KEY(?: BLOCK)?-----(?:(?!-----)[\s\S])*(?:-----END [A-Z0-9 ]{1,40}-----)?"
    r"|(?<![\w-])eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}"
)
_IN_URL = re.compile(  # the part before the @ of scheme://user:password@host
    r"(?<=:)(?P<slashes>(?:/|\\/){2})(?:[^\s/?#\"'<>@:\\]*:[^\s/?#\"'<>]*|[\w-]{20,})(?=@)"
)
_HEADER = re.compile(
    r"""(?P<before>authorization\\*["']?\s*[:=]\s*(?:b?\\*["'])?(?:(?:basic|bearer|token)\s+)?|\b(?:bearer|basic)\s+)"""
    r"""(?P<value>[\w.~+/=-]{8,})""",
    re.IGNORECASE,
)
_SETTING = re.compile(
    r"""(?P<before>(?P<name>pass(?:word|wd|phrase)"""
    r"""|(?:api|access|secret|private|signing|encryption|master|account)[_-]?key|secret"""
    r"""|(?:access|auth|refresh|bearer|hub|hf|api|bot|secret|github|gitlab|wandb)[_-]?token|(?<![\w-])token)"""
    r"""(?:\\*["'])?[ \t]{0,9}(?::=|=>|[:=])[ \t]{0,9})"""
    r"""(?:(?P<quote>["'])(?P<quoted>(?:\\.|(?!(?P=quote))[^\\\n]){1,4000})(?=(?P=quote))"""
    r"""|(?P<escaped>\\{1,9}["'])(?P<inner>(?:(?!(?P=escaped))[^\n]){1,4000})(?=(?P=escaped))"""
    r"""|(?P<bare>[^\s"'`,;<>\\&]{8,4000}))""",
    re.IGNORECASE,
)
_FLAG = re.compile(
    r"(?P<before>(?<![\w-])--(?:[\w-]{0,30}-)?(?:password|passwd|token|api-key|secret) +)"
    r"(?P<bare>[^\s\"'-][^\s\"']{7,})"
)
_NO_SECRET = re.compile(  # a place for one, a name of one, or the expression that reads it
    r"[\[${(<*%|]|.*(?:\.\.\.|\byour|xxx)|(?:none|null|empty|true|false)$|[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*[\[(]"
    r"|[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+$|[a-z]+(?:_[a-z]+)+$",
    re.IGNORECASE,
)
_DENSE = re.compile(r"\d|[a-z][A-Z]|[^\w.\-/]")
_HINT = re.compile(
    r"hf_|api_org|sk-|gh[pousr]_|_pat_|glpat|xox|xapp|npm_|pypi-|A[KS]IA|AIza|nvapi|AGE-|-----BEGIN|eyJ|:\\?/"
    r"|(?i:authorization|bearer|basic|passw|passp|key|secret|token)"
)


def redact(text: str) -> str:
    """``text`` with ``[redacted]`` for every secret: those of this machine, and text that looks like one."""
    return _redact(text, _known_secrets())


def redact_known(text: str) -> str:
    """``text`` without the secrets of this machine. Text that only looks like one stays, as in a model's answer."""
    known = _known_secrets()
    return _pattern(known).sub(MARK, text) if any(secret in text for secret in known) else text


def redact_said(text: str) -> str:
    """The text of a row or a model, without the secrets of this machine and tokens of known forms.

    ``password: x`` stays: the rows may be about it.
    """
    return _FORMS.sub(MARK, redact_known(text))


def redact_data(value: Any) -> Any:
    """``redact`` for data that becomes JSON or YAML: all text in it, and the values of keys such as ``password``."""
    return _redact_data(value, _known_secrets())


def secret_line(text: str) -> int | None:
    """The number, from 1, of the first line with a secret; None if there is none."""
    changed = redact(text)
    if changed == text:
        return None
    same = next((i for i, (a, b) in enumerate(zip(text, changed, strict=False)) if a != b), len(changed))
    return text.count("\n", 0, same) + 1


def _redact(text: str, known: tuple[str, ...]) -> str:
    for _ in range(3):  # the result may look like a secret again
        changed = _once(text, known)
        if changed == text:
            break
        text = changed
    return text


def _once(text: str, known: tuple[str, ...]) -> str:
    if any(secret in text for secret in known):
        text = _pattern(known).sub(MARK, text)
    if _HINT.search(text) is None:
        return text
    text = _FORMS.sub(MARK, text)
    text = _IN_URL.sub(rf"\g<slashes>{MARK}", text)
    text = _HEADER.sub(_without_header, text)
    return _FLAG.sub(_without_value, _SETTING.sub(_without_value, text))


def _redact_data(value: Any, known: tuple[str, ...]) -> Any:
    if isinstance(value, str):
        return _redact(value, known)
    if isinstance(value, dict):
        return {_redact_data(key, known): _redact_entry(key, item, known) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redact_data(item, known) for item in value]
    return value


def _redact_entry(key: Any, item: Any, known: tuple[str, ...]) -> Any:
    if isinstance(key, str) and isinstance(item, str) and _HINT.search(key):
        text = f"{key}: {json.dumps(item, ensure_ascii=False)}"
        if _SETTING.sub(_without_value, text) != text:
            return MARK
    return _redact_data(item, known)


def _without_header(found: re.Match[str]) -> str:
    plain = found["before"][:1] in "bB" and not (len(found["value"]) >= 16 and re.search(r"\d|[=+]", found["value"]))
    return found[0] if plain else found["before"] + MARK


def _without_value(found: re.Match[str]) -> str:
    parts = found.groupdict()
    inside = parts.get("quoted") or parts.get("inner")
    value = inside or found["bare"]
    name = (parts.get("name") or "").lower()
    end = "" if inside is not None else value[len(value.rstrip(".:)]}!?")) :]
    bare = value.removesuffix(end) if end else value
    if _NO_SECRET.match(bare) or not _looks_secret(name, bare, inside is not None):
        return found[0]
    return f"{found['before']}{parts.get('quote') or parts.get('escaped') or ''}{MARK}{end}"


def _looks_secret(name: str, value: str, quoted: bool) -> bool:
    if name == "token":  # of a text, more often than of a service
        return len(value) >= 20 and re.fullmatch(r"(?=.*\d)[\w.~+/=-]+", value) is not None
    if name.startswith("pass"):
        is_dense = len(value) >= 12 or _DENSE.search(value) is not None
        return len(value) >= 4 if quoted else len(value) >= _SHORTEST and is_dense
    return len(value) >= _SHORTEST and _DENSE.search(value) is not None and " " not in value


# ---- what secrets there are ------------------------------------------------------------------------------------------


_cache: tuple[Any, tuple[str, ...]] = ((), ())


def _known_secrets() -> tuple[str, ...]:
    """The secrets in variables and login files of this environment, in each spelling, longest first."""
    global _cache
    values = tuple(
        [
            value
            for name, value in os.environ.items()
            if "://" in value or (_names_secret(name) and not _is_word(name, value))
        ]
    )
    key = (values, tuple([(path, _state(path)) for path in _login_files()]))
    if key != _cache[0]:
        found = {spelling for secret in _secrets(key) for spelling in _spellings(secret)}
        _cache = (key, tuple(sorted(found, key=lambda text: (-len(text), text))))
    return _cache[1]


@lru_cache(4096)
def _names_secret(name: str) -> bool:
    return _NAMES.fullmatch(name) is not None


def _is_word(name: str, value: str) -> bool:
    return _WORD.fullmatch(value) is not None and _NAMES_MORE.fullmatch(name) is not None


def _secrets(key: tuple[tuple[str, ...], tuple[tuple[str, Any], ...]]) -> set[str]:
    values, files = key
    found = set()
    for value in values:
        if "://" in value:
            found |= _of_url(value)
        elif len(value.strip()) >= _SHORTEST and not (value.startswith("/") and Path(value).exists()):
            found |= {value, value.strip(), *(line.strip() for line in value.splitlines() if len(line.strip()) >= 16)}
    for path, state in files:
        if state is not None:
            found |= _of_file(Path(path))
    return {value for value in found if value not in MARK}


def _of_url(url: str) -> set[str]:
    """The user and password of a URL. The password may contain any character, percent-encoded or not."""
    rest = url.partition("://")[2]
    user, colon, _ = rest.partition(":")
    ends = [found.start() for found in re.finditer("@", rest)]
    if not ends or re.search(r"[/?#]", user) or re.match(r"\d{1,5}[/?#]", rest[len(user) + 1 :]):  # host:port/path@x
        return set()
    if not colon or len(user) > ends[0]:
        return {rest[: ends[0]]} if ends[0] >= 20 and not re.search(r"[/?#]", rest[: ends[0]]) else set()
    passwords = {rest[len(user) + 1 : end] for end in ends}
    return {text for word in passwords for text in (word, unquote(word)) if len(text) >= _SHORTEST_IN_URL} | {
        f"{user}:{word}" for word in passwords if word
    }


def _login_files() -> tuple[str, ...]:
    """The files in which huggingface_hub keeps tokens of `hf auth login`, and netrc."""
    constants = sys.modules.get("huggingface_hub.constants")
    home = os.environ.get("HF_HOME") or os.path.join(  # noqa: PTH118  (called for every line: no Path)
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"),  # noqa: PTH111
        "huggingface",
    )
    token = getattr(constants, "HF_TOKEN_PATH", None) or os.environ.get("HF_TOKEN_PATH") or f"{home}/token"
    stored = getattr(constants, "HF_STORED_TOKENS_PATH", None) or f"{home}/stored_tokens"
    netrc = os.environ.get("NETRC") or os.path.expanduser("~/.netrc")  # noqa: PTH111
    return tuple(dict.fromkeys((str(token), f"{home}/token", str(stored), f"{home}/stored_tokens", netrc)))


def _state(path: str) -> tuple[int, int] | None:
    try:
        facts = os.stat(path)  # noqa: PTH116
    except (OSError, ValueError):
        return None
    return (facts.st_mtime_ns, facts.st_size) if stat.S_ISREG(facts.st_mode) else None


def _of_file(path: Path) -> set[str]:
    try:
        with path.open("rb") as file:
            text = file.read(_FILE_LIMIT).decode("utf-8", "replace")
    except OSError:
        return set()
    words = {text.strip()} if path.name.startswith("token") or "\n" not in text.strip() else set()
    words |= set(_LOGIN.findall(text))
    return {word for word in words if len(word) >= _SHORTEST}


def _spellings(secret: str) -> set[str]:
    """The secret as it is, and as JSON, Python, YAML, HTML, URLs and base64 spell it."""
    data = secret.encode("utf-8", "surrogateescape")
    quoted = {quote(data, safe=""), quote(data), quote_plus(data)}
    quoted |= {re.sub("%..", lambda found: found[0].lower(), text) for text in quoted}
    found = {secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], repr(secret)[1:-1],
             secret.replace("'", "''"), html.escape(secret), html.escape(secret, quote=False), unquote(secret),
             secret.encode("utf-8", "backslashreplace").decode("ascii", "backslashreplace"), data.hex()}  # fmt: skip
    for shift in range(3):  # within the base64 of a longer text, as of "user:password"
        text = base64.b64encode(bytes(shift) + data).decode()
        core = text[(0, 2, 3)[shift] : len(text.rstrip("=")) - bool(text.endswith("="))]
        if len(core) >= _SHORTEST + 2:
            found |= {core, core.translate(str.maketrans("+/", "-_"))}
    return {text for text in found | quoted if text and text not in MARK}


@lru_cache(4)
def _pattern(known: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join([re.escape(MARK), *map(re.escape, known)]))
