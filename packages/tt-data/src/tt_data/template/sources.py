"""Where chat templates come from: built in, registered, a ``.jinja`` file, or the directory of a model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tt_data.files import read_object, read_text, regular
from tt_data.template.prompts import our_name
from tt_data.wording import did_you_mean

_MAX_BYTES = 1 << 20  # of a file; a template that is too large is refused when it is used
_MERGE_SYSTEM = (
    "{%- if messages[0]['role'] == 'system' -%}{%- set system = messages[0]['content'] -%}"
    "{%- set messages = messages[1:] -%}{%- else -%}{%- set system = '' -%}{%- endif -%}"
)
_INST = "{{- bos_token -}}{%- for message in messages -%}{%- if message['role'] == 'user' -%}{{- '[INST] ' "
CHAT_TEMPLATES = {
    "chatml": (
        "{%- set turn_end = '' -%}{%- for message in messages -%}"
        "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' -}}"
        "{%- if message['role'] == 'assistant' -%}{{- turn_end -}}{%- endif -%}{{- '\n' -}}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
    ),
    "llama2": _MERGE_SYSTEM + _INST + (
        "+ ('<<SYS>>\n' + system + '\n<</SYS>>\n\n' if loop.first and system else '') "
        "+ message['content'] + ' [/INST]' -}}"
        "{%- else -%}{{- ' ' + message['content'] + ' ' + eos_token -}}"
        "{%- if not loop.last -%}{{- bos_token -}}{%- endif -%}{%- endif -%}{%- endfor -%}"
    ),
    "mistral": _MERGE_SYSTEM + _INST + (
        "+ (system + '\n\n' if loop.first and system else '') + message['content'] + ' [/INST]' -}}"
        "{%- else -%}{{- ' ' + message['content'] + eos_token -}}{%- endif -%}{%- endfor -%}"
    ),
    "llama3": (
        "{%- set turn_end = '' -%}{{- bos_token -}}{%- for message in messages -%}{{- '<|start_header_id|>' + "
        "message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' -}}"
        "{%- if message['role'] == 'assistant' -%}{{- turn_end -}}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}"
    ),
    "gemma": _MERGE_SYSTEM + (
        "{%- set turn_end = '' -%}{{- bos_token -}}{%- for message in messages -%}"
        "{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' "
        "+ (system + '\n\n' if loop.first and system else '') + message['content'] | trim + '<end_of_turn>' -}}"
        "{%- if message['role'] == 'assistant' -%}{{- turn_end -}}{%- endif -%}{{- '\n' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}"
    ),
    "zephyr": (
        "{%- for message in messages -%}"
        "{{- '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' -}}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}"
    ),
    "plain": (
        "{{- bos_token -}}{%- for message in messages -%}{%- if message['role'] == 'assistant' -%}"
        "{{- 'Assistant: ' + message['content'] + eos_token + '\n\n' -}}"
        "{%- else -%}{{- message['role'] | capitalize + ': ' + message['content'] + '\n\n' -}}{%- endif -%}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}"
    ),
}  # fmt: skip

_END_TOKENS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}


def named_template(name: str, knows: Callable[[str], object]) -> tuple[dict[str, str], str]:
    """The built-in or registered template of that name, or that of a ``.jinja`` file; and its name in messages.

    ``knows`` gives the id of a token, or None. If the model does not know the token that ends the turns of a built-in
    template, its eos token follows the text of that token, so that generation stops. Raises ValueError with the nearest
    name, or FileNotFoundError.
    """
    name = our_name(name)
    if name in CHAT_TEMPLATES:
        source = CHAT_TEMPLATES[name]
        if name in _END_TOKENS and knows(_END_TOKENS[name]) is None:
            source = source.replace("set turn_end = ''", "set turn_end = eos_token", 1)
        return {"default": source}, f"built-in template {name}"
    path = Path(name)
    if path.suffix in (".jinja", ".jinja2", ".j2"):
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such template file (looked in {Path.cwd()})")
        return {"default": read_template(path.resolve())}, str(path)  # named by the user: it may be a link
    hint = did_you_mean(name, CHAT_TEMPLATES)
    raise ValueError(f"unknown template {name!r}, expected one of {', '.join(CHAT_TEMPLATES)} or a .jinja file{hint}")


def register_chat_template(name: str, source: str) -> None:
    """Register a Jinja chat template under ``name``."""
    CHAT_TEMPLATES[name] = source


def find_templates(folders: Sequence[Path]) -> tuple[dict[str, str], str]:
    """The chat templates of the first folder that has any, and the file they came from."""
    found = (_find_in(folder, read_object(folder / "tokenizer_config.json")) for folder in folders)
    return next((pair for pair in found if pair[0]), ({}, str(folders[-1] / "tokenizer_config.json")))


def _find_in(directory: Path, config: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """The templates of a model directory by name (``default``, ``tool_use``, ...), and the file they came from.

    ``chat_template.jinja`` and ``additional_chat_templates/`` go before ``tokenizer_config.json``, as in transformers.
    """
    file, folder = directory / "chat_template.jinja", directory / "additional_chat_templates"
    templates: dict[str, str] = {}
    if os.path.lexists(file):
        templates["default"] = read_template(file, directory)
    if os.path.lexists(folder) and not regular(folder, directory, any_kind=True).is_dir():
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
    """The text of a .jinja file of the folder ``root``. Raises ValueError if it is not text, empty or too large."""
    text = read_text(path, root, limit=_MAX_BYTES)
    if not text.strip():
        raise ValueError(f"{path}: an empty template, which would write nothing of a conversation; remove the file")
    return text
