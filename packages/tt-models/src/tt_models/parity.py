"""Is this decoder the reference? Logits, gradients, packed rows, cached decoding, greedy text, what is written back.

The reference is a causal language model of transformers with the same weights in fp32. transformers is imported where
it is needed and nowhere else. Errors are the largest difference over the largest value of the reference.
"""

import math
import platform
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tt_models.decoder import Decoder
from tt_models.generate import generate
from tt_models.kv_cache import KVCache

TOLERANCE = 1e-5


def relative_error(found: Tensor, expected: Tensor, *, floor: float = 0.0) -> float:
    """The largest difference over the largest expected value, or over ``floor`` where that is larger.

    Infinite where a number is infinite or none: a maximum would pass over nan.
    """
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    largest = max(expected.abs().max().item(), floor)
    difference = (found - expected).abs().max().item()
    if not math.isfinite(difference) or (difference and not largest):
        return float("inf")
    return difference / largest if difference else 0.0


def compare(model: Decoder, reference: nn.Module, input_ids: Tensor, lengths: tuple[int, ...] = ()) -> dict[str, Any]:
    """Errors of the logits and of the gradient of every parameter, for one random linear loss.

    With ``lengths`` the rows hold documents of these lengths, packed; the reference reads each of them alone.
    """
    position_ids = packed_positions(lengths, input_ids) if lengths else None
    found, expected = model(input_ids, position_ids), reference_logits(reference, input_ids, lengths)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0)).to(expected)
    gradients = [backward(module, logits, weights) for module, logits in ((model, found), (reference, expected))]
    if gradients[0].keys() != gradients[1].keys():
        raise ValueError(f"parameters differ: {sorted(gradients[0].keys() ^ gradients[1].keys())[:5]}")
    floor = 1e-2 * max(gradient.abs().max().item() for gradient in gradients[1].values())
    errors = {name: relative_error(gradients[0][name], gradients[1][name], floor=floor) for name in gradients[0]}
    worst = max(errors, key=lambda name: errors[name])
    return {"logits": relative_error(found, expected), "gradients": errors[worst], "worst_gradient": worst}


def reference_logits(reference: nn.Module, input_ids: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """[B, S, V] of a transformers model, document by document, without its cache."""
    documents = torch.split(input_ids, list(lengths) or input_ids.shape[1], dim=1)
    return torch.cat([reference(document, use_cache=False).logits for document in documents], dim=1)


def packed_positions(lengths: tuple[int, ...], input_ids: Tensor) -> Tensor:
    """Position ids [B, S] that restart with every document."""
    return torch.cat([torch.arange(length) for length in lengths]).expand_as(input_ids).to(input_ids.device)


def backward(module: nn.Module, logits: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """The gradient of ``(logits * weights).sum()`` by parameter name; zero where a parameter has no part in it."""
    module.zero_grad()
    (logits * weights).sum().backward()  # type: ignore[no-untyped-call]
    parameters = dict(module.named_parameters())
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in parameters.items()
    }


@torch.no_grad()
def cached_error(model: Decoder, input_ids: Tensor, *, prompt: int) -> float:
    """A prompt, then a chunk, then token by token through a cache, against one forward."""
    ropes = [rope for rope in model.model.ropes if rope is not None and rope.kind == "longrope"]
    switches = [rope.original_max_positions for rope in ropes if rope.original_max_positions < input_ids.shape[1]]
    prompt = max([prompt] + [switch + 1 for switch in switches])
    batch, seq_len = input_ids.shape
    weight = model.model.embed_tokens.weight
    cache = KVCache(model.config, batch_size=batch, max_seq_len=seq_len, device=weight.device, dtype=weight.dtype)
    ends = [prompt, min(prompt + 3, seq_len), *range(prompt + 4, seq_len + 1)]
    pieces = [model(input_ids[:, begin:end], None, cache) for begin, end in zip([0, *ends], ends, strict=False)]
    return relative_error(torch.cat(pieces, dim=1), model(input_ids))


@torch.no_grad()
def packed_error(model: Decoder, input_ids: Tensor, lengths: tuple[int, ...]) -> float:
    """Documents that share a row against each document alone."""
    together = model(input_ids, packed_positions(lengths, input_ids))
    alone = [model(document) for document in torch.split(input_ids, list(lengths), dim=1)]
    return relative_error(together, torch.cat(alone, dim=1))


@torch.no_grad()
def greedy_differences(model: Decoder, reference: nn.Module, prompt: Tensor, *, max_new_tokens: int) -> int:
    """How many tokens differ between both greedy continuations."""
    found = generate(model, prompt, max_new_tokens=max_new_tokens, temperature=0)
    settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected: Tensor = reference.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)  # type: ignore[operator]
    return int((found != expected).sum())


def certify(model: Decoder, reference: nn.Module, *, seq_len: int = 24, seed: int = 0) -> dict[str, Any]:
    """All errors of ``model`` against ``reference`` on random tokens, by name."""
    generator = torch.Generator().manual_seed(seed)
    seq_len = min(seq_len, model.config.max_position_embeddings)
    ids = torch.randint(0, model.config.vocab_size, (2, seq_len), generator=generator).to(model.output_weight.device)
    lengths = (seq_len // 3, seq_len // 4, seq_len - seq_len // 3 - seq_len // 4)
    rows, documents = compare(model, reference, ids), compare(model, reference, ids, lengths)
    return {
        "logits": rows["logits"],
        "gradients": rows["gradients"],
        "worst_gradient": rows["worst_gradient"],
        "packed_logits": documents["logits"],
        "packed_gradients": documents["gradients"],
        "packed_against_alone": packed_error(model, ids, lengths),
        "cached_decoding": cached_error(model, ids, prompt=seq_len // 3),
        "greedy_differences": greedy_differences(model, reference, ids[:, : seq_len // 3], max_new_tokens=seq_len // 2),
    }


def load_reference(path: str | Path) -> nn.Module:
    """A directory through transformers, fp32, in evaluation mode; softcaps and sinks need its plain attention.

    Without its settings for generation: a repetition penalty is none of the model's maths.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    attention = "eager" if AutoConfig.from_pretrained(path).model_type in ("gemma2", "gpt_oss") else "sdpa"
    reference: nn.Module = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation=attention
    )
    reference.generation_config = GenerationConfig()
    return reference.eval()


def verify(
    path: str | Path,
    *,
    load: Callable[[Path], Decoder],
    save: Callable[[Decoder, Path], object],
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> dict[str, Any]:
    """A certificate, ready for JSON, that a model directory means here what it means to transformers.

    ``load`` reads the directory into a decoder in fp32, ``save`` writes one; what is written back must hold the same
    weights and give the same logits in transformers. ``passed`` is the verdict, ``errors`` what was measured, as text
    where it is no finite number.
    """
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            "verify compares with transformers, which is not installed: pip install transformers"
        ) from error
    model, reference = load(Path(path)).eval(), load_reference(path)
    errors = certify(model, reference, seed=seed)
    with tempfile.TemporaryDirectory() as directory:
        save(model, Path(directory))
        errors["written_back"] = copy_error(load_reference(directory), reference, seed=seed)
    numbers = [value for value in errors.values() if isinstance(value, float)]
    return {
        "model": str(path),
        "model_type": model.config.model_type,
        "passed": all(number <= tolerance for number in numbers) and errors["greedy_differences"] == 0,
        "tolerance": tolerance,
        "errors": {name: str(value) if value == float("inf") else value for name, value in errors.items()},
        "versions": {
            "tt_models": installed_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def installed_version() -> str:
    """Of this package."""
    from importlib.metadata import version

    return version("tt-models")


@torch.no_grad()
def copy_error(copy: nn.Module, reference: nn.Module, *, seed: int = 0) -> float:
    """The largest error of any tensor of a written model, and of its logits: a config may be written wrong too."""
    vocab_size, generator = reference.config.vocab_size, torch.Generator().manual_seed(seed)  # type: ignore[union-attr]
    ids = torch.randint(0, vocab_size, (1, 24), generator=generator)  # type: ignore[arg-type]
    logits = [reference_logits(model, ids, ()) for model in (copy, reference)]
    if logits[0].shape != logits[1].shape:
        return float("inf")
    return max(state_error(copy.state_dict(), reference.state_dict()), relative_error(*logits))


def state_error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest error of any tensor; infinite where names or shapes differ."""
    if found.keys() != expected.keys() or any(found[name].shape != expected[name].shape for name in expected):
        return float("inf")
    return max(relative_error(found[name], expected[name]) for name in expected)
