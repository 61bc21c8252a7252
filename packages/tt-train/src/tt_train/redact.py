"""Secrets never reach a file or a screen: values of token-like environment variables are blanked."""

import os
import re

_NAMES = re.compile(r"(TOKEN|API_KEY|SECRET|PASSWORD|_KEY)$")
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")


def redact(text: str) -> str:
    """``text`` with hub tokens, and the values of variables named ``*_TOKEN``, ``*_KEY`` and the like, as ``***``."""
    for name, value in os.environ.items():
        if len(value) >= 8 and _NAMES.search(name.upper()):
            text = text.replace(value, "***")
    return _HUB_TOKEN.sub("***", text)
