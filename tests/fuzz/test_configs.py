"""Configs: YAML files of ours and of other tools, words of the command line, values of every kind of key."""

import json
import random
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tt_ckpt.redaction import redact_data
from tt_train import RunConfig, compose
from tt_train.config import AdapterSection, SFTConfig, to_dict, to_yaml
from tt_train.settings.composing import compose_run
from tt_train.settings.keys.schema import all_keys

OURS = """\
recipe: sft
model: {path: DIR, dtype: bf16}
adapter:
  rank: 8
  target_modules: [q_proj, v_proj]   # two of them
  rank_pattern: {layers.0.q_proj: 4}
data:
  train: {a.jsonl: 0.7, "b.jsonl": 0.3}
  columns: {messages: conv}
  eval: 0.05
optimizer: {lr: 2e-5, betas: [0.9, 0.95]}
max_steps: 100
seed: 0123
compile: no
output_dir: 2026-01-01
"""
ELSEWHERE = [
    "base_model: x\nload_in_4bit: true\ndatasets:\n  - path: a.jsonl\n    type: alpaca\nlora_r: 8\nwarmup_ratio: 0.1\n",
    "model_name_or_path: x\nstage: sft\nfinetuning_type: lora\nlora_target: all\ncutoff_len: 2048\nbf16: true\n",
    "model:\n  _component_: torchtune.models.llama3.llama3_8b\noptimizer:\n  _component_: torch.optim.AdamW\n"
    "  lr: 2e-5\ntokenizer: {path: ${output_dir}/tokenizer.model}\nepochs: 3\n",
    "learning_rate: 2e-5\nper_device_train_batch_size: 4\nreport_to: none\npeft_config: {r: 8, lora_alpha: 16}\n",
]
TEXTS = [
    "0123", "0x10", "1:30", "1_000", "1e999", ".inf", "-.nan", "yes", "~", "null", "2026-01-01", "1,000", "8 ", "'8'",
    '"\\x1b"', "[a, b]", "[", "{a: 1}", "{a: 1, a: 2}", "{", "!!int 3", "&a x", "*a", "${oc.env:HOME}", "???", "<<",
    "a: b", "- a", "9" * 400, "9" * 5000, "x" * 3000, "[" * 100, "\t", "\u0661", "\u202e", "", "%", "@a", "`", "|", ">",
]  # fmt: skip


class Level(Enum):
    low = 1


@dataclass
class Own(RunConfig):
    """A recipe's own keys, of every kind."""

    counts: list[int] = field(default_factory=list)
    shares: dict[str, float] = field(default_factory=dict)
    lists: dict[str, list[float]] = field(default_factory=dict)
    pair: tuple[int, float] = (1, 2.0)
    level: Level = Level.low
    place: Path = Path("x")
    either: int | str = 1
    anything: Any = None


KEYS = sorted(
    {*all_keys(SFTConfig), *all_keys(Own), "data.columns.x", "adapter.rank_pattern.a.b", "lr", "", ".", "model."}
)


def again(config: RunConfig, file: Path) -> None:
    """What was accepted is written and read back as the same, but for secrets."""
    file.write_text(to_yaml(config), encoding="utf-8")
    assert to_dict(compose(file, complete=False, schema=type(config))) == redact_data(to_dict(config))


def test_any_bytes_are_a_config_or_our_error(tmp_path: Path, fuzz: Any) -> None:
    file, copy = tmp_path / "c.yaml", tmp_path / "copy.yaml"

    def read(data: bytes) -> None:
        file.write_bytes(data)
        again(compose("sft", config=file, complete=False), copy)

    fuzz(read, fuzz.mutated(OURS.encode(), *(text.encode() for text in ELSEWHERE)))


def test_any_structure_is_a_config_or_our_error(tmp_path: Path, fuzz: Any) -> None:
    file, copy = tmp_path / "c.yaml", tmp_path / "copy.yaml"

    def read(value: object) -> None:
        file.write_text(json.dumps(value), encoding="utf-8", errors="surrogatepass")
        again(compose("sft", config=file, complete=False), copy)

    fuzz(read, fuzz.mutated_json(to_dict(SFTConfig(adapter=AdapterSection()))))


def test_any_config_of_a_run_directory_is_read_or_refused(tmp_path: Path, fuzz: Any) -> None:
    def read(data: bytes) -> None:
        (tmp_path / "config.yaml").write_bytes(data)
        compose_run(tmp_path)

    fuzz(read, fuzz.mutated(to_yaml(SFTConfig(adapter=AdapterSection())).encode()))


def words(seed: int) -> list[str]:
    choice = random.Random(seed)
    return [
        choice.choice(KEYS) + choice.choice(["=", "=", "=", "=", "==", ":", "", " = "]) + choice.choice(TEXTS)
        for _ in range(choice.choice((1, 1, 2, 3)))
    ]


def test_any_words_are_a_config_or_our_error(tmp_path: Path, fuzz: Any) -> None:
    copy = tmp_path / "copy.yaml"

    def read(given: list[str]) -> None:
        again(compose("sft", overrides=given, complete=False), copy)
        compose("sft", overrides=given, complete=False, schema=Own)

    fuzz(read, st.integers(0, 2**62).map(words))


def test_any_value_of_any_key_in_a_file_is_read_or_refused(tmp_path: Path, fuzz: Any) -> None:
    file = tmp_path / "c.yaml"

    def read(given: list[str]) -> None:
        lines = []
        for word in given:
            key, _, text = word.partition("=")
            *sections, last = key.split(".")
            lines += [f"{'  ' * depth}{name}:" for depth, name in enumerate(sections)]
            lines.append(f"{'  ' * len(sections)}{last}: {text}")
        file.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
        compose("sft", config=file, complete=False, schema=Own)

    fuzz(read, st.integers(0, 2**62).map(words))


def test_any_config_made_by_code_is_checked(fuzz: Any) -> None:
    from tt_train.settings.keys.mistakes import refuse_mistakes

    def read(plain: Any) -> None:
        config = SFTConfig(adapter=AdapterSection())
        for name, value in plain.items() if isinstance(plain, dict) else ():
            section = getattr(config, name, None)
            if isinstance(value, dict) and hasattr(section, "__dataclass_fields__"):
                for inner, own in value.items():
                    setattr(section, inner, own)
            else:
                setattr(config, name, value)
        refuse_mistakes(config)

    fuzz(read, fuzz.mutated_json(to_dict(SFTConfig(adapter=AdapterSection()))))
