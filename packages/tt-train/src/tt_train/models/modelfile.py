"""A Modelfile for Ollama: a template, stop words and parameters. https://docs.ollama.com/modelfile

No text of a model's files can become an instruction of the Modelfile.
"""

from collections.abc import Mapping
from typing import Any

from tt_data.template.prompts import get_instruct_template
from tt_train.models.ollama import ANSWER, USER, go_template, literal, render_words
from tt_train.records.run_files import number

MARK = '"'
MAX_NUM_CTX = 8192  # Ollama reserves memory for all of it
_PARAMETERS = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
               "repetition_penalty": "repeat_penalty"}  # fmt: skip


def ollama_modelfile(
    tokenizer: Any,
    *,
    form: str = "chat",
    config: Mapping[str, Any] | None = None,
    generation: Mapping[str, Any] | None = None,
    source: str = ".",
) -> str:
    """A Modelfile for the folder that it is in, or for the GGUF file ``source`` there.

    ``form``: from ``prompt_form``: ``chat``, ``text`` or the name of an instruct template.
    ``config`` and ``generation``: the contents of config.json and generation_config.json. They give the length of the
    context (at most ``MAX_NUM_CTX``) and the sampling parameters.

    Raises:
        ConfigError: if no Go template renders as the chat template does.
    """
    lines = [f"FROM {source}"]
    if form != "chat":
        lines.append(f"TEMPLATE {3 * MARK}{text_template(form)}{3 * MARK}")
    elif tokenizer.has_chat_template:
        template = go_template(tokenizer)
        lines += [f"# {note}" for note in notes(tokenizer)]
        # Ollama writes a template with .Messages in single marks if it contains none.
        mark = MARK if ".Messages" in template and MARK not in template else 3 * MARK
        lines.append(f"TEMPLATE {mark}{template}{mark}")
    lines += [f"PARAMETER stop {quoted(stop)}" for stop in stops(tokenizer)]
    lines += [f"PARAMETER {name} {value:g}" for name, value in parameters(config or {}, generation or {}).items()]
    return "\n".join(lines) + "\n"


def notes(tokenizer: Any) -> list[str]:
    """What a Modelfile cannot express of the chat template, one line each."""
    if not tokenizer.has_chat_template:
        return []
    found = []
    if not all(map(is_stop, stops(tokenizer, written=False))):
        found.append("a token that ends a turn has line breaks or quotation marks in it; Ollama does not stop at it")
    if "strftime_now" in str(tokenizer.templates.get("default")):
        found.append("the chat template writes today's date; the Modelfile keeps the date of this export")
    if f" {USER} " not in render_words(tokenizer, [f" {USER} "]):
        found.append("the chat template strips white space around a message; Ollama keeps it")
    if "0THOUGHT0" not in render_words(tokenizer, [USER, f"<think>\n0THOUGHT0\n</think>\n\n{ANSWER}", "1USER1"]):
        found.append("the chat template leaves the reasoning of earlier answers out; Ollama keeps it")
    return found


def text_template(form: str) -> str:
    """Ollama's template for a run on rows that are not chats: the words of its prompts around ``.Prompt``."""
    before = after = ""
    if form != "text":
        instruct = get_instruct_template(form)
        before, _, after = instruct.format({instruct.columns[0]: USER}).partition(USER)
    return f"{literal(before)}{{{{ .Prompt }}}}{literal(after.rstrip(' '))}{{{{ .Response }}}}"


def quoted(text: str) -> str:
    """``text`` of one line in quotation marks; Ollama has no escapes for them."""
    mark = 3 * MARK if MARK in text else MARK
    return f"{mark}{text}{mark}"


def is_stop(text: str) -> bool:
    """Whether a Modelfile can contain a token: Ollama ends a text at three quotation marks or at a line break."""
    return text.isprintable() and 3 * MARK not in text


def stops(tokenizer: Any, *, written: bool = True) -> list[str]:
    """The special tokens that end a turn. An ordinary word that ends one is left to the model's files."""
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
        found.setdefault("repeat_penalty", 1.0)  # Ollama's default is different
    return found
