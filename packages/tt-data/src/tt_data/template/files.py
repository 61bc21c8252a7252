"""Where a model's chat templates are: files of their own, or a key of a config."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tt_data.files import inside, read_object, read_text

_MAX_BYTES = 1 << 20  # of a file; a template that is too large is refused when it is used


def find_chat_template(directory: Path, config: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """The templates of a model directory by name (``default``, ``tool_use``, ...), and the file they came from.

    ``chat_template.jinja`` and ``additional_chat_templates/`` go before ``tokenizer_config.json``, as in transformers.
    """
    file, folder = directory / "chat_template.jinja", directory / "additional_chat_templates"
    templates: dict[str, str] = {}
    if os.path.lexists(file):
        templates["default"] = read_template(file, directory)
    if os.path.lexists(folder) and not inside(folder, directory).is_dir():
        raise ValueError(f"{folder}: expected a folder of .jinja files")
    for extra in sorted(folder.glob("*.jinja")):
        templates[extra.stem] = read_template(extra, directory)
    if templates:
        return templates, str(file)
    source, origin = config.get("chat_template"), directory / "tokenizer_config.json"
    legacy = directory / "chat_template.json"
    if source is None and os.path.lexists(legacy):
        source, origin = read_object(legacy).get("chat_template"), legacy
        if source is None:
            raise ValueError(f"{legacy}: expected the key chat_template; add it, or remove the file")
    return _of_config(source, origin), str(origin)


def _of_config(source: Any, origin: Path) -> dict[str, str]:
    if source is None:
        return {}
    if isinstance(source, str):
        return {"default": source}
    try:
        found = {entry["name"]: entry["template"] for entry in source if entry["template"].strip()}
    except (TypeError, LookupError, AttributeError):
        found = {None: None}
    if not all(isinstance(text, str) for pair in found.items() for text in pair):
        raise ValueError(
            f"{origin}: chat_template must be text, or a list of objects with name and template; correct it, or name a "
            "template (data.template=chatml, llama3, ...)"
        )
    return found


def read_template(path: Path, root: Path | None = None) -> str:
    """The text of a .jinja file of the folder ``root``. Raises ValueError if it is no text, empty or too large."""
    text = read_text(path, root, limit=_MAX_BYTES)
    if not text.strip():
        raise ValueError(f"{path}: an empty template, which would write nothing of a conversation; remove the file")
    return text
