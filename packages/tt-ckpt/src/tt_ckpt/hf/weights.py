"""A model on its way from one format to another: tensors under Hugging Face names, read when asked for."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tt_ckpt.hf.mismatch import WRAPPERS, describe_tie
from tt_ckpt.safetensors_file import TensorSpec, spec_of
from tt_ckpt.shown import plain, quoted

EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"
_PIECE = 1 << 17
_VALUES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Weights:
    """``specs`` says what there is, in the order in which it is best read; ``get`` reads or computes one tensor."""

    specs: dict[str, TensorSpec]
    get: Callable[[str], Tensor]
    config: dict[str, Any]
    format: str  # hf, meta, torchtune or gguf
    files: tuple[Path, ...]
    companions: Mapping[str, str] = field(default_factory=dict)  # files to be written beside the weights: name -> text

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())

    @property
    def family(self) -> str:
        return str(self.config.get("model_type", "unknown"))


def specs_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    """The specs of tensors, without reading any that is read when asked for."""
    known: dict[str, TensorSpec] | None = getattr(tensors, "specs", None)
    return known if known is not None else {name: spec_of(tensor) for name, tensor in tensors.items()}


def cast(weights: Weights, dtype: torch.dtype) -> Weights:
    """The same with floating tensors in ``dtype``."""

    def target(spec: TensorSpec) -> torch.dtype:
        return dtype if spec.dtype.is_floating_point else spec.dtype

    return replace(
        weights,
        specs={name: TensorSpec(dtype=target(spec), shape=spec.shape) for name, spec in weights.specs.items()},
        get=lambda name: cast_tensor(name, weights.get(name), target(weights.specs[name])),
    )


def cast_tensor(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype``; a ValueError where finite values become infinite."""
    result = tensor.to(dtype)
    if result is not tensor and not is_finite(result) and is_finite(tensor):
        count = num_not_finite(result)
        raise ValueError(f"{name}: {count} values overflow {str(dtype).removeprefix('torch.')}; choose a wider dtype")
    return result


def is_finite(tensor: Tensor) -> bool:
    """A finite sum proves that every value is: one pass, nothing allocated, several times as fast as a norm in bf16."""
    if not tensor.is_floating_point():
        return True
    if tensor.dtype.itemsize > 1 and bool(torch.isfinite(tensor.detach().sum())):  # 8-bit floats cannot be summed
        return True
    return not any(map(_num_not_finite, _pieces(tensor)))  # or too large to be summed


def num_not_finite(tensor: Tensor) -> int:
    """How many values are NaN or infinite."""
    return sum(map(_num_not_finite, _pieces(tensor)))


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """All values, a few at a time, as floats that can be summed."""
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), _VALUES):
        piece = flat[start : start + _VALUES]
        yield piece.float() if piece.dtype.itemsize == 1 else piece


def _num_not_finite(piece: Tensor) -> int:
    return 0 if bool(torch.isfinite(piece.sum())) else int((~torch.isfinite(piece)).sum())


def compare(written: Weights, meant: Weights, *, where: Path, progress: Callable[[int], None] | None = None) -> None:
    """Raise ValueError, naming the tensor, unless both hold the same names, shapes, dtypes and bytes."""
    if written.specs.keys() != meant.specs.keys():
        name = sorted(written.specs.keys() ^ meant.specs.keys())[0]
        what = "extra" if name in written.specs else "missing"
        raise ValueError(f"{where}: reading back: {plain(name)} is {what}; please report it")
    for name, spec in written.specs.items():
        ours, theirs = written.get(name), meant.get(name)
        if spec_of(theirs) != spec or not same_bytes(ours, theirs):
            raise ValueError(f"{where}: reading back: {name} differs from what was written; the disk may be failing")
        if progress:
            progress(spec.nbytes)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Equality of dtype, shape and every bit (NaN equals the same NaN, 0.0 is not -0.0)."""
    if spec_of(a) != spec_of(b):
        return False
    x, y = (tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy() for tensor in (a, b))
    words = x.nbytes // 8 * 8  # compared eight bytes at a time: four times as fast
    if not np.array_equal(x[words:], y[words:]):
        return False
    x, y = x[:words].view(np.int64), y[:words].view(np.int64)
    return all(np.array_equal(x[at : at + _PIECE], y[at : at + _PIECE]) for at in range(0, len(x), _PIECE))


# ---- what a config says ----------------------------------------------------------------------------------------------


def positive(
    settings: Mapping[str, Any], key: str, *, default: int | None = None, where: object = "config.json"
) -> int:
    """A whole number above 0, or a ValueError that names the key."""
    value = settings.get(key)
    if value is None and default is not None:
        return default
    if type(value) is not int or not 0 < value < 2**40:
        raise ValueError(f"{where}: {key}: expected a whole number above 0, found {quoted(value)}")
    return value


def number(
    settings: Mapping[str, Any], key: str, *, default: float | None = None, where: object = "config.json"
) -> float:
    """A finite number above 0, or a ValueError that names the key."""
    value = settings.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e300:
        raise ValueError(f"{where}: {key}: expected a number above 0, found {quoted(value)}")
    return float(value)


def rotated_heads(config: Mapping[str, Any]) -> dict[str, int]:
    """How many heads the rows of q_proj and k_proj are."""
    queries = positive(config, "num_attention_heads")
    return {"q_proj": queries, "k_proj": positive(config, "num_key_value_heads", default=queries)}


def without_copies(weights: Weights) -> Weights:
    """Leave out what the config makes redundant: the output of a tied model, which must equal the embedding, and the
    rotary frequencies that old files hold. Names lose the prefix of a wrapper that was saved with the model."""
    weights = _unwrapped(weights)
    specs = {name: spec for name, spec in weights.specs.items() if not name.endswith("rotary_emb.inv_freq")}
    tied = weights.config.get("tie_word_embeddings", weights.family.startswith("gemma"))  # as transformers defaults it
    if tied and OUTPUT in specs and EMBEDDING in specs:
        if not same_bytes(weights.get(OUTPUT), weights.get(EMBEDDING)):
            shapes = weights.specs[EMBEDDING].shape, weights.specs[OUTPUT].shape
            raise ValueError(describe_tie(weights.files[0].parent, EMBEDDING, OUTPUT, shapes))
        del specs[OUTPUT]
    return replace(weights, specs=specs)


def _unwrapped(weights: Weights) -> Weights:
    names = {name: name for name in weights.specs}
    while names and (prefix := next((one for one in WRAPPERS if all(name.startswith(one) for name in names)), "")):
        names = {name.removeprefix(prefix): key for name, key in names.items()}
    if odd := next((name for name in names if ".lora_" in name or ".base_layer." in name), ""):
        raise ValueError(
            f"{weights.files[0]}: {plain(odd)} belongs to an adapter that was saved with its base; merge it first"
        )
    specs = {name: weights.specs[key] for name, key in names.items()}
    return replace(weights, specs=specs, get=lambda name: weights.get(names[name]))
