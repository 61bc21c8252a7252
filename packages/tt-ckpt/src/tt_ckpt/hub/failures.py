"""Failures of the hub: temporary ones are retried, others are explained in one line that says how to fix them."""

import difflib
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tt_ckpt.hub.endpoint import PUBLIC_HUB, token
from tt_ckpt.redaction import redact

logger = logging.getLogger(__name__)


def retrying(
    repo_id: str, until: float, action: Callable[[], Any], revision: str | None = None, *, contact: float | None = None
) -> Any:
    """Call ``action``, again after temporary failures, with growing pauses until ``until``. Others are explained.

    ``contact``: the time at which to give up on a hub that has not answered at all.
    """
    pause = 0.5
    while True:
        try:
            return action()
        except Exception as error:
            answered = getattr(error, "response", None) is not None
            limit = until if answered or contact is None else min(until, contact)
            if not _is_passing(error) or time.monotonic() + pause > limit:
                if contact is not None and not answered and _is_passing(error):
                    why = f"{_host()} does not answer ({_first_line(error)})"
                    raise ConnectionError(f"{repo_id}: no directory of that name here, and {why}") from None
                raise explained(error, repo_id, revision) from None
            logger.warning("%s: %s; trying again in %.1f s", repo_id, _first_line(error), pause)
            time.sleep(pause)
            pause = min(2 * pause, 30.0)


def _host() -> str | None:
    from huggingface_hub import constants

    return urlsplit(constants.ENDPOINT).hostname


def _is_passing(error: Exception) -> bool:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status >= 500 or status in (408, 429)
    transport = type(error).__module__.partition(".")[0] in {"httpx", "httpx2", "httpcore", "requests", "urllib3"}
    return transport or isinstance(error, ConnectionError | TimeoutError) or "Consistency check failed" in str(error)


def explained(error: Exception, repo_id: str, revision: str | None) -> Exception:
    """The same failure, in one line that says what to do."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        who = f"the account of your token ({_source()})" if token() else "an account, then `hf auth login` or HF_TOKEN"
        return PermissionError(f"{repo_id}: gated: accept its terms at {PUBLIC_HUB}/{repo_id} with {who}")
    if isinstance(error, errors.RevisionNotFoundError):
        return FileNotFoundError(f"{repo_id}: no revision {revision or 'of that name'}; see {PUBLIC_HUB}/{repo_id}")
    if isinstance(error, errors.RepositoryNotFoundError):
        hint = f" to the account of your token ({_source()})" if token() else "; if it is private, set HF_TOKEN"
        return FileNotFoundError(f"{repo_id}: no such repository, or private{hint}{_similar(repo_id)}")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return PermissionError(f"{repo_id}: {_not_allowed(status)}")
    if isinstance(error, json.JSONDecodeError):
        cure = "is HF_ENDPOINT a hub, and is there a login page or proxy between?"
        return OSError(f"{repo_id}: {_host()} answers with something that is not JSON; {cure}")
    if isinstance(error, errors.HFValidationError):
        return ValueError(f"{repo_id}: neither a directory here nor a repository id such as Qwen/Qwen3-0.6B")
    if constants.HF_HUB_OFFLINE:
        why = f"not completely in the cache, and HF_HUB_OFFLINE is set{_similar(repo_id)}"
        return FileNotFoundError(f"{repo_id}: {why}; correct the name, or unset HF_HUB_OFFLINE and run tt download")
    if _is_passing(error) or isinstance(error, errors.LocalEntryNotFoundError):
        return ConnectionError(f"{repo_id}: {_host()}: {_first_line(error)}; run the same command again, it resumes")
    if isinstance(error, OSError | ValueError) and not isinstance(error, errors.HfHubHTTPError):
        text = redact(str(error))
        return error if text == str(error) else (OSError if isinstance(error, OSError) else ValueError)(text)
    return OSError(f"{repo_id}: {_first_line(error)}")


def _not_allowed(status: int) -> str:
    host = _host()
    if not token():
        return f"{host} asks for a login ({status}); run `hf auth login`, or set HF_TOKEN"
    if status == 401:
        return f"{host} does not accept your token ({_source()}; {status}); run `hf auth login`, or set HF_TOKEN"
    return f"your token ({_source()}) does not allow this ({status}); use one with more rights, or another repository"


def _source() -> str:
    """The source of the token: its name, never its value."""
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    return next((name for name in names if os.environ.get(name)), "of hf auth login")


def _first_line(error: Exception) -> str:
    lines = redact(str(error)).strip().splitlines()
    text = lines[0][:200] if lines else type(error).__name__
    return text if text.isprintable() else ascii(text)[1:-1]


def _similar(repo_id: str) -> str:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    cached = [entry.name.removeprefix("models--").replace("--", "/") for entry in cache.glob("models--*")]
    close = difflib.get_close_matches(repo_id, cached, 1, 0.6)
    return f"; did you mean {close[0]}, which is in the cache?" if close and close[0] != repo_id else ""
