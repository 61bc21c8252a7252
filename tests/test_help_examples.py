"""Every example of a help page runs: on tiny models and rows, against a hub on this machine."""

import importlib.util
import io
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import torch

import tt_cli.quickstart.commands
from tt_cli.main import cli, main

PACKAGES = Path(__file__).parents[1] / "packages"


def shared_with(package: str) -> ModuleType:
    """The conftest.py of a package's tests."""
    file = PACKAGES / package / "tests" / "conftest.py"
    spec = importlib.util.spec_from_file_location(f"conftest_of_{package.replace('-', '_')}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


hub, command_line = shared_with("tt-ckpt"), shared_with("tt-cli")
server = hub.server  # the fixture: a hub on this machine


def examples(group: click.Group = cli) -> Iterator[str]:
    ctx = click.Context(group)
    for name in group.list_commands(ctx):
        command: Any = group.get_command(ctx, name)
        yield from examples(command) if isinstance(command, click.Group) else command.examples


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the examples name: two models, rows, a config, a recipe, runs and what was made of them."""
    folder = tmp_path_factory.mktemp("examples")
    model = command_line.write_model(folder / "Qwen" / "Qwen3-0.6B")
    shutil.copytree(model, folder / "meta-llama" / "Llama-3.2-1B")
    (folder / "rows.jsonl").write_text("".join(f'{{"text": "a row of text, number {i}"}}\n' for i in range(16)))
    (folder / "my.yaml").write_text(
        "recipe: sft\nmodel: {path: Qwen/Qwen3-0.6B, dtype: fp32}\ndata: {train: rows.jsonl, max_seq_len: 32}\n"
        "adapter: {rank: 4}\nbatch_size: 8\nmax_steps: 1\nsamples: {max_new_tokens: 2}\n"
    )
    (folder / "torchtune.yaml").write_text(
        "model: {_component_: torchtune.models.llama3_2.lora_llama3_2_1b}\n"
        "dataset: {_component_: torchtune.datasets.alpaca_dataset}\n"
        "optimizer: {_component_: torch.optim.AdamW, lr: 3e-4}\n"
    )
    (folder / "tuned").mkdir()
    factors = {"layers.0.attn.v_proj.lora_a.weight": (2, 32), "layers.0.attn.v_proj.lora_b.weight": (16, 2)}
    torch.save({name: torch.ones(size) for name, size in factors.items()}, folder / "tuned" / "adapter_0.pt")
    (folder / "prompts.jsonl").write_text('{"prompt": "a row"}\n')
    (folder / "my_metrics.py").write_text("def f1(prompts, answers, expected):\n    return {'f1': 0.5}\n")
    (folder / "tasks").mkdir()
    (folder / "tasks" / "my_task.yaml").write_text(
        "task: my_task\ndataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\ntest_split: test\n"
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte}]\n"
    )
    before = Path.cwd()
    os.chdir(folder)
    try:
        for words in (
            "run my.yaml -o runs/second",
            "run my.yaml adapter=null -o runs/full",
            "run my.yaml -o runs/first",
            "merge runs/first -o merged",
            "convert merged llama-meta --to meta",
            "cp sft my_sft.py",
        ):
            assert main(words.split()) == 0, words
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Any) -> Path:
    place = tmp_path / "here"
    shutil.copytree(made, place)
    monkeypatch.chdir(place)
    server.files = {file.name: file.read_bytes() for file in (place / "Qwen" / "Qwen3-0.6B").iterdir()}
    scale, stage = tt_cli.quickstart.commands.Scale, tt_cli.quickstart.commands.Stage
    steps = {"num_rows": 40, "max_steps": 2, "learning_rate": 1e-3}
    tiny = scale(hidden_size=32, num_hidden_layers=1, num_held_out=4, num_base_held_out=5,
                 pretrain=stage(**steps), finetune=stage(**steps), preferences=stage(**steps))  # fmt: skip
    monkeypatch.setattr(tt_cli.quickstart.commands, "Scale", lambda: tiny)
    return place


@pytest.mark.parametrize("example", examples())
def test_an_example_of_a_help_page_runs(example, folder, monkeypatch, capfd):
    prompt, _, command = example.rpartition(" | ")
    said = shlex.split(prompt)[1] if prompt else "a prompt"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{said}\n".encode())))
    words = shlex.split(command)[1:]
    if words[0] in ("download", "upload"):
        repo = [word for word in words[1:] if word.count("/") == 1 and not word.startswith("runs/")]
        monkeypatch.setattr(hub, "REPO", repo[0])
    if words[0] == "cp":
        (folder / "my_sft.py").unlink()
    if words[0] == "merge":
        shutil.rmtree(folder / "merged")
    expected = 1 if words[0] == "quickstart" else 0  # so small a model does not learn its task
    code = main(words)
    assert code == expected, capfd.readouterr().err
