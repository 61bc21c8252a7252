"""Models to the hub: weights as safetensors, a model card, nothing that looks like a secret; checked by hash."""

import fnmatch
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tt_ckpt.commit import sha256_of
from tt_ckpt.files import read_json
from tt_ckpt.hub import UNWANTED, WANTED, api, check_endpoint, explained
from tt_ckpt.names import safe_file
from tt_ckpt.redact import holds_secret
from tt_ckpt.shown import format_size

_REPO_ID = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*", re.ASCII)
_TEXT = (".json", ".md", ".txt", ".jinja", ".yaml", ".yml", ".py", ".cfg", ".toml")
_CARD = """---
library_name: {library}
{tags}---

# {name}

{what}

| | |
|---|---|
| architecture | {architecture} |
| parameters | {parameters} |
| data type | {dtype} |
| size | {size} |

```python
{snippet}
```
"""


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What ``upload`` did, or with ``dry_run`` would do. Plain data."""

    repo_id: str
    url: str
    commit: str | None
    files: list[str]
    num_bytes: int
    num_verified: int
    private: bool
    seconds: float


def upload(
    path: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    revision: str | None = None,
    message: str = "Upload with tt",
    allow: Sequence[str] = WANTED,
    ignore: Sequence[str] = UNWANTED,
    base_model: str | None = None,
    dry_run: bool = False,
) -> Upload:
    """Commit a model or adapter directory to a repository, which is made (private by default) where it does not exist.

    A README.md is written for it if neither the directory nor the repository has one; ``base_model`` is named in it.
    Text files that hold a token are a ValueError. What has arrived is compared by hash.
    """
    from huggingface_hub import CommitOperationAdd

    started = time.monotonic()
    check_endpoint()
    folder = Path(path)
    names = _select(folder, allow, ignore)
    card = None if "README.md" in names else model_card(folder, repo_id, base_model=base_model).encode()
    for name in names:
        if name.endswith(_TEXT) and holds_secret((folder / name).read_text("utf-8", "replace")):
            raise ValueError(f"{folder / name}: holds a token; remove it before uploading")
    size = sum((folder / name).stat().st_size for name in names) + len(card or b"")
    files = sorted([*names, *(["README.md"] if card else [])])
    url, commit, verified = "", None, 0
    if not dry_run:
        operations = [CommitOperationAdd(name, str(folder / name)) for name in names]
        operations += [CommitOperationAdd("README.md", card)] if card else []
        try:
            hub = api()
            url = str(hub.create_repo(repo_id, private=private, exist_ok=True))
            if card and "README.md" in _names_there(hub, repo_id, revision):  # perhaps a person's: it stays
                operations.pop()
                files.remove("README.md")
            done = hub.create_commit(repo_id, operations, commit_message=message, revision=revision)
            commit = done.oid
            verified = _check_arrived(hub, repo_id, commit, folder, names)
        except Exception as error:
            raise explained(error, repo_id, revision) from None
    return Upload(repo_id=repo_id, url=url, commit=commit, files=files, num_bytes=size, num_verified=verified,
                  private=private, seconds=round(time.monotonic() - started, 3))  # fmt: skip


def _select(folder: Path, allow: Sequence[str], ignore: Sequence[str]) -> list[str]:
    """The files to send: matching ones of the folder itself and of its visible sub-folders, links staying inside."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such directory")
    names = []
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        hidden = any(part.startswith(".") for part in name.split("/"))
        wanted = any(fnmatch.fnmatch(name, pattern) for pattern in allow)
        if file.is_file() and wanted and not hidden and not any(fnmatch.fnmatch(name, pattern) for pattern in ignore):
            safe_file(file.parent, file.name)
            names.append(name)
    if not any(name.endswith(".safetensors") for name in names):
        raise ValueError(f"{folder}: no safetensors files to upload; give a model or adapter directory")
    return names


def _names_there(hub: Any, repo_id: str, revision: str | None) -> set[str]:
    return {sibling.rfilename for sibling in hub.model_info(repo_id, revision=revision).siblings or []}


def _check_arrived(hub: Any, repo_id: str, commit: str, folder: Path, names: Sequence[str]) -> int:
    info = hub.model_info(repo_id, revision=commit, files_metadata=True)
    held = {sibling.rfilename: sibling for sibling in info.siblings or []}
    verified = 0
    for name in names:
        if name not in held:
            raise OSError(f"{repo_id}: {name} did not arrive; upload again")
        lfs = held[name].lfs
        if lfs is not None:
            if lfs.sha256 != sha256_of(folder / name):
                raise OSError(f"{repo_id}: {name} arrived damaged (its hash differs); upload again")
            verified += 1
    return verified


def model_card(folder: Path, repo_id: str, *, base_model: str | None = None) -> str:
    """A README.md for the hub: what it is, how large, how to load it."""
    from tt_ckpt.tensor_file import read_header

    adapter = (folder / "adapter_config.json").is_file()
    config = read_json(folder / ("adapter_config.json" if adapter else "config.json"))
    if not isinstance(config, dict):
        raise ValueError(f"{folder}: its config is no JSON object, found {type(config).__name__}")
    base_model = base_model or (config.get("base_model_name_or_path") if adapter else None)
    if base_model and not _REPO_ID.fullmatch(str(base_model)):  # a path says nothing to others
        base_model = None
    specs = [spec for file in sorted(folder.glob("*.safetensors")) for spec in read_header(file).tensors.values()]
    architectures = config.get("architectures") or [config.get("peft_type", config.get("model_type"))]
    tags = f"base_model: {base_model}\n" if base_model else ""
    name = repo_id.rpartition("/")[2]
    if adapter:
        what = f"An adapter (rank {config.get('r', '?')}) for {base_model or 'a base model'}, trained with tt."
        snippet = f'from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base, "{repo_id}")'
    else:
        what = f"A model fine-tuned with tt{f' from {base_model}' if base_model else ''}."
        load = f'model = AutoModelForCausalLM.from_pretrained("{repo_id}")'
        snippet = f"from transformers import AutoModelForCausalLM\n\n{load}"
    return _CARD.format(
        library="peft" if adapter else "transformers",
        tags=tags + "tags:\n- tt\n",
        name=name,
        what=what,
        architecture=", ".join(map(str, architectures)),
        parameters=f"{sum(spec.numel for spec in specs):,}",
        dtype=", ".join(sorted({str(spec.dtype).removeprefix("torch.") for spec in specs})),
        size=format_size(sum(spec.nbytes for spec in specs)),
        snippet=snippet,
    )
