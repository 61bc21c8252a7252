"""Words of a Modelfile, written so that nothing of a model's files becomes another instruction in it."""

from collections.abc import Mapping
from typing import Any

from tt_train.run_files import number

MARK = '"'
MAX_NUM_CTX = 8192  # Ollama reserves memory for all of it
_PARAMETERS = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
               "repetition_penalty": "repeat_penalty"}  # fmt: skip


def quoted(text: str) -> str:
    """``text`` of one line between quotation marks, for which Ollama knows no escapes."""
    mark = 3 * MARK if MARK in text else MARK
    return f"{mark}{text}{mark}"


def is_stop(text: str) -> bool:
    """Whether a Modelfile can name a token; it ends a text at quotation marks before the end of a line."""
    return text.isprintable() and 3 * MARK not in text


def stops(tokenizer: Any, *, written: bool = True) -> list[str]:
    """The special tokens that end a turn; a word of the language that does is left to the model's own files."""
    ends = {index: tokenizer.decode([index], skip_special=False) for index in tokenizer.eos_ids}
    special = [text for index, text in ends.items() if text and not tokenizer.decode([index], skip_special=True)]
    return [text for text in dict.fromkeys(special) if not written or is_stop(text)]


def parameters(config: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    length = config.get("max_position_embeddings")
    if type(length) is int and length > 0:
        found["num_ctx"] = min(length, MAX_NUM_CTX)
    for key, name in _PARAMETERS.items():
        value = generation.get(key)
        if (figure := number(value)) is not None:
            found[name] = figure
    if generation.get("do_sample") is False:
        found["temperature"] = 0.0
    if generation:
        found.setdefault("repeat_penalty", 1.0)  # Ollama's own default is another
    return found
