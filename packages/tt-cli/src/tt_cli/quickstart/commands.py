"""The commands of the quickstart, word for word what it runs itself, and the sizes in them."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

PREFERENCE_WORDS = ("loss.beta=0.3", "loss.sft_weight=0.5")  # nearer the model as it was; right answers stay likely


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training stage: rows, and the settings that differ between the stages."""

    num_rows: int  # of preferences: questions that are asked; each wrong answer becomes a row
    max_steps: int
    learning_rate: float
    batch_size: int = 32


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of the model, of its training stages and of the held-out rows."""

    hidden_size: int = 128
    num_hidden_layers: int = 3
    vocab_size: int = 512
    rank: int = 16
    num_held_out: int = 200
    num_base_held_out: int = 100
    pretrain: Stage = Stage(num_rows=3570, max_steps=700, learning_rate=2e-3)
    finetune: Stage = Stage(num_rows=9600, max_steps=600, learning_rate=4e-3)
    preferences: Stage = Stage(num_rows=2000, max_steps=120, learning_rate=1e-3)


@dataclass(frozen=True)
class Folders:
    """Where everything lies under the output directory."""

    root: Path

    @property
    def pretrain_rows(self) -> Path:
        return self.root / "data" / "pretrain.jsonl"

    @property
    def finetune_rows(self) -> Path:
        return self.root / "data" / "finetune.jsonl"

    @property
    def held_out_rows(self) -> Path:
        return self.root / "data" / "held_out.jsonl"

    @property
    def blank(self) -> Path:
        return self.root / "blank"

    @property
    def pretrain_run(self) -> Path:
        return self.root / "runs" / "pretrain"

    @property
    def base(self) -> Path:
        return self.pretrain_run / "model"

    @property
    def lora_run(self) -> Path:
        return self.root / "runs" / "lora"

    @property
    def merged(self) -> Path:
        return self.root / "merged"

    @property
    def pair_rows(self) -> Path:
        return self.root / "data" / "pairs.jsonl"

    @property
    def dpo_run(self) -> Path:
        return self.root / "runs" / "dpo"

    @property
    def report(self) -> Path:
        return self.root / "report.html"


def pretrain_words(folders: Folders, scale: Scale, *, seed: int) -> list[str]:
    """The ``key=value`` words that train the blank model in full."""
    words = [word("model.path", folders.blank), word("data.train", folders.pretrain_rows), "adapter=null"]
    return words + _stage_words(scale.pretrain, seed)


def lora_words(folders: Folders, scale: Scale, *, seed: int) -> list[str]:
    """The ``key=value`` words that train an adapter on the base, with rows of the target kind alone."""
    rows = [word("data.train", folders.finetune_rows), word("data.eval", folders.held_out_rows)]
    rows += [f"eval_every={max(scale.finetune.max_steps // 4, 1)}"]
    return [word("model.path", folders.base), *rows, *_adapter_words(scale), *_stage_words(scale.finetune, seed)]


def dpo_words(folders: Folders, scale: Scale, *, seed: int) -> list[str]:
    """The ``key=value`` words that train a new adapter on the merged model, with pairs of right and wrong answers."""
    words = [word("model.path", folders.merged), word("data.train", folders.pair_rows)]
    return [*words, *PREFERENCE_WORDS, *_adapter_words(scale), *_stage_words(scale.preferences, seed)]


def both_words(folders: Folders, scale: Scale, *, seed: int) -> list[str]:
    """The same with rows of all kinds, so that what the base knew is kept."""
    both = replace(scale.finetune, max_steps=2 * scale.finetune.max_steps)
    rows = [word("data.train", [folders.finetune_rows, folders.pretrain_rows])]
    return [word("model.path", folders.base), *rows, *_adapter_words(scale), *_stage_words(both, seed)]


def _adapter_words(scale: Scale) -> list[str]:
    return [f"adapter.rank={scale.rank}", f"adapter.alpha={2 * scale.rank}", "adapter.target_modules=all-linear"]


def _stage_words(stage: Stage, seed: int) -> list[str]:
    return [
        f"max_steps={stage.max_steps}",
        f"batch_size={stage.batch_size}",
        f"micro_batch_size={stage.batch_size}",
        f"optimizer.lr={stage.learning_rate}",
        "model.dtype=fp32",
        "device=cpu",
        "data.max_seq_len=128",
        "samples.max_new_tokens=16",
        f"seed={seed}",
    ]


def word(key: str, value: Path | Sequence[Path]) -> str:
    """``key=value``; quoted where a path alone would not be read back as it is, since values are YAML."""
    import yaml

    if not isinstance(value, Path):
        return f"{key}={json.dumps([str(path) for path in value])}"
    text = str(value)
    try:
        same = yaml.safe_load(text) == text
    except yaml.YAMLError:
        same = False
    return f"{key}={text if same else json.dumps(text)}"


def run_command(recipe: str, words: Sequence[str], output: Path) -> str:
    """``tt run RECIPE ...`` as it is typed."""
    return typed("tt", "run", recipe, *words, "-o", output)


def chat_command(folders: Folders, question: str) -> str:
    """One turn of chat with the adapted model."""
    return f"{typed('echo', question)} | {typed('tt', 'chat', folders.lora_run)}"


def go_on(folders: Folders, scale: Scale, question: str, *, seed: int) -> list[str]:
    """What to try next on what the quickstart left; the shell skips what stands behind #."""
    return [
        typed("tt", "chat", folders.lora_run, "--no-adapter") + "  # the base model, which has not changed",
        run_command("sft", both_words(folders, scale, seed=seed), folders.root / "runs" / "both")
        + "  # an adapter for both",
        typed("tt", "chat", folders.lora_run),
        typed("tt", "generate", folders.merged, "-p", question),
        typed("tt", "report", folders.lora_run, folders.pretrain_run),
    ]


def on_your_own(folders: Folders, scale: Scale) -> list[str]:
    """The same with a model from the hub: only the path and the learning rate are others."""
    run = folders.root / "runs" / "smollm"
    words = ["model.path=HuggingFaceTB/SmolLM2-135M-Instruct", word("data.train", folders.finetune_rows)]
    words += [word("data.eval", folders.held_out_rows), *_adapter_words(scale)]
    words += ["batch_size=32", "micro_batch_size=8", "optimizer.lr=5e-4"]
    return [run_command("sft", words, run), typed("tt", "chat", run), typed("tt", "merge", run, "-o", f"{run}-merged")]


def typed(*words: str | Path) -> str:
    """Words as one types them in a shell, in the folder that the quickstart was called from."""
    return shlex.join(str(word) for word in words)
