"""Weights from a Hugging Face directory into a module, one tensor at a time. Every name and shape must fit."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tt_ckpt.hf.base_tensors import BaseTensor, base_tensors, join_sources, meta, sources_of
from tt_ckpt.hf.directory import read_config
from tt_ckpt.hf.mismatch import describe_mismatch, describe_tie, refuse_quantized
from tt_ckpt.hf.stored_tensors import StoredTensors, open_tensors
from tt_ckpt.hf.weights import EMBEDDING, OUTPUT, is_finite, num_not_finite, overflowing
from tt_ckpt.model_path import resolve
from tt_ckpt.ranks import box, chunk_of, is_dtensor, like_dtensor
from tt_ckpt.shown import counted

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Fill:
    """A base tensor of the model, and the stored tensors that fill it."""

    base: BaseTensor
    name: str  # the one of its names that the files use
    keys: list[str]
    stored: Tensor  # on meta: what the files give
    is_joined: bool  # made of several tensors, or changed


@dataclass(frozen=True, kw_only=True)
class _Plan:
    directory: Path
    tensors: StoredTensors
    fills: list[_Fill]
    equal: list[tuple[str, str]]  # names of stored tensors that are tied in the model, and so must be equal


def load_weights(
    model: nn.Module,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    check_finite: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fill every base parameter of ``model`` from the safetensors files of ``path``, a directory or a hub id.

    Nothing is copied before every name and shape fits. Then one tensor at a time is read, without a memory map.
    Parameters on the meta device are created on ``device`` (default: the CPU) in ``dtype`` (default: the file's).
    Others keep their device and dtype unless these are given. Adapter parameters are left alone. A module with
    ``load_base_(name, tensor)`` receives its tensors through it, each in memory that the next one overwrites.
    Quantized files are refused, unless a module has the attribute ``reads_quantized``.
    ``progress(done, total)`` counts bytes.

    Raises FileNotFoundError or ValueError, in one line, if a tensor is missing, unexpected, damaged, of another shape,
    or (with ``check_finite``) not finite.
    """
    plan = _plan(model, path)
    directory, tensors = plan.directory, plan.tensors
    persistent = {id(fill.base.tensor) for fill in plan.fills}
    for name, buffer in model.named_buffers():
        if buffer.device.type == "meta" and id(buffer) not in persistent:
            raise ValueError(f"buffer {name} is on the meta device and in no file; build the model on a real device")
    for kept, other in plan.equal:
        if not torch.equal(tensors.mapped(kept), tensors.mapped(other)):
            shapes = tensors.specs[kept].shape, tensors.specs[other].shape
            raise ValueError(describe_tie(directory, kept, other, shapes))
    bad: list[str] = []
    casts: dict[tuple[torch.dtype, torch.dtype], int] = {}
    done = 0
    for fill in plan.fills:
        new = _fill(model, tensors, fill, dtype, device)
        if new.dtype != fill.stored.dtype:
            casts[fill.stored.dtype, new.dtype] = casts.get((fill.stored.dtype, new.dtype), 0) + 1
        if check_finite and not is_finite(new):
            bad.append(f"{fill.name} ({_not_finite(model, tensors, fill, new)})")
        done += sum(tensors.specs[key].nbytes for key in fill.keys)
        if progress:
            progress(done, tensors.nbytes)
        del new
        tensors.release()
    for (old, new_dtype), count in casts.items():
        logger.info("%s: %s cast from %s to %s", directory, counted(count, "tensor"), old, new_dtype)
    if bad:
        many = f"{len(bad)} tensors are" if len(bad) > 1 else "1 tensor is"
        raise ValueError(f"{directory}: {many} not finite: {', '.join(bad[:3])}; download again")


def check_weights(model: nn.Module, path: str | Path) -> None:
    """The errors of ``load_weights`` about names and shapes, if the files of ``path`` do not fit ``model``.

    Only headers are read, so this is fast. ``model`` may be on the meta device.
    """
    _plan(model, path)


def _plan(model: nn.Module, path: str | Path) -> _Plan:
    """Which stored tensors fill which base tensors, in the order of the files; an error if any does not fit."""
    directory = resolve(path)
    tensors = open_tensors(directory)
    config = read_config(directory) if (directory / "config.json").exists() else {}
    if not any(getattr(module, "reads_quantized", False) for module in model.modules()):
        refuse_quantized(directory, config)
    specs, used = tensors.specs, set[str]()
    plan = _Plan(directory=directory, tensors=tensors, fills=[], equal=[])
    missing: list[str] = []
    unexpected: list[str] = []
    shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
    for base in base_tensors(model):
        found: list[tuple[str, list[str]]] = []
        for name in base.names:
            sources = sources_of(model, name)
            if all(key in specs for key in sources):
                found.append((name, sources))
            elif name in specs:  # transformers 5 can write stacked experts as the model holds them
                found.append((name, [name]))
        if not found:
            missing += [key for key in sources_of(model, base.names[0]) if key not in specs]
            used.update(sources_of(model, base.names[0]))
            continue
        name, keys = found[0]
        used.update(key for _, others in found for key in others)
        plan.equal.extend(pair for _, others in found[1:] for pair in zip(keys, others, strict=True))
        parts = [meta(specs[key]) for key in keys]
        try:
            stored = join_sources(model, name, keys, parts)
        except (RuntimeError, ValueError, IndexError):  # parts that do not even fit each other
            stored = parts[0]
        if stored.shape != base.tensor.shape:
            shapes.append((name, tuple(base.tensor.shape), tuple(stored.shape)))
        is_joined = stored is not parts[0]
        plan.fills.append(_Fill(base=base, name=name, keys=keys, stored=stored, is_joined=is_joined))
    for key in specs:
        if key == OUTPUT and key not in used and EMBEDDING in used and EMBEDDING in specs:
            plan.equal.append((EMBEDDING, OUTPUT))
        elif key not in used and not key.endswith("rotary_emb.inv_freq"):
            unexpected.append(key)
    if missing or unexpected or shapes:
        raise ValueError(describe_mismatch(directory, model, missing, unexpected, shapes))
    for fill in plan.fills:  # integers are not weights, and an integer buffer has no fractions: neither is cast
        ours, theirs = fill.base.tensor.dtype, fill.stored.dtype
        if ours.is_floating_point != theirs.is_floating_point:
            kinds = f"the model has {ours}, the file {theirs}, not converted"
            raise ValueError(f"{directory}: {fill.name}: {kinds}; use the weights of this model")
    plan.fills.sort(key=lambda fill: max((tensors.where[key], tensors.offset_of(key)) for key in fill.keys))
    return plan


@torch.no_grad()
def _fill(
    model: nn.Module,
    tensors: StoredTensors,
    fill: _Fill,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> Tensor:
    """Fill one base tensor. Returns the tensor that it holds then, or that its module was given."""
    old, keys, stored = fill.base.tensor, fill.keys, fill.stored
    on_meta = old.device.type == "meta"
    target_dtype = (dtype or (stored.dtype if on_meta else old.dtype)) if stored.is_floating_point() else stored.dtype
    home = torch.device(old.device_mesh.device_type if is_dtensor(old) else "cpu")
    target_device = torch.device(device or (home if on_meta else old.device))
    module, local = fill.base.places[0]
    if getattr(module, "spread", None) is not None and local == "weight":  # this rank quantizes its own blocks
        view = join_sources(model, fill.name, keys, [tensors.mapped(key) for key in keys])
        part: Tensor = module.load_slice_(view, device=target_device, dtype=dtype or view.dtype)  # type: ignore[operator]
        return part
    if callable(load_base := getattr(module, "load_base_", None)):
        if fill.is_joined:
            tensor = join_sources(model, fill.name, keys, [tensors[key] for key in keys])
        else:
            tensor = tensors.borrow(keys[0])
        given = tensor.to(device=target_device, dtype=dtype or tensor.dtype)
        load_base(local, given)
        return given
    source: Tensor | None = None
    if is_dtensor(old):  # this rank reads only its part
        source = _local_part(join_sources(model, fill.name, keys, [tensors.mapped(key) for key in keys]), old)
    elif fill.is_joined:
        source = join_sources(model, fill.name, keys, [tensors[key] for key in keys])
    fits = not on_meta and old.dtype == target_dtype and old.device == target_device
    if fits:
        new = old.to_local() if is_dtensor(old) else old.detach()
    elif source is None:
        new = torch.empty(stored.shape, dtype=target_dtype, device=target_device)
    else:
        new = source.to(device=target_device, dtype=target_dtype, copy=True).contiguous()
    if source is None:
        tensors.read_into(keys[0], new)
    elif fits:
        new.copy_(source)
    if not fits:
        fill.base.put(like_dtensor(new, old) if is_dtensor(old) else new)
    return new


def _local_part(whole: Tensor, like: "DTensor") -> Tensor:
    """The part of ``whole`` that this rank holds of ``like``: a view, so that nothing else is read."""
    chunk = chunk_of(like)
    return box(whole, chunk.offsets, chunk.sizes)


def _not_finite(model: nn.Module, tensors: StoredTensors, fill: _Fill, filled: Tensor) -> str:
    """How many values are NaN or infinite, in words."""
    count = num_not_finite(filled)
    if is_finite(join_sources(model, fill.name, fill.keys, [tensors[key] for key in fill.keys])):
        return overflowing(count, filled.dtype)
    return f"{count} of {filled.numel()} values"
