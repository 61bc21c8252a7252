"""Linear layers whose quantized weights are read from safetensors files part by part, and written so.

The layout is that of ``torchao.prototype.safetensors``, which transformers and vLLM read and write: the weight of
``mod`` is the tensors ``mod._weight_qdata``, ``mod._weight_scale`` and so on, and the metadata of each file says, under
``mod.weight``, which tensor of torchao they make. Nothing of it is trusted: anybody may have written the file.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tt_ckpt.hf.stored_tensors import StoredTensors
from tt_ckpt.shown import listed, plain, quoted
from tt_train.quantized.torchao import PARTS, attribute, dense, described, joined, parts_of, runnable

_ATTRIBUTES = {
    "Int8Tensor": {"block_size", "dtype", "act_quant_kwargs", "reduce_range"},
    "Int4Tensor": {"block_size", "shape", "activation_dtype"},
    "Float8Tensor": {"block_size", "dtype", "mm_config", "act_quant_kwargs", "kernel_preference"},
    "IntxUnpackedToInt8Tensor": {"target_dtype", "block_size", "dtype", "activation_quantization"},
}
_MUST = {"Int4Tensor": {"block_size", "shape"}, "IntxUnpackedToInt8Tensor": {"target_dtype", "block_size", "dtype"}}
_AGAIN = "download it again, or quantize the original model with tt quantize"


@dataclass(frozen=True, kw_only=True)
class Form:
    """A quantized weight of a file: torchao's class, its attributes, and the plain tensors that it is made of."""

    kind: str
    attributes: dict[str, Any]
    parts: tuple[str, ...]


class QuantizedLinear(nn.Linear):
    """A linear layer with a weight of torchao. It is frozen, and its parts are stored under names of their own."""

    reads_quantized = True  # tt_ckpt.load_weights: the model expects the tensors of a quantized directory
    form: Form | None = None
    waiting: dict[str, Tensor]  # parts by their names in files: meta tensors to be read, or tensors to be written
    read: dict[str, Tensor]
    as_dense = False  # what is read becomes the matrix that it stands for, in fp32

    def file_parameters(self) -> dict[str, Tensor]:
        """The tensors of files that make up the layer."""
        return {**self.waiting, **({} if self.bias is None else {"bias": self.bias})}

    def load_base_(self, name: str, tensor: Tensor) -> None:
        """Take one of the tensors; with the last part, the weight is there."""
        if name == "bias":
            self.bias = nn.Parameter(tensor.clone(), requires_grad=False)
            return
        self.read[name] = tensor.clone()  # the next tensor is read into the same memory
        form = self.form
        assert form is not None
        if self.read.keys() == self.waiting.keys():
            parts = {part: self.read[f"_weight_{part}"] for part in form.parts}
            whole = joined(form.kind, parts, form.attributes)
            self.weight = nn.Parameter(dense(whole) if self.as_dense else runnable(whole), requires_grad=False)
            self.read, self.waiting = {}, {"weight": self.weight}


def store_(layer: nn.Linear, weight: Tensor) -> str:
    """Let ``layer`` compute with the quantized ``weight``, and be written as its parts. Returns its metadata."""
    layer.__class__ = QuantizedLinear
    assert isinstance(layer, QuantizedLinear)
    layer.weight = nn.Parameter(runnable(weight), requires_grad=False)
    layer.waiting = {f"_weight_{name}": part for name, part in parts_of(weight).items()}
    return described(weight)


def metadata_of(weights: Mapping[str, str], plain_names: Iterable[str]) -> dict[str, str]:
    """The metadata of every file of a directory. transformers and vLLM want an entry for unquantized tensors, too."""
    entries = {**weights, **{name: json.dumps({"_type": "Tensor"}) for name in plain_names}}
    return {"format": "pt", **entries, "tensor_names": json.dumps(list(entries))}


# ---- reading ---------------------------------------------------------------------------------------------------------


def is_torchao(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` says that its weights were quantized by torchao."""
    settings = config.get("quantization_config")
    return isinstance(settings, Mapping) and settings.get("quant_method") == "torchao"


def expect_(model: nn.Module, tensors: StoredTensors, *, as_dense: bool = False) -> list[str]:
    """Make every linear layer of ``model``, on the meta device, expect what the files have for it. Returns the names of
    the quantized weights. ``as_dense``: the matrices that they stand for are loaded instead, in fp32.

    ValueError, in one line, for metadata that is damaged, that does not fit the model, or that names what is not read.
    """
    forms = _forms(tensors)
    if not forms:
        raise ValueError(f"{plain(tensors.directory)}: no file says that a tensor is quantized by torchao; {_AGAIN}")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    head = getattr(model, "lm_head", None)
    for name, (file, entry) in forms.items():
        layer = layers.get(name.removesuffix(".weight"))
        if layer is None or not name.endswith(".weight") or layer is head:
            what = "is quantized, and only linear layers inside of the blocks are read so"
            raise ValueError(f"{plain(file)}: {quoted(name)} {what}; {_AGAIN} and leave it out")
        try:
            form = _form(entry)
            shapes = _shapes(form, layer.out_features, layer.in_features)
            _check_parts(name, form, shapes, tensors)
        except ValueError as error:
            raise ValueError(f"{plain(file)}: metadata of {quoted(name)}: {error}; {_AGAIN}") from None
        layer.__class__ = QuantizedLinear
        assert isinstance(layer, QuantizedLinear)
        layer.form, layer.read, layer.as_dense = form, {}, as_dense
        specs = tensors.specs
        prefix = name.removesuffix("weight")
        layer.waiting = {
            f"_weight_{part}": torch.empty(shape, dtype=specs[f"{prefix}_weight_{part}"].dtype, device="meta")
            for part, shape in shapes.items()
        }
    return list(forms)


def _forms(tensors: StoredTensors) -> dict[str, tuple[Path, Mapping[str, Any]]]:
    """The quantized tensors that the metadata of the files names: the file, and its entry. Shards may repeat it."""
    found: dict[str, tuple[Path, Mapping[str, Any]]] = {}
    for header in tensors.headers.values():
        for name, text in (header.metadata or {}).items():
            if name in ("format", "tensor_names"):
                continue
            try:
                entry = json.loads(text)
            except (ValueError, RecursionError):
                continue  # not torchao's: other programs write other keys
            if not isinstance(entry, dict) or entry.get("_type") in (None, "Tensor"):
                continue
            if name in found and found[name][1] != entry:
                files = f"{found[name][0].name} and {header.path.name}"
                raise ValueError(f"{plain(header.path)}: {files} differ about {quoted(name)}; {_AGAIN}")
            found[name] = (header.path, entry)
    return found


def _form(entry: Mapping[str, Any]) -> Form:
    kind, data, parts = entry.get("_type"), entry.get("_data"), entry.get("_tensor_data_names")
    if not isinstance(kind, str) or kind not in PARTS:
        raise ValueError(f"{quoted(kind)} is not a tensor that is read; known: {', '.join(PARTS)}")
    allowed, must = _ATTRIBUTES[kind], _MUST.get(kind, {"block_size", "dtype"})
    if not isinstance(data, dict) or not must <= data.keys() <= allowed:
        names = sorted(map(str, data)) if isinstance(data, dict) else []
        raise ValueError(f"a {kind} has {', '.join(sorted(allowed))}, found {quoted(', '.join(names))}")
    known = PARTS[kind]
    needed = {name for name, (_, must_be) in known.items() if must_be}
    if not isinstance(parts, list) or not all(isinstance(name, str) for name in parts):
        raise ValueError(f"_tensor_data_names must be a list of names, found {quoted(parts)}")
    if not needed <= set(parts) <= known.keys() or len(set(parts)) != len(parts):
        raise ValueError(f"a {kind} is read from {', '.join(known)}, found {quoted(', '.join(parts))}")
    attributes = {name: attribute(value) for name, value in data.items()}
    if kind == "Int4Tensor" and attributes.get("activation_dtype", torch.bfloat16) != torch.bfloat16:
        raise ValueError("4-bit weights for fp8 inputs are not read")
    for name in ("dtype", "target_dtype"):
        if name in must and not isinstance(attributes[name], torch.dtype):
            raise ValueError(f"{name} is {quoted(data[name])}")
    return Form(kind=kind, attributes=attributes, parts=tuple(parts))


def _shapes(form: Form, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    """The shape of each part of a weight ``[rows, columns]``."""
    block = form.attributes["block_size"]
    fits = isinstance(block, list) and len(block) == 2 and rows % block[0] == 0 and columns % block[1] == 0
    if not fits or (form.kind in ("Int4Tensor", "IntxUnpackedToInt8Tensor") and block[0] != 1):
        raise ValueError(f"block_size {quoted(block)} does not divide the weight [{rows}, {columns}]")
    scales = (rows // block[0], columns // block[1])
    shapes: dict[str, tuple[int, ...]] = {**dict.fromkeys(form.parts, scales), "qdata": (rows, columns)}
    if form.kind == "Int4Tensor":
        if form.attributes["shape"] != [rows, columns]:
            raise ValueError(f"shape {quoted(form.attributes['shape'])}, the model has [{rows}, {columns}]")
        if columns % 2 or rows % 16 or block[1] not in (32, 64, 128, 256):
            raise ValueError("the 4-bit kernels of torch want rows by 16, and groups of 32, 64, 128 or 256")
        shapes = {**dict.fromkeys(form.parts, scales[::-1]), "qdata": (rows, columns // 2)}
    return shapes


def _check_parts(name: str, form: Form, shapes: Mapping[str, tuple[int, ...]], tensors: StoredTensors) -> None:
    """ValueError unless the files have every part, with its dtype and shape."""
    prefix = name.removesuffix("weight")
    missing = [key for part in shapes if (key := f"{prefix}_weight_{part}") not in tensors.specs]
    if missing:
        raise ValueError(f"{len(missing)} of its tensors are missing ({listed(missing)})")
    kinds = set()
    for part, shape in shapes.items():
        spec, dtypes = tensors.specs[f"{prefix}_weight_{part}"], PARTS[form.kind][part][0]
        if spec.dtype not in dtypes or spec.shape != shape:
            found = f"{str(spec.dtype).removeprefix('torch.')} {list(spec.shape)}"
            wanted = f"{' or '.join(str(kind).removeprefix('torch.') for kind in dtypes)} {list(shape)}"
            raise ValueError(f"{part} is {found}, expected {wanted}")
        kinds |= {spec.dtype} if spec.dtype.itemsize > 1 else set()
    if form.kind == "Int4Tensor" and len(kinds) > 1:
        raise ValueError("scale and zero_point have different dtypes")
