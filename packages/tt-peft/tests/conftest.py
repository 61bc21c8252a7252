"""Two small models for the tests: plain modules under Hugging Face names, and a Llama of transformers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

torch.set_num_threads(1)  # tests fork: a child would wait forever for threads that it does not have


class _Attention(nn.Module):
    def __init__(self, dim: int, device: Any) -> None:
        super().__init__()
        self.q_proj = nn.Linear(dim, dim, device=device)
        self.k_proj = nn.Linear(dim, dim // 2, bias=False, device=device)
        self.v_proj = nn.Linear(dim, dim, bias=False, device=device)
        self.o_proj = nn.Linear(dim, dim, bias=False, device=device)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.pad(self.k_proj(x), (0, self.q_proj.out_features - self.k_proj.out_features))
        return self.o_proj(torch.tanh(self.q_proj(x)) * self.v_proj(x) + gate)


class _Mlp(nn.Module):
    def __init__(self, dim: int, device: Any) -> None:
        super().__init__()
        self.up_proj = nn.Linear(dim, 2 * dim, bias=False, device=device)
        self.down_proj = nn.Linear(2 * dim, dim, bias=False, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.up_proj(x)))


class _Block(nn.Module):
    def __init__(self, dim: int, device: Any) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(dim, device=device)
        self.self_attn = _Attention(dim, device)
        self.mlp = _Mlp(dim, device)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(x)


class _Inner(nn.Module):
    def __init__(self, vocab: int, dim: int, layers: int, device: Any) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab, dim, device=device)
        self.layers = nn.ModuleList(_Block(dim, device) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, device=device)


class _Lm(nn.Module):
    """[b, s] ids -> [b, s, vocab]; token-wise, with the names of a Hugging Face decoder."""

    def __init__(self, vocab: int = 40, dim: int = 32, layers: int = 2, device: Any = None) -> None:
        super().__init__()
        self.model = _Inner(vocab, dim, layers, device)
        self.lm_head = nn.Linear(dim, vocab, bias=False, device=device)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.model.embed_tokens(input_ids)
        for layer in self.model.layers:
            x = layer(x)
        return self.lm_head(self.model.norm(x))


@pytest.fixture
def make_lm() -> Callable[..., nn.Module]:
    """Builds the plain model; equal seeds give equal weights."""

    def make(*, seed: int = 0, **sizes: Any) -> nn.Module:
        torch.manual_seed(seed)
        return _Lm(**sizes).eval()

    return make


@pytest.fixture
def ids() -> Tensor:
    return torch.arange(14).reshape(2, 7) % 40


@pytest.fixture
def make_llama() -> Callable[..., nn.Module]:
    """Builds a Llama of transformers with large weights, so that differences show."""
    transformers = pytest.importorskip("transformers")

    def make(*, seed: int = 0, **changes: Any) -> nn.Module:
        sizes: dict[str, Any] = {
            "vocab_size": 40,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.05,
            "tie_word_embeddings": False,
        }
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **changes})).eval()

    return make


@pytest.fixture
def randomise() -> Callable[[nn.Module], None]:
    """Gives an adapter values, as training would: B is no longer zero."""

    def fill(model: nn.Module, *, seed: int = 1, std: float = 0.1) -> None:
        import tt_peft

        generator = torch.Generator().manual_seed(seed)
        for parameter in tt_peft.adapter_parameters(model).values():
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.data.add_(noise.to(parameter))

    return fill


@pytest.fixture
def as_near() -> Callable[[Tensor, Tensor, Tensor], None]:
    """Asserts that a result is about as near to fp64 as a reference in its dtype: what order of sums is best differs
    from machine to machine."""

    def check(found: Tensor, reference: Tensor, truth: Tensor) -> None:
        assert found.dtype == reference.dtype
        error, usual = ((one.double() - truth).abs().max() for one in (found, reference))
        unit = torch.finfo(found.dtype).eps * truth.abs().max()  # the reference may be exact by luck
        assert error <= 4 * usual + 4 * unit, f"off by {error:.2e}, the reference by {usual:.2e} (unit {unit:.2e})"

    return check
