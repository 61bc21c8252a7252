"""What lies beside the weights so that other programs ask a model as it was trained."""

import json
from pathlib import Path
from typing import Any

import tt_data
from tt_data.instruct_templates import INSTRUCT_TEMPLATES
from tt_train.run_dir import is_run, read_json

TEMPLATE_FILE = "chat_template.jinja"
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
)


def own_template(tokenizer: Any, template: str | None) -> str | None:
    """The Jinja text of ``data.template``; None where a run keeps the model's own, or trains on an instruct template.

    ``tokenizer``: the one that ``tt_data.choose_template`` gave.
    """
    if template is None or template in INSTRUCT_TEMPLATES:
        return None
    return str(tokenizer.templates["default"])


def run_template(folder: Path) -> str | None:
    """What to give ``tt_data.choose_template`` for a run: its saved template, or the name in its config."""
    if not is_run(folder):
        return None
    if (folder / TEMPLATE_FILE).is_file():
        return str(folder / TEMPLATE_FILE)
    data = (read_json(folder / "manifest.json").get("config") or {}).get("data") or {}
    name = data.get("template")
    return None if name is None else str(name)


def serving_files(tokenizer: Any, template: str | None, source: Path | None) -> dict[str, str | Path]:
    """Files for ``tt_ckpt.save_hf(files=...)`` where a run brought its own template: the template, and
    generation_config.json with the tokens that end a turn in it, or a server would write on behind them."""
    text = own_template(tokenizer, template)
    if text is None:
        return {}
    file = None if source is None else source / "generation_config.json"
    generation = json.loads(file.read_text(encoding="utf-8")) if file is not None and file.is_file() else {}
    generation["eos_token_id"] = list(tokenizer.eos_ids)
    return {TEMPLATE_FILE: text, "generation_config.json": json.dumps(generation, indent=2) + "\n"}


def tokenizer_files(folder: Path | None) -> dict[str, str | Path]:
    """The tokenizer's files of a folder (or beside a file) named by ``model.tokenizer``."""
    if folder is None:
        return {}
    place = folder if folder.is_dir() else folder.parent
    found = {file for pattern in _TOKENIZER_FILES for file in place.glob(pattern) if file.is_file()}
    return {file.name: file for file in sorted(found)}


def run_tokenizer(folder: Path) -> Path | None:
    """``model.tokenizer`` of a run, where it names one."""
    if not is_run(folder):
        return None
    section = (read_json(folder / "manifest.json").get("config") or {}).get("model") or {}
    return Path(section["tokenizer"]) if section.get("tokenizer") else None


def load_run_tokenizer(folder: Path, source: Path) -> Any:
    """The tokenizer of a run, adapter or model, with the template that it was trained with; ``source``: its base."""
    return tt_data.choose_template(tt_data.load_tokenizer(run_tokenizer(folder) or source), run_template(folder))
