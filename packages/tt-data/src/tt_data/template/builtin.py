"""Chat templates for models that bring none."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from tt_data.template.files import read_template
from tt_data.template.instruct import our_name
from tt_data.text.tokenizer import Tokenizer

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


def with_named_template(tokenizer: Tokenizer, name: str) -> Tokenizer:
    """``tokenizer`` with a built-in or registered chat template, or that of a ``.jinja`` file.

    Where the model does not know the token with which a built-in template ends a turn, its eos token follows the text
    of that token, so that there is something to stop at. Raises ValueError with the nearest name, or FileNotFoundError.
    """
    name = our_name(name)
    if name in CHAT_TEMPLATES:
        source = CHAT_TEMPLATES[name]
        if name in _END_TOKENS and tokenizer.token_id(_END_TOKENS[name]) is None:
            source = source.replace("set turn_end = ''", "set turn_end = eos_token", 1)
        return tokenizer.with_template({"default": source}, f"built-in template {name}")
    path = Path(name)
    if path.suffix in (".jinja", ".jinja2", ".j2"):
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such template file (looked from {Path.cwd()})")
        source = read_template(path.resolve())  # named by the user: wherever it leads
        return tokenizer.with_template({"default": source}, str(path))
    near = get_close_matches(name, CHAT_TEMPLATES, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown template {name!r}, expected one of {', '.join(CHAT_TEMPLATES)} or a .jinja file{hint}")


def register_chat_template(name: str, source: str) -> None:
    """Make a Jinja chat template known by ``name``."""
    CHAT_TEMPLATES[name] = source
