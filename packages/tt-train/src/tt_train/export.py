"""A trained model in the form that another program reads, and the commands to run it there."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tt_train.errors import ConfigError, did_you_mean
from tt_train.merge import merge_run, model_source, refuse_full
from tt_train.serving import load_run_tokenizer, run_tokenizer

FORMATS = ("hf", "ollama")
_SYSTEM, _USER, _ANSWER = "0SYSTEM0", "0USER0", "0ANSWER0"  # words that no template writes of its own


def export(
    path: str | Path,
    output: str | Path,
    *,
    to: str = "hf",
    dtype: torch.dtype | None = None,
    dry_run: bool = False,
    tell: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Write the model of a run, adapter or directory to ``output``, adapters merged, and say how to run it.

    ``to``: ``hf`` is a Hugging Face directory, which vLLM, SGLang and llama.cpp's converter read; ``ollama`` adds a
    Modelfile whose template renders as the model's own. ``tell`` hears what merging cost in precision.
    Returns plain data: the path, the format, the commands.

    Raises:
        ConfigError: an unknown format, an output that holds files, a template that no Modelfile can express.
    """
    if to not in FORMATS:
        raise ConfigError([f"--to: unknown format {to!r}{did_you_mean(to, FORMATS)}; known: {', '.join(FORMATS)}"])
    target = Path(output)
    refuse_full(target)
    modelfile = None
    if to == "ollama":
        source = run_tokenizer(Path(path)) or model_source(Path(path))
        if source is None:
            raise ConfigError([f"{path}: names no tokenizer"])
        modelfile = ollama_modelfile(load_run_tokenizer(Path(path), source))
    if not dry_run:
        merge_run(path, target, dtype=dtype, tell=tell)
        if modelfile is not None:
            (target / "Modelfile").write_text(modelfile, encoding="utf-8")
    return {"path": str(target), "to": to, "dry_run": dry_run, "commands": commands(target, to)}


def commands(folder: Path, to: str) -> list[str]:
    """What to type to run the exported model elsewhere."""
    path, name = shlex.quote(str(folder)), shlex.quote(folder.name)
    if to == "ollama":
        return [f"ollama create {name} -f {path}/Modelfile", f"ollama run {name}"]
    gguf = shlex.quote(f"{folder}.gguf")
    return [
        f"vllm serve {path}",
        f"python convert_hf_to_gguf.py {path} --outfile {gguf} --outtype bf16",
        f"llama-cli -m {gguf}",
    ]


def ollama_modelfile(tokenizer: Any) -> str:
    """A Modelfile for the folder that it lies in; its Go template is read off three renderings of the chat template.

    Raises:
        ConfigError: where the template is no plain sequence of system, user and assistant turns.
    """
    lines = ["FROM ."]
    if tokenizer.has_chat_template:
        lines.append(f'TEMPLATE """{go_template(tokenizer)}"""')
    stops = dict.fromkeys(tokenizer.decode([index], skip_special=False) for index in tokenizer.eos_ids)
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join(lines) + "\n"


def go_template(tokenizer: Any) -> str:
    """Ollama's template: what the chat template writes before, between and after the words of each turn."""
    user, answer = {"role": "user", "content": _USER}, {"role": "assistant", "content": _ANSWER}
    start = "" if tokenizer.bos_id is None else tokenizer.decode([tokenizer.bos_id], skip_special=False)

    def render(*turns: dict[str, str], prompt: bool) -> str:
        text: str = tokenizer.render(turns, add_generation_prompt=prompt)
        return text.removeprefix(start)  # Ollama puts the begin token there itself

    prompt, whole = render(user, prompt=True), render(user, answer, prompt=False)
    if prompt.count(_USER) != 1 or not whole.startswith(prompt) or whole.count(_ANSWER) != 1:
        raise ConfigError(["--to ollama: the chat template is no plain sequence of turns; use --to hf instead"])
    before_user, after_user = prompt.split(_USER)
    after_answer = whole.split(_ANSWER)[1]
    with_system = render({"role": "system", "content": _SYSTEM}, user, prompt=True)
    system = ""
    if with_system.count(_SYSTEM) == 1 and with_system.endswith(before_user + _USER + after_user):
        before, after = with_system.removesuffix(before_user + _USER + after_user).split(_SYSTEM)
        system = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{{{{ end }}}}"
    turn = f"{{{{ if .Prompt }}}}{before_user}{{{{ .Prompt }}}}{after_user}{{{{ end }}}}"
    return f"{system}{turn}{{{{ .Response }}}}{after_answer}"
