"""Secrets that must not stand in any output: tokens by their value, and by their look."""

import os
import re
from collections.abc import Iterator

_LOOKS = re.compile(r"\b(hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{20,})")
_IN_URL = re.compile(r"(?<=://)[\w.~%+-]+:[\w.~%!$&'()*+,;=-]+(?=@)")  # https://user:password@host
_NAMES = re.compile(r".*(_TOKEN|_KEY|_SECRET|_PASSWORD)$|^(HF_TOKEN|HUGGING_FACE_HUB_TOKEN|WANDB_API_KEY)$")
_SHORTEST = 8  # shorter values are words, not secrets


def secrets() -> Iterator[str]:
    """The secrets of this environment: variables that are named so, and the token that huggingface_hub would send."""
    for name, value in os.environ.items():
        if _NAMES.fullmatch(name) and len(value) >= _SHORTEST:
            yield value
    from huggingface_hub import get_token

    token = get_token()
    if token:
        yield token


def redact(text: str) -> str:
    """``text`` with every secret, and what stands before the @ of a URL, replaced by ``[redacted]``."""
    return _IN_URL.sub("[redacted]", _without_tokens(text))


def _without_tokens(text: str) -> str:
    for secret in sorted(set(secrets()), key=len, reverse=True):
        text = text.replace(secret, "[redacted]")
    return _LOOKS.sub("[redacted]", text)


def holds_secret(text: str) -> bool:
    return _without_tokens(text) != text
