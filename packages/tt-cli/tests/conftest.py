"""What the tests share: ``tt`` called in this process, and as a process of its own."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tt_cli.main import main


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Tt = Callable[..., Answer]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests that take a minute")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="needs --slow"))


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "_TT_COMPLETE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def tt(capfd: pytest.CaptureFixture[str]) -> Tt:
    """Call ``tt`` in this process; only what this call wrote is in the answer."""

    def call(*args: str) -> Answer:
        capfd.readouterr()
        code = main(list(args))
        written = capfd.readouterr()
        return Answer(code, written.out, written.err)

    return call


@pytest.fixture
def tt_process() -> Tt:
    """Call ``tt`` as a process, from another folder where ``cwd`` says so."""

    def call(*args: str, python: Sequence[str] = (), **settings: Any) -> Answer:
        command = [sys.executable, *python, "-m", "tt_cli", *args]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, **settings)
        return Answer(done.returncode, done.stdout, done.stderr)

    return call


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WORDS = ("red", "blue", "green", "black", "white", "brown", "pink", "grey")
ROWS = [{"instruction": f"Repeat the word {word}.", "output": word} for word in WORDS]


def write_tokenizer(folder: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> int:
    """A byte-level BPE in the files of a Hugging Face directory. Returns the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([row["instruction"] for row in ROWS], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "model_max_length": 256}
    if chat_template is not None:
        settings["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer.get_vocab_size()


def write_model(folder: Path, *, chat_template: str | None = CHAT_TEMPLATE, max_position_embeddings: int = 128) -> Path:
    """A random Llama of two layers, as a Hugging Face directory."""
    import torch

    import tt_ckpt
    import tt_models

    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": write_tokenizer(folder, chat_template=chat_template),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": max_position_embeddings,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    torch.manual_seed(0)
    model = tt_models.build(tt_models.config_from_hf(config), dtype=torch.float32)
    tt_ckpt.save_hf(model, folder, config=config)
    return folder


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


@pytest.fixture(scope="session")
def lora_run(tmp_path_factory: pytest.TempPathFactory, model_dir: Path, rows_file: Path) -> Path:
    """A finished LoRA run of three steps."""
    return train(tmp_path_factory.mktemp("runs") / "runs" / "one", model_dir, rows_file)


def train(run: Path, model: Path, rows: Path, *more: str) -> Path:
    words = [f"model.path={model}", f"data.train={rows}", "model.dtype=fp32", "adapter.rank=4", "batch_size=4"]
    words += ["max_steps=3", "optimizer.lr=1e-2", "samples.max_new_tokens=4", "schedule.warmup_steps=0"]
    assert main(["run", "sft", *words, *more, "-o", str(run)]) == 0
    return run


@pytest.fixture
def train_run() -> Callable[..., Path]:
    return train


@pytest.fixture
def write_tiny_model() -> Callable[..., Path]:
    return write_model
