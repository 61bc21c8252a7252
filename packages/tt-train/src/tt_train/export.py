"""A trained model in the form that another program reads, and the commands to run it there."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tt_train.errors import ConfigError, did_you_mean
from tt_train.merge import merge_run, model_source, refuse_full
from tt_train.ollama import go_template, ollama_modelfile
from tt_train.serving import load_run_tokenizer, run_tokenizer

__all__ = ["FORMATS", "commands", "export", "go_template", "ollama_modelfile"]

FORMATS = ("hf", "ollama")


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
