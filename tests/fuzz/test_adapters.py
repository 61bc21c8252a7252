"""adapter_config.json and the weights of adapters: read and loaded over a small model."""

import json
import struct
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tt_peft
from tt_peft import LoRAConfig


def model() -> nn.Module:
    torch.manual_seed(0)
    parts = [nn.ModuleDict({"q_proj": nn.Linear(8, 8), "v_proj": nn.Linear(8, 8)}) for _ in range(2)]
    layers = nn.ModuleList(nn.ModuleDict({"self_attn": part}) for part in parts)
    inner = nn.ModuleDict({"embed_tokens": nn.Embedding(16, 8), "layers": layers, "norm": nn.LayerNorm(8)})
    return nn.ModuleDict({"model": inner, "lm_head": nn.Linear(8, 16, bias=False)})


def load(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tt_peft.load_adapter(model(), folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.set_num_threads(1)
    trained = model()
    tt_peft.apply_lora_(trained, LoRAConfig(rank=2, modules_to_save="norm", rank_pattern={r".*layers\.1.*": 3}))
    return tt_peft.save_adapter(trained, tmp_path / "adapter", base_model="org/base")


def test_any_adapter_config_is_read_or_one_of_our_errors(folder: Path, fuzz: Any) -> None:
    file = folder / "adapter_config.json"
    plain = json.loads(file.read_text())
    more = plain | {
        "target_modules": r".*\.(q|v)_proj",
        "exclude_modules": ["lm_head"],
        "layers_to_transform": [0, 1],
        "layers_pattern": "layers",
        "alpha_pattern": {r"layers\.0\..*": 4},
        "trainable_token_indices": [1],
        "eva_config": {"rho": 2.0},
        "target_parameters": ["x"],
    }

    def read(settings: Any) -> None:
        file.write_text(json.dumps(settings))
        load(folder)

    fuzz(read, fuzz.mutated_json(plain, more))


def test_any_bytes_are_an_adapter_config_or_one_of_our_errors(folder: Path, fuzz: Any) -> None:
    file = folder / "adapter_config.json"
    seed = file.read_bytes()

    def read(data: bytes) -> None:
        file.write_bytes(data)
        load(folder)

    fuzz(read, fuzz.mutated(seed))


def test_any_bytes_are_adapter_weights_or_one_of_our_errors(folder: Path, fuzz: Any) -> None:
    file = folder / "adapter_model.safetensors"
    seed = file.read_bytes()

    def read(data: bytes) -> None:
        file.write_bytes(data)
        load(folder)

    fuzz(read, fuzz.mutated(seed))


def test_any_header_is_of_adapter_weights_or_one_of_our_errors(folder: Path, fuzz: Any) -> None:
    file = folder / "adapter_model.safetensors"
    content = file.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]

    def read(header: Any) -> None:
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
        load(folder)

    fuzz(read, fuzz.mutated_json(json.loads(content[8 : 8 + size])))


def test_any_expression_is_matched_in_time_or_one_of_our_errors(fuzz: Any) -> None:
    seeds = (
        rb".*\.layers\.[0-9]+\.(q|v)_proj",
        rb"(?!.*mlp).*(?<=self_attn)\.(?P<x>q|k)_proj",
        rb"([a-z0-9_.]+)+!",
        rb"(?i:model)\.(?:\w+\.)*\w{1,9}_proj$",
    )
    names = [f"model.layers.{layer}.self_attn.{part}_proj" for layer in range(9) for part in "qkv"]

    def match(data: bytes) -> None:
        text = data.decode("utf-8", "surrogateescape")
        if text:
            tt_peft.expressions.matches([text], names, within=r"(?:.*\.)?(?:{})$")

    fuzz(match, fuzz.mutated(*seeds))
