"""Models to the hub: only the files of a model, with a model card and without secrets. Checked by hash."""

import fnmatch
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tt_ckpt.commit import sha256_of
from tt_ckpt.files import COPY_BYTES, inside, read_bytes, read_json, regular
from tt_ckpt.hub.download import api
from tt_ckpt.hub.endpoint import check_endpoint
from tt_ckpt.hub.failures import explained
from tt_ckpt.hub.names import check_repo_id, check_revision
from tt_ckpt.redaction import secret_line
from tt_ckpt.safe_names import safe_file
from tt_ckpt.shown import format_size, listed, plain

WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "adapter_model.safetensors",
           "adapter_model-*-of-*.safetensors")  # fmt: skip
INDEXES = ("model.safetensors.index.json", "adapter_model.safetensors.index.json")
SENT = (
    *WEIGHTS, *INDEXES, "config.json", "generation_config.json", "adapter_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "tokenizer.model*", "spiece.model", "sentencepiece*.model", "*.tiktoken", "tekken.json", "chat_template.jinja",
    "chat_template.json", "additional_chat_templates/*.jinja", "preprocessor_config.json", "processor_config.json",
    "README.md", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
_FOLDERS = ("additional_chat_templates",)
_REPO_ID = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*", re.ASCII)
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
    """The result of ``upload``, or of its ``dry_run``. Plain data."""

    repo_id: str
    url: str
    commit: str | None
    files: list[str]
    num_bytes: int
    num_verified: int
    private: bool
    seconds: float
    left_out: list[str] = field(default_factory=list)


def upload(
    path: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    revision: str | None = None,
    message: str = "Upload with tt",
    allow: Sequence[str] = SENT,
    ignore: Sequence[str] = (),
    base_model: str | None = None,
    dry_run: bool = False,
) -> Upload:
    """Commit a model or adapter directory to a repository, which is made (private by default) if it does not exist.

    Only the files of a model are sent; ``left_out`` names the others. ``allow``, ``ignore``: patterns of names, each
    for one folder (``*`` does not match ``/``). If neither the directory nor the repository has a README.md, one is
    written that names ``base_model``. ValueError if a file contains a secret, or is a link or a special file. The files
    that have arrived are compared by hash.
    """
    started = time.monotonic()
    check_endpoint()
    from huggingface_hub import CommitOperationAdd

    check_repo_id(repo_id)
    check_revision(revision)
    folder = Path(path)
    names, left_out = _select(folder, allow, ignore)
    for name in names:
        _refuse_secrets(folder, name)
    card = None if "README.md" in names else model_card(folder, repo_id, base_model=base_model).encode()
    if card and secret_line(card.decode()) is not None:
        raise ValueError(f"{plain(folder)}: its config has a secret in it; remove it before uploading")
    size = sum((folder / name).stat().st_size for name in names) + len(card or b"")
    files = sorted([*names, *(["README.md"] if card else [])])
    url, commit, verified = "", None, 0
    if not dry_run:
        operations = [CommitOperationAdd(name, str(folder / name)) for name in names]
        operations += [CommitOperationAdd("README.md", card)] if card else []
        try:
            hub = api()
            created = str(hub.create_repo(repo_id, private=private, exist_ok=True))
            url = re.sub(r"(?<=://)[^/?#]*@", "", created)  # HF_ENDPOINT may have a password
            there = hub.model_info(repo_id, revision=revision).siblings or [] if card else []
            if any(sibling.rfilename == "README.md" for sibling in there):  # somebody may have written it: it stays
                operations.pop()
                files.remove("README.md")
            done = hub.create_commit(repo_id, operations, commit_message=message, revision=revision)
            commit = done.oid
            verified = _check_arrived(hub, repo_id, commit, folder, names)
        except Exception as error:
            raise explained(error, repo_id, revision) from None
    return Upload(repo_id=repo_id, url=url, commit=commit, files=files, num_bytes=size, num_verified=verified,
                  private=private, seconds=round(time.monotonic() - started, 3), left_out=left_out)  # fmt: skip


def _select(folder: Path, allow: Sequence[str], ignore: Sequence[str]) -> tuple[list[str], list[str]]:
    """The names of the files to send, and of those left out; folders are named ``name/``."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{plain(folder)}: no such directory; give a model or adapter directory")
    places = [folder, *(folder / name for name in _FOLDERS if (folder / name).is_dir())]
    names, left_out = [], []
    weights = _indexed(folder)
    for place in places:
        inside(place, folder)
        for file in sorted(place.iterdir()):
            name = file.relative_to(folder).as_posix()
            if name in _FOLDERS and file.is_dir():
                continue
            wanted = any(_matches(name, pattern) for pattern in allow) and not any(_matches(name, p) for p in ignore)
            if name.endswith(".safetensors") and weights is not None and name not in weights:
                wanted = False  # the index does not name it
            if not wanted:
                left_out.append(f"{name}/" if file.is_dir() and not file.is_symlink() else name)
                continue
            if file.is_symlink() and not _is_cached(file, folder):
                raise ValueError(f"{plain(file)}: refused: a link; copy the file there, or remove the link")
            regular(file, folder)
            names.append(name)
    if not any(name.endswith(".safetensors") for name in names):
        raise ValueError(
            f"{plain(folder)}: no safetensors files to upload (expected model.safetensors, or those that"
            f" model.safetensors.index.json names, or adapter_model.safetensors); give a model or adapter directory"
        )
    if weights is not None and (missing := sorted(weights - set(names))):
        raise ValueError(f"{plain(folder)}: the index names files that do not exist: {listed(missing)}; fetch them")
    return names, left_out


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern)


def _is_cached(file: Path, folder: Path) -> bool:
    """Whether the file is a link of the hub's cache."""
    snapshot = folder.resolve()
    return snapshot.parent.name == "snapshots" and file.resolve().parent == snapshot.parents[1] / "blobs"


def _indexed(folder: Path) -> set[str] | None:
    """The weight files that the index names; None without an index."""
    for name in INDEXES:
        if (folder / name).exists():
            index = read_json(folder / name, folder)
            where = index.get("weight_map") if isinstance(index, dict) else None
            if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
                raise ValueError(f"{plain(folder / name)}: no weight_map of file names; write it again with tt convert")
            return set(where.values())
    return None


def _refuse_secrets(folder: Path, name: str) -> None:
    """ValueError with the line of a secret. Of weights only the header is read, which must be valid."""
    from tt_ckpt.safetensors_file import read_header

    file = folder / name
    if name.endswith(".safetensors"):
        metadata = read_header(file).metadata
        if secret_line(json.dumps(metadata, ensure_ascii=False)) is not None:
            raise ValueError(f"{plain(file)}: a secret in its __metadata__; write it without before uploading")
        return
    text = read_bytes(file, folder, limit=COPY_BYTES).decode("utf-8", "replace")
    line = secret_line(text)
    if line is None and name.endswith(".json"):
        value = read_json(file, folder, limit=COPY_BYTES)
        line = 1 if secret_line(json.dumps(value, ensure_ascii=False)) is not None else None  # in escapes
    if line is not None:
        raise ValueError(f"{plain(file)}:{line}: a secret (a token, key or password); remove it before uploading")


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


def _word(value: Any) -> str:
    """A name or number of a config, if it has no characters that Markdown or HTML would interpret."""
    text = str(value) if isinstance(value, str | int) else ""
    return text if re.fullmatch(r"[\w.-]{1,80}", text, re.ASCII) else "unknown"


def model_card(folder: Path, repo_id: str, *, base_model: str | None = None) -> str:
    """A README.md for the hub: what the model is, its size, and how to load it."""
    from tt_ckpt.safetensors_file import read_header

    adapter = (folder / "adapter_config.json").is_file()
    config = read_json(folder / ("adapter_config.json" if adapter else "config.json"))
    if not isinstance(config, dict):
        raise ValueError(f"{folder}: its config is not a JSON object, found {type(config).__name__}")
    base_model = base_model or (config.get("base_model_name_or_path") if adapter else None)
    if base_model and not _REPO_ID.fullmatch(str(base_model)):  # a local path means nothing to others
        base_model = None
    indexed = _indexed(folder)
    files = sorted(indexed or {file.name for file in folder.iterdir() if any(_matches(file.name, p) for p in WEIGHTS)})
    specs = [spec for name in files for spec in read_header(safe_file(folder, name)).tensors.values()]
    architectures = config.get("architectures") or [config.get("peft_type", config.get("model_type"))]
    tags = f"base_model: {base_model}\n" if base_model else ""
    name = repo_id.rpartition("/")[2]
    if adapter:
        what = f"An adapter (rank {_word(config.get('r'))}) for {base_model or 'a base model'}, trained with tt."
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
        architecture=", ".join(map(_word, architectures if isinstance(architectures, list) else [architectures])),
        parameters=f"{sum(spec.numel for spec in specs):,}",
        dtype=", ".join(sorted({str(spec.dtype).removeprefix("torch.") for spec in specs})),
        size=format_size(sum(spec.nbytes for spec in specs)),
        snippet=snippet,
    )
