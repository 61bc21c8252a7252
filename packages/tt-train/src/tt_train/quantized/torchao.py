"""The door to torchao: its configs, its tensors and their parts. https://github.com/pytorch/ao

Its paths move between releases, so tt_train imports it only here, and only if a run or a directory asks for it.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tt_train.config import QuantizationSection

if TYPE_CHECKING:
    from torchao.core.config import AOBaseConfig

# classes of torchao's tensors whose parts are read from files -> what a part may be: its dtypes, and whether it must be
FLOATS = (torch.bfloat16, torch.float32, torch.float16)
PARTS: dict[str, dict[str, tuple[tuple[torch.dtype, ...], bool]]] = {
    "Int8Tensor": {"qdata": ((torch.int8,), True), "scale": (FLOATS, True), "zero_point": ((torch.int8,), False)},
    "Int4Tensor": {"qdata": ((torch.int8,), True), "scale": (FLOATS, True), "zero_point": (FLOATS, True)},
    "Float8Tensor": {"qdata": ((torch.float8_e4m3fn,), True), "scale": (FLOATS, True)},
    "IntxUnpackedToInt8Tensor": {
        "qdata": ((torch.int8,), True), "scale": (FLOATS, True), "zero_point": ((torch.int8,), True),
    },
}  # fmt: skip
_DTYPES = {str(kind).removeprefix("torch."): kind for kind in (*FLOATS, torch.int8, torch.float8_e4m3fn)}
_DTYPES |= {f"int{bits}": getattr(torch, f"int{bits}") for bits in range(1, 8)}


@contextmanager
def quietly() -> Iterator[None]:
    """Without torchao's and torch's warnings about extensions and enums, which mean nothing to a run."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# ---- configs ---------------------------------------------------------------------------------------------------------


def trained_config(section: QuantizationSection) -> "AOBaseConfig":
    """The config for which a ``qat`` run with this section trains."""
    return _intx(section.weights, section.group_size, inputs=section.activations is not None)


def config_of(name: str, group_size: int | None) -> "AOBaseConfig":
    """torchao's config of the format ``name``. None of them changes settings of torch's compiler."""
    with quietly():
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            Float8WeightOnlyConfig,
            Int4WeightOnlyConfig,
            Int8DynamicActivationInt8WeightConfig,
            Int8WeightOnlyConfig,
            PerRow,
        )

    if name == "int8":
        return Int8WeightOnlyConfig(set_inductor_config=False)
    if name == "int8-dynamic":
        return Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    if name == "int4":
        assert group_size is not None
        return Int4WeightOnlyConfig(group_size=group_size, set_inductor_config=False)
    if name == "fp8":
        return Float8WeightOnlyConfig(set_inductor_config=False)
    if name == "fp8-dynamic":
        return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    inputs = name.startswith("int8-dynamic-")
    return _intx("int4" if "int4" in name else "int8", group_size, inputs=inputs)


def _intx(weights: str, group_size: int | None, *, inputs: bool) -> "AOBaseConfig":
    with quietly():
        from torchao.quantization import (
            Int8DynamicActivationIntxWeightConfig,
            IntxWeightOnlyConfig,
            PerAxis,
            PerGroup,
        )

    dtype = {"int4": torch.int4, "int8": torch.int8}[weights]  # type: ignore[attr-defined]
    granularity = PerAxis(0) if group_size is None else PerGroup(group_size)
    if inputs:
        return Int8DynamicActivationIntxWeightConfig(weight_dtype=dtype, weight_granularity=granularity)
    return IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity)


def as_dict(config: "AOBaseConfig") -> dict[str, Any]:
    """The config as ``config.json`` has it."""
    with quietly():
        from torchao.core.config import config_to_dict

    found: dict[str, Any] = config_to_dict(config)
    return found


def roundings(config: "AOBaseConfig", in_features: int, out_features: int) -> tuple[Any, Any]:
    """torchao's rounding of the weights, and of the inputs or None, of one layer in training."""
    with quietly():
        from torchao.quantization import quantize_
        from torchao.quantization.qat import QATConfig

    probe = nn.Sequential(nn.Linear(in_features, out_features, bias=False, device="meta"))
    with quietly():
        quantize_(probe, QATConfig(config, step="prepare"))
    prepared: Any = probe[0]
    return prepared.weight_fake_quantizer, prepared.activation_fake_quantizer


# ---- tensors ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def quantized(weight: Tensor, name: str, group_size: int | None, *, symmetric: bool = False) -> Tensor:
    """``weight`` ``[out, in]`` as the tensor of torchao that files store.

    ``symmetric``: 4-bit weights are rounded as ``qat`` rounds them in training, so that their zeros are 0.
    """
    if name == "int4":
        assert group_size is not None
        return _int4(weight, group_size, symmetric=symmetric)
    with quietly():
        from torchao.quantization import quantize_

        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
        quantize_(nn.Sequential(layer), config_of(name, group_size))
    return layer.weight.detach()


def _int4(weight: Tensor, group_size: int, *, symmetric: bool) -> Tensor:
    """``Int4Tensor``, ``w = q scale + zero`` with q from -8 to 7. torchao makes it with CUDA kernels (mslk) only."""
    with quietly():
        from torchao.quantization import Int4Tensor

    if symmetric:
        made: Any = quantized(weight, "int4-unpacked", group_size)
        codes, scale = made.qdata, made.scale
        zero = torch.zeros_like(scale)
    else:
        groups = weight.float().view(len(weight), -1, group_size)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        step = (high - low).clamp(min=1e-6) / 15
        codes = ((groups - low) / step).round().clamp(0, 15).sub(8).to(torch.int8).flatten(1)
        scale, zero = step.squeeze(-1), (low + 8 * step).squeeze(-1)
    packed = (codes[:, ::2] & 15) | (codes[:, 1::2] << 4)
    columns = [part.to(weight.dtype).t().contiguous() for part in (scale, zero)]
    made = Int4Tensor(packed.contiguous(), *columns, [1, group_size], weight.shape)
    return made  # type: ignore[no-any-return]


def parts_of(weight: Any) -> dict[str, Tensor]:
    """The plain tensors that make up a quantized one, under torchao's names; no copies."""
    parts = {name: getattr(weight, name, None) for name in PARTS[type(weight).__name__]}
    return {name: part for name, part in parts.items() if part is not None}


def described(weight: Any) -> str:
    """The metadata of a quantized tensor, as torchao's safetensors files have it."""
    with quietly():
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    metadata = flatten_tensor_state_dict({"one.weight": weight})[1]
    return str(metadata["one.weight"])


def joined(kind: str, parts: Mapping[str, Tensor], attributes: Mapping[str, Any]) -> Tensor:
    """The tensor of the class ``kind`` made of ``parts`` and of what ``attributes_of`` gave."""
    with quietly():
        import torchao.quantization

    made: Tensor = getattr(torchao.quantization, kind)(**parts, **attributes)
    return made


def runnable(weight: Any) -> Tensor:
    """The form in which the weight computes on its device. On a CPU, 4 bits need the order of torch's own kernel."""
    if type(weight).__name__ != "Int4Tensor" or weight.device.type != "cpu":
        return weight  # type: ignore[no-any-return]
    with quietly():
        from torchao.prototype.quantization.int4 import Int4OpaqueTensor

    codes = _codes(weight).to(torch.int32) + 8
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    factors = torch.stack([weight.scale, weight.zero_point], dim=-1).contiguous()
    made: Tensor = Int4OpaqueTensor(packed, factors, list(weight.block_size), weight.shape)
    return made


def dense(weight: Any) -> Tensor:
    """The matrix that a stored quantized weight stands for, in fp32; rounded to its dtype if torchao computes so."""
    if type(weight).__name__ == "Int8Tensor":
        return weight.dequantize(torch.float32)  # type: ignore[no-any-return]
    if type(weight).__name__ != "Int4Tensor":
        return weight.dequantize().float()  # type: ignore[no-any-return]
    groups = _codes(weight).float().view(*weight.scale.t().shape, -1)
    scale, zero = (part.float().t().unsqueeze(-1) for part in (weight.scale, weight.zero_point))
    matrix: Tensor = (groups * scale + zero).flatten(1)
    return matrix


def _codes(weight: Any) -> Tensor:
    """The values from -8 to 7 of an ``Int4Tensor``, ``[out, in]`` in int8."""
    packed = weight.qdata
    return torch.stack([(packed << 4) >> 4, packed >> 4], dim=-1).flatten(1)


# ---- attributes from files -------------------------------------------------------------------------------------------


def attribute(value: Any, *, depth: int = 4) -> Any:
    """A value of the metadata of a file as torchao's tensors take it. ValueError for what they never write.

    Only the few classes below are made, never what a file names: it may come from anybody.
    """
    if value is None or isinstance(value, bool | int) or (isinstance(value, str) and value in _WORDS):
        return value
    if isinstance(value, list) and len(value) <= 4 and all(type(size) is int and 0 < size < 1 << 40 for size in value):
        return value
    if not depth or not isinstance(value, dict) or value.keys() != {"_type", "_data"}:
        raise ValueError("an attribute of an unknown form")
    kind, data = value["_type"], value["_data"]
    if kind == "torch.dtype" and isinstance(data, str) and data in _DTYPES:
        return _DTYPES[data]
    with quietly():
        from torchao.float8.inference import Float8MMConfig
        from torchao.quantization import MappingType, PerRow, PerTensor
        from torchao.quantization.quantize_.common import KernelPreference
        from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs, QuantizeTensorToInt8Kwargs

    enums = {"MappingType": MappingType, "KernelPreference": KernelPreference}
    classes = {
        found.__name__: found
        for found in (Float8MMConfig, PerRow, PerTensor, QuantizeTensorToFloat8Kwargs, QuantizeTensorToInt8Kwargs)
    }
    if kind in enums and isinstance(data, str) and data in enums[kind].__members__:
        return enums[kind][data]
    if kind not in classes or not isinstance(data, dict):
        raise ValueError("an attribute of an unknown type")
    try:
        return classes[kind](**{name: attribute(item, depth=depth - 1) for name, item in data.items()})
    except TypeError:
        raise ValueError(f"an attribute that no {kind} has") from None


_WORDS = {"int8_asym_per_token", "int8_sym_per_token"}
