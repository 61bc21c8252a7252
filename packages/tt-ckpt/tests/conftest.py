"""Small models with Hugging Face names, as plain modules, and the directories they are saved in."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

torch.set_num_threads(1)  # tests fork: a child would wait for ever for threads that it does not have


def pytest_addoption(parser):
    group = parser.getgroup("tt-ckpt")
    group.addoption("--crashes", type=int, default=6, help="SIGKILLs during saves (200 keeps the promise)")


class Attention(nn.Module):
    def __init__(self, d: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, d // heads * kv_heads, bias=False)
        self.v_proj = nn.Linear(d, d // heads * kv_heads, bias=False)
        self.o_proj = nn.Linear(d, d, bias=False)


class MLP(nn.Module):
    def __init__(self, d: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d, inner, bias=False)
        self.up_proj = nn.Linear(d, inner, bias=False)
        self.down_proj = nn.Linear(inner, d, bias=False)


class Norm(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))


class Layer(nn.Module):
    def __init__(self, c: SimpleNamespace) -> None:
        super().__init__()
        self.self_attn = Attention(c.hidden_size, c.num_attention_heads, c.num_key_value_heads)
        self.mlp = MLP(c.hidden_size, c.intermediate_size)
        self.input_layernorm = Norm(c.hidden_size)
        self.post_attention_layernorm = Norm(c.hidden_size)


class Tiny(nn.Module):
    """A Llama in names and shapes only. Tied: there is no lm_head parameter."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.model.norm = Norm(config.hidden_size)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": 65,
}


@pytest.fixture
def tiny():
    """tiny(seed=0, device=None, dtype=None, **config fields) -> module"""

    def make(seed=0, *, device=None, dtype=None, **fields):
        torch.manual_seed(seed)
        with torch.device(device or "cpu"):
            model = Tiny(SimpleNamespace(**{**CONFIG, **fields}))
        return model.to(dtype) if dtype else model

    return make


@pytest.fixture
def config():
    """config(**fields) -> dict, as config.json holds it"""
    return lambda **fields: {**CONFIG, **fields}


@pytest.fixture
def model_dir(tmp_path, tiny):
    """model_dir(name="source", seed=1, dtype=None, **fields) -> a directory as the safetensors library writes it"""

    def make(name="source", *, seed=1, dtype=None, **fields) -> Path:
        path = tmp_path / name
        path.mkdir()
        save_file(tiny(seed, dtype=dtype, **fields).state_dict(), path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps({**CONFIG, **fields}, indent=2, sort_keys=True) + "\n")
        (path / "tokenizer.json").write_text("{}")
        (path / "generation_config.json").write_text('{"eos_token_id": 2}\n')
        return path

    return make


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.fixture
def equal_models():
    return same


@pytest.fixture
def equal_dirs():
    """equal_dirs(a, b) -> the names that are not in both with the same bytes"""

    def compare(a: Path, b: Path) -> list[str]:
        names = {p.relative_to(root).as_posix() for root in (a, b) for p in root.rglob("*") if p.is_file()}
        return sorted(
            name
            for name in names
            if not (
                (a / name).is_file() and (b / name).is_file() and (a / name).read_bytes() == (b / name).read_bytes()
            )
        )

    return compare
