"""Does this decoder equal its reference? Logits, gradients, packed rows, cached decoding, greedy text, saved files.

The reference is a causal language model of transformers with the same weights. Both are run in fp32 and compared with
the reference in fp64, the truth. They are equal if this decoder is about as close to the truth as the reference is:
rounding errors depend on the size and weights of a model (1e-4 in gradients of a real 135M model). Errors are the
largest difference over the largest value of the truth. transformers is imported only in functions that need it.
"""

import logging
import math
import platform
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tt_models.decoder import Decoder
from tt_models.generate import generate
from tt_models.kv_cache import KVCache

FACTOR = 8.0  # two correct implementations round differently: over all families, by up to 2.5 times
LEAST = 4 * torch.finfo(torch.float32).eps  # an error of the reference below this is luck


def relative_error(found: Tensor, expected: Tensor, *, floor: float = 0.0) -> float:
    """The largest difference over the largest expected value, or over ``floor`` if that is larger.

    Infinite if a number is infinite or nan: a maximum would ignore nan.
    """
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    largest = max(expected.abs().max().item(), floor)
    difference = (found - expected).abs().max().item()
    if not math.isfinite(difference) or (difference and not largest):
        return float("inf")
    return difference / largest if difference else 0.0


class Found(NamedTuple):
    """The results of a forward and a backward pass."""

    logits: Tensor
    gradients: dict[str, Tensor]


def run(module: nn.Module, input_ids: Tensor, lengths: tuple[int, ...]) -> Found:
    """Logits, and the gradient of every parameter for one random linear loss.

    With ``lengths`` the rows are packed documents of these lengths; the reference reads each of them alone.
    """
    if isinstance(module, Decoder):
        logits: Tensor = module(input_ids, packed_positions(lengths, input_ids) if lengths else None)
    else:
        logits = reference_logits(module, input_ids, lengths)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)
    (logits * weights).sum().backward()  # type: ignore[no-untyped-call]
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in module.named_parameters()
    }
    module.zero_grad(set_to_none=True)
    return Found(logits.detach(), gradients)


def distance(found: Found, truth: Found) -> dict[str, Any]:
    """The error of the logits, the largest one of the gradients, and whose that is."""
    if found.gradients.keys() != truth.gradients.keys():
        raise ValueError(f"parameters differ: {sorted(found.gradients.keys() ^ truth.gradients.keys())[:5]}")
    floor = 1e-2 * max(gradient.abs().max().item() for gradient in truth.gradients.values())
    own = found.gradients
    errors = {name: relative_error(own[name], true, floor=floor) for name, true in truth.gradients.items()}
    worst = max(errors, key=lambda name: errors[name])
    logits = relative_error(found.logits, truth.logits)
    return {"logits": logits, "gradients": errors[worst], "worst_gradient": worst}


def reference_logits(reference: nn.Module, input_ids: Tensor, lengths: tuple[int, ...] = ()) -> Tensor:
    """[B, S, V] of a transformers model, document by document, without its cache."""
    documents = torch.split(input_ids, list(lengths) or input_ids.shape[1], dim=1)
    return torch.cat([reference(document, use_cache=False).logits for document in documents], dim=1)


def packed_positions(lengths: tuple[int, ...], input_ids: Tensor) -> Tensor:
    """Position ids [B, S] that restart with every document."""
    return torch.cat([torch.arange(length) for length in lengths]).expand_as(input_ids).to(input_ids.device)


@contextmanager
def in_fp64(reference: nn.Module) -> Iterator[nn.Module]:
    """``reference`` in fp64, in place; its fp32 weights come back as they were."""
    config: Any = reference.config
    experts = getattr(config, "_experts_implementation", None)
    if experts is not None:
        config._experts_implementation = "eager"  # grouped products have no fp64
    try:
        yield reference.double()
    finally:
        reference.float()
        if experts is not None:
            config._experts_implementation = experts


@torch.no_grad()
def cached_logits(model: Decoder, input_ids: Tensor, *, prompt: int) -> Tensor:
    """A prompt, then a chunk, then token by token through a cache."""
    ropes = [rope for rope in model.model.ropes if rope is not None and rope.kind == "longrope"]
    switches = [rope.original_max_positions for rope in ropes if rope.original_max_positions < input_ids.shape[1]]
    prompt = max([prompt] + [switch + 1 for switch in switches])
    batch, seq_len = input_ids.shape
    weight = model.model.embed_tokens.weight
    cache = KVCache(model.config, batch_size=batch, max_seq_len=seq_len, device=weight.device, dtype=weight.dtype)
    ends = [prompt, min(prompt + 3, seq_len), *range(prompt + 4, seq_len + 1)]
    pieces = [model(input_ids[:, begin:end], None, cache) for begin, end in zip([0, *ends], ends, strict=False)]
    return torch.cat(pieces, dim=1)


@torch.no_grad()
def greedy_differences(model: Decoder, truth: nn.Module, prompt: Tensor, *, max_new_tokens: int, slack: float) -> int:
    """The number of tokens of a greedy continuation that the truth would not choose.

    Two tokens that are closer than ``slack``, as a share of the largest logit, are as good as each other.
    """
    found, wrong = generate(model, prompt, max_new_tokens=max_new_tokens, temperature=0), 0
    for column in range(prompt.shape[1], found.shape[1]):  # token by token: a rope may depend on the length
        logits_BV = truth(found[:, :column], use_cache=False).logits[:, -1]
        behind_B = logits_BV.amax(dim=-1) - logits_BV.gather(1, found[:, column, None])[:, 0]
        wrong += int((behind_B > slack * logits_BV.abs().max()).sum())
    return wrong


def certify(
    model: Decoder, reference: nn.Module, *, seq_len: int = 24, seed: int = 0, factor: float = FACTOR
) -> dict[str, Any]:
    """The ``errors`` of ``model`` in fp32 on random tokens by name, ``reference_errors`` and ``limits`` alike.

    Both are in fp32; a limit is ``factor`` times the error of the reference.
    """
    generator = torch.Generator().manual_seed(seed)
    seq_len = min(seq_len, model.config.max_position_embeddings)
    ids = torch.randint(0, model.config.vocab_size, (2, seq_len), generator=generator).to(model.output_weight.device)
    errors: dict[str, Any] = {}
    own: dict[str, Any] = {}
    packed = (seq_len // 3, seq_len // 4, seq_len - seq_len // 3 - seq_len // 4)
    kinds: dict[str, tuple[int, ...]] = {"": (), "packed_": packed}
    for kind, lengths in kinds.items():
        with in_fp64(reference):
            truth = run(reference, ids, lengths)
        own |= {kind + name: value for name, value in distance(run(reference, ids, lengths), truth).items()}
        errors |= {kind + name: value for name, value in distance(run(model, ids, lengths), truth).items()}
        if not kind:
            errors["cached_decoding"] = relative_error(cached_logits(model, ids, prompt=seq_len // 3), truth.logits)
            own["cached_decoding"] = own["logits"]
    limits = {name: factor * max(value, LEAST) for name, value in own.items() if isinstance(value, float)}
    with in_fp64(reference):
        errors["greedy_differences"] = greedy_differences(
            model, reference, ids[:, : seq_len // 3], max_new_tokens=seq_len // 2, slack=2 * limits["logits"]
        )
    limits["greedy_differences"] = 0
    numbers = {name: value for name, value in errors.items() if name in limits}
    worst = {name: value for name, value in errors.items() if name not in limits}
    reference_errors = {name: own[name] for name in limits if name in own}
    return {"errors": numbers, "reference_errors": reference_errors, "limits": limits} | worst


def is_within(certificate: Mapping[str, Mapping[str, float]]) -> bool:
    """Whether every error of what ``certify`` gives is finite, and not above its limit."""
    limits = certificate["limits"]
    return all(math.isfinite(value) and value <= limits[name] for name, value in certificate["errors"].items())


@contextmanager
def without_noise() -> Iterator[None]:
    """No progress bars or warnings of other libraries inside: what they would warn of is measured."""
    from transformers.utils import logging as theirs

    disabled, bars = logging.root.manager.disable, theirs.is_progress_bar_enabled()
    logging.disable(logging.WARNING)
    theirs.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if bars:
            theirs.enable_progress_bar()


def load_reference(path: str | Path, dtype: torch.dtype | str = torch.float32) -> nn.Module:
    """A directory through transformers, in evaluation mode; softcaps and sinks need its plain attention.

    Without its settings for generation: a repetition penalty is not part of the model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    attention = "eager" if AutoConfig.from_pretrained(path).model_type in ("gemma2", "gpt_oss") else "sdpa"
    reference: nn.Module
    reference, found = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation=attention, output_loading_info=True
    )
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise ValueError(f"{path}: transformers finds no weights for {missing[0]} and {len(missing) - 1} more")
    reference.generation_config = GenerationConfig()
    return reference.eval()


def verify(
    path: str | Path,
    *,
    load: Callable[[Path], Decoder],
    save: Callable[[Decoder, Path], object],
    factor: float = FACTOR,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare a model directory with transformers: a certificate, ready for JSON, that both compute the same.

    ``load`` reads the directory into a decoder in fp32, ``save`` writes one; a directory that is saved again must have
    the same weights and logits in transformers. ``passed`` is the verdict; ``errors`` are the distances to
    transformers in fp64, ``reference_errors`` those of transformers in fp32, ``limits`` are ``factor`` times as large,
    ``not_reached`` lists what the compared texts are too short for.
    """
    try:
        import transformers
    except ImportError as error:
        raise ValueError("verify compares with transformers: run pip install transformers") from error
    model = load(Path(path)).eval()
    with without_noise():
        reference = load_reference(path)
        certificate = certify(model, reference, seed=seed, factor=factor)
        with tempfile.TemporaryDirectory() as directory:
            save(model, Path(directory))
            certificate["errors"]["written_back"] = copy_error(load_reference(directory), reference, seed=seed)
    certificate["limits"]["written_back"] = certificate["limits"]["logits"]
    passed = is_within(certificate)
    errors = certificate["errors"].items()
    certificate["errors"] = {name: value if math.isfinite(value) else str(value) for name, value in errors}
    versions = {
        "tt_models": version("tt-models"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    about = {"model": str(path), "model_type": model.config.model_type, "passed": passed, "factor": factor}
    return about | certificate | {"not_reached": not_reached(model), "versions": versions}


def not_reached(model: Decoder, *, seq_len: int = 24) -> list[str]:
    """Parts of a model that only matter in longer texts than are compared, in words."""
    windows = {w for w in model.config.layer_windows if w and seq_len <= w < model.config.max_position_embeddings}
    return [f"the sliding window of {window} tokens: {seq_len} are compared" for window in sorted(windows)]


@torch.no_grad()
def copy_error(copy: nn.Module, reference: nn.Module, *, seed: int = 0) -> float:
    """The largest error of any tensor of a saved model, and of its logits: the config may be wrong too."""
    vocab_size, generator = reference.config.vocab_size, torch.Generator().manual_seed(seed)  # type: ignore[union-attr]
    ids = torch.randint(0, vocab_size, (1, 24), generator=generator)  # type: ignore[arg-type]
    logits = [reference_logits(model, ids, ()) for model in (copy, reference)]
    if logits[0].shape != logits[1].shape:
        return float("inf")
    return max(state_error(copy.state_dict(), reference.state_dict()), relative_error(*logits))


def state_error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest error of any tensor; infinite if names or shapes differ."""
    if found.keys() != expected.keys() or any(found[name].shape != expected[name].shape for name in expected):
        return float("inf")
    return max(relative_error(found[name], expected[name]) for name in expected)
