"""The model in a GGUF file under Hugging Face names. Tensors are dequantized when they are asked for."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tt_ckpt.files import DOWNLOAD
from tt_ckpt.formats.gguf.config import config_of
from tt_ckpt.formats.gguf.file import GGUF, GGUFTensor, read_gguf, read_rows
from tt_ckpt.formats.gguf.names import IGNORED, Architecture, architecture_of, check_blocks, rename
from tt_ckpt.formats.gguf.tokenizer import tokenizer_files
from tt_ckpt.formats.translation import rotated_heads, to_half_split
from tt_ckpt.hf.weights import Weights, in_pieces, rows_at_once
from tt_ckpt.safetensors_file import TensorSpec
from tt_ckpt.shown import quoted

_MAX_TENSORS = 1 << 20
_ROTATED = re.compile(r"(q_proj|k_proj)\.(weight|bias)$")


def from_gguf(path: Path, *, tokenizer: bool = True) -> Weights:
    """``config.json``, weights and, unless not ``tokenizer``, the tokenizer's files of a GGUF file.

    Tensors are float32 if any tensor of the file is quantized, which has all values exactly; else they have the one
    dtype of the matrices (norms, which such files have in float32, are rounded to it).
    """
    gguf = read_gguf(path)
    kind = gguf.values.get("general.type", "model")
    if kind != "model":
        raise ValueError(f"{path}: a GGUF file of type {quoted(kind)}, not a model; give the file of the model itself")
    name = gguf.values.get("general.architecture")
    architecture_of(name, 0, path)
    experts, layers = (_count(gguf, f"{name}.{key}") for key in ("expert_count", "block_count"))
    arch = architecture_of(name, experts, path)
    tensors = {name: tensor for name, tensor in gguf.tensors.items() if not IGNORED.fullmatch(name)}
    names = {name: rename(arch, name, path) for name in tensors}
    check_blocks(names, layers, arch, path)
    config = config_of(gguf, arch.model_type)
    sources = _sources(tensors, names, experts, path)
    dtype = _dtype_of(gguf)
    specs = {key: TensorSpec(dtype=dtype, shape=tensors[name].shape[drop:]) for key, (name, _, drop) in sources.items()}

    def get(key: str) -> Tensor:
        name, first, _ = sources[key]
        return _tensor(key, tensors[name], first, specs[key], arch, config)

    def pieces(key: str) -> Iterator[Tensor]:
        (name, first, _), (step, width) = sources[key], rows_at_once(specs[key].shape)
        if (arch.norm_offset and key.endswith("norm.weight")) or (arch.interleaved and _ROTATED.search(key)):
            yield from in_pieces(get(key))
            return
        for begin in range(0, count := specs[key].numel // width, step):
            yield read_rows(tensors[name], first + begin, min(step, count - begin), dtype)

    return Weights(
        specs=specs,
        get=get,
        pieces=pieces,
        config=config | {"torch_dtype": str(dtype).removeprefix("torch.")},
        format="gguf",
        files=tuple(dict.fromkeys(tensor.file for tensor in gguf.tensors.values())),
        companions=tokenizer_files(gguf, config) if tokenizer else {},
    )


def _count(gguf: GGUF, key: str) -> int:
    value = gguf.values.get(key, 0)
    if type(value) is not int or not 0 <= value < 1 << 16:
        raise ValueError(f"{gguf.path}: {key}: expected a whole number below 65536, found {quoted(value)}; {DOWNLOAD}")
    return value


def _dtype_of(gguf: GGUF) -> torch.dtype:
    kinds = {tensor.dtype for tensor in gguf.tensors.values() if len(tensor.shape) > 1} - {torch.float32}
    quantized = any(tensor.quantized for tensor in gguf.tensors.values())
    return kinds.pop() if len(kinds) == 1 and not quantized else torch.float32


def _sources(
    tensors: dict[str, GGUFTensor], names: dict[str, str], experts: int, path: Path
) -> dict[str, tuple[str, int, int]]:
    """Hugging Face key -> the tensor with it, its first row there, and the number of dimensions to drop."""
    found: dict[str, tuple[str, int, int]] = {}
    for name, key in names.items():
        if "{}" not in key:
            found[key] = (name, 0, 0)
            continue
        shape = tensors[name].shape
        if len(shape) != 3 or shape[0] != experts or len(found) > _MAX_TENSORS:
            raise ValueError(f"{path}: {name} has the shape {list(shape)}, expected {experts} matrices; {DOWNLOAD}")
        found |= {key.format(expert): (name, expert * shape[1], 1) for expert in range(experts)}
    return found


def _tensor(
    key: str, tensor: GGUFTensor, first: int, spec: TensorSpec, arch: Architecture, config: dict[str, Any]
) -> Tensor:
    rows = spec.numel // spec.shape[-1]
    if arch.norm_offset and key.endswith("norm.weight"):
        values = read_rows(tensor, first, rows, torch.float32) - arch.norm_offset
        return values.to(spec.dtype).view(spec.shape)
    values = read_rows(tensor, first, rows, spec.dtype).view(spec.shape)
    if arch.interleaved and (match := _ROTATED.search(key)):
        return to_half_split(values, rotated_heads(config)[match[1]], f"{tensor.file}: {key}")
    return values
