"""Models from the hub and to it, through huggingface_hub: its cache, its environment variables, its tokens."""

from pathlib import Path

WANTED = ("*.safetensors", "*.json", "*.model", "*.tiktoken", "*.jinja", "merges.txt", "vocab.*", "LICENSE*", "NOTICE*")


def snapshot(repo_id: str, *, revision: str | None = None) -> Path:
    """The local snapshot of a repository: safetensors, JSON and tokenizer files, from the cache where possible."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(WANTED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        first = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{repo_id}: no directory here and no repository to be had: {first}") from None
