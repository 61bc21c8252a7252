"""What to type to run an exported model elsewhere, and what of an adapter the other programs refuse."""

import re
from pathlib import Path

from tt_peft.adapter_files.folder import read_adapter_config
from tt_peft.adapter_files.peft_config import config_from_peft
from tt_train.errors import shell_word
from tt_train.models.gguf import unusual

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes for --max-lora-rank

TRAINED_ON_NF4 = "the adapter was trained on a base in 4 bits (NF4); on the base's own weights its answers may differ"


def commands(path: Path, to: str) -> list[str]:
    """For a model: a directory (``to``: hf, ollama) or a file (gguf)."""
    word = shell_word(path)
    if to == "ollama":
        return [f"ollama create {_name(path)} -f {shell_word(path / 'Modelfile')}", f"ollama run {_name(path)}"]
    if to == "gguf":
        return [f"llama-cli -m {word} --jinja", f"llama-server -m {word} --jinja"]
    return [
        f"vllm serve {word}",
        f"python -m sglang.launch_server --model-path {word}",
        f"tt export {word} -o {shell_word(f'{path}.gguf')} --to gguf --type q8_0",
    ]


def adapter_commands(path: Path, to: str, base: Path, rank: int) -> list[str]:
    """The same for an adapter of ``base`` at ``path``; ``rank``: its largest."""
    word, on, name = shell_word(path), shell_word(base), _name(path)
    if to == "gguf":
        model = shell_word(f"{base.name}.gguf")
        return [f"tt export {on} -o {model} --to gguf", f"llama-cli -m {model} --lora {word} --jinja"]
    most = next((one for one in VLLM_RANKS if one >= rank), VLLM_RANKS[-1])
    lora = f"--enable-lora --max-lora-rank {most} --lora-modules {name}={word}"
    return [f"vllm serve {on} {lora}", f"python -m sglang.launch_server --model-path {on} --lora-paths {name}={word}"]


def adapter_warnings(adapter: Path, *, trained_on_nf4: bool) -> list[str]:
    """Sentences on what vLLM refuses of an adapter folder, or on what it computes otherwise."""
    settings = read_adapter_config(adapter)
    config = config_from_peft(settings, adapter / "adapter_config.json")
    merge = "leave out --adapter to merge it"
    found = [f"vLLM refuses an adapter with {what}; {merge}" for what in unusual(settings, config)]
    if (rank := largest_rank(adapter)) > VLLM_RANKS[-1]:
        found.append(f"vLLM serves ranks up to {VLLM_RANKS[-1]}, this adapter has {rank}; {merge}")
    if trained_on_nf4:
        found.append(TRAINED_ON_NF4)
    return found


def largest_rank(adapter: Path) -> int:
    """Of all layers of an adapter folder."""
    config = config_from_peft(read_adapter_config(adapter), adapter / "adapter_config.json")
    return max([config.rank, *config.rank_pattern.values()])


def _name(path: Path) -> str:
    found = re.sub(r"[^\w.-]+", "-", path.resolve().name.removesuffix(".gguf"), flags=re.ASCII).strip("-.")
    return found or "model"
