"""Weights from a Hugging Face directory into a module: lazily, shard by shard, strict about every name and shape."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from tt_ckpt.hf.directory import read_config, resolve
from tt_ckpt.hf.fill import fill
from tt_ckpt.hf.mismatch import describe_mismatch, describe_tie, refuse_quantized
from tt_ckpt.hf.parameters import Slot, find_slots, join, meta, sources_of
from tt_ckpt.hf.shards import OpenShards, Shards, find_shards
from tt_ckpt.hf.weights import EMBEDDING, OUTPUT, is_finite, num_not_finite

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Plan:
    """Which keys fill which slot, and everything that does not fit."""

    fills: list[tuple[Slot, str, list[str]]] = field(default_factory=list)  # slot, the name of it in use, its keys
    equal: list[tuple[str, str]] = field(default_factory=list)  # keys of tied tensors, which must agree
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)  # key, ours, the file's


def load_weights(
    model: nn.Module,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    check_finite: bool = True,
    copy: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fill every base parameter of ``model`` from the safetensors files of ``path`` (a directory or a hub id).

    Nothing is copied before every name and shape fits; then one tensor at a time is read, without a memory map.
    Parameters on the meta device are created on ``device`` (default: the CPU) in ``dtype`` (default: the file's).
    Others keep their device and dtype unless these are given. Adapter parameters are left alone, and a module with
    ``load_base_(name, tensor)`` receives its tensors through it, each in memory that the next one overwrites.
    ``progress(bytes done, bytes in all)`` follows.
    ``copy=False``: parameters on meta become views of the memory map where dtype and device allow, taking no memory
    until they are written to; whoever cuts such a file short kills this process (SIGBUS).

    Raises FileNotFoundError or ValueError, in one line, for what is missing, unexpected, of another shape, damaged or
    (with ``check_finite``) not finite.
    """
    directory, shards, plan = _fitting(model, path)
    _refuse_meta_buffers(model)
    tensors = OpenShards(shards)
    for kept, other in plan.equal:
        if not torch.equal(tensors[kept], tensors[other]):
            raise ValueError(describe_tie(directory, kept, other, (shards.spec(kept).shape, shards.spec(other).shape)))
    bad: list[str] = []
    casts: dict[tuple[torch.dtype, torch.dtype], int] = {}
    done = 0
    for slot, name, keys, finished in _by_shard(plan, shards):
        stored, new = fill(model, tensors, slot, name, keys, dtype=dtype, device=device, copy=copy)
        if new.dtype != stored:
            casts[stored, new.dtype] = casts.get((stored, new.dtype), 0) + 1
        if check_finite and not is_finite(new):
            problem = _not_finite(join(model, name, keys, [tensors[key] for key in keys]), new)
            bad.append(f"{name} ({problem})")
        done += sum(shards.spec(key).nbytes for key in keys)
        if progress:
            progress(done, shards.nbytes)
        del new
        for file in finished:
            tensors.release(file)
    for (old, new_dtype), count in casts.items():
        logger.info("%s: %d tensors cast from %s to %s", directory, count, old, new_dtype)
    if bad:
        raise ValueError(f"{directory}: {len(bad)} tensors are not finite: {', '.join(bad[:3])}; download again")


def check_weights(model: nn.Module, path: str | Path) -> None:
    """ValueError or FileNotFoundError, as of ``load_weights``, if the files of ``path`` do not fit ``model``.

    Only headers are read, so that this takes no time; ``model`` may be on the meta device.
    """
    _fitting(model, path)


def _fitting(model: nn.Module, path: str | Path) -> tuple[Path, Shards, Plan]:
    """The files, and which of their tensors goes where; an error if a name or a shape does not fit."""
    directory = resolve(path)
    shards = find_shards(directory)
    config = read_config(directory) if (directory / "config.json").exists() else {}
    refuse_quantized(directory, config)
    plan = make_plan(model, shards)
    if plan.missing or plan.unexpected or plan.shapes:
        raise ValueError(describe_mismatch(directory, model, plan.missing, plan.unexpected, plan.shapes))
    _refuse_other_kinds(model, directory, plan, shards)
    return directory, shards, plan


def tensor_dtypes(path: str | Path) -> dict[str, torch.dtype]:
    """The dtype of every tensor in the safetensors files of a directory or hub id, by its name there.

    Only headers are read. ``save_hf(..., dtype=tensor_dtypes(base))`` writes a changed model as its base was.
    """
    shards = find_shards(resolve(path))
    return {key: shards.spec(key).dtype for key in shards.where}


def make_plan(model: nn.Module, shards: Shards) -> Plan:
    """Match the slots of ``model`` with the keys of the files, without reading a tensor."""
    plan = Plan()
    used: set[str] = set()
    for slot in find_slots(model):
        found = [(name, keys) for name in slot.names if (keys := _keys_of(model, name, shards))]
        if not found:
            plan.missing += [key for key in sources_of(model, slot.name) if key not in shards.where]
            used.update(sources_of(model, slot.name))
            continue
        name, keys = found[0]
        plan.fills.append((slot, name, keys))
        used.update(key for _, others in found for key in others)
        plan.equal += [pair for _, others in found[1:] for pair in zip(keys, others, strict=True)]
        plan.shapes += _wrong_shapes(model, slot, name, keys, shards)
    for key in shards.where:
        if key in used or key.endswith("rotary_emb.inv_freq"):
            continue
        if key == OUTPUT and EMBEDDING in used and EMBEDDING in shards.where:
            plan.equal.append((EMBEDDING, OUTPUT))
        else:
            plan.unexpected.append(key)
    return plan


def _keys_of(model: nn.Module, name: str, shards: Shards) -> list[str]:
    """The sources of a parameter; or itself, as transformers 5 can write stacked experts; or nothing."""
    sources = sources_of(model, name)
    if all(key in shards.where for key in sources):
        return sources
    return [name] if name in shards.where else []


def _wrong_shapes(
    model: nn.Module, slot: Slot, name: str, keys: list[str], shards: Shards
) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    ours = tuple(slot.tensor.shape)
    parts = [meta(shards.spec(key)) for key in keys]
    try:
        theirs = tuple(join(model, name, keys, parts).shape)
    except (RuntimeError, ValueError, IndexError):  # parts that do not even fit each other
        theirs = tuple(parts[0].shape)
    return [] if ours == theirs else [(name, ours, theirs)]


def _by_shard(plan: Plan, shards: Shards) -> Iterable[tuple[Slot, str, list[str], list[str]]]:
    """The fills in the order of the files, each with the files that are not needed afterwards."""

    def last_file(fill: tuple[Slot, str, list[str]]) -> tuple[str, int]:
        return max((shards.where[key], shards.files[shards.where[key]].offsets[key]) for key in fill[2])

    fills = sorted(plan.fills, key=last_file)
    last_use = {shards.where[key]: i for i, (_, _, keys) in enumerate(fills) for key in keys}
    for i, (slot, name, keys) in enumerate(fills):
        yield slot, name, keys, [file for file, last in last_use.items() if last == i]


def _not_finite(source: Tensor, filled: Tensor) -> str:
    """How many values are NaN or infinite, in words."""
    count = num_not_finite(filled)
    if is_finite(source):
        return f"{count} values overflow {str(filled.dtype).removeprefix('torch.')}"
    return f"{count} of {filled.numel()} values"


def _refuse_other_kinds(model: nn.Module, directory: Path, plan: Plan, shards: Shards) -> None:
    """Whole numbers are no weights, nor are fractions what an integer buffer holds: neither is cast."""
    for slot, name, keys in plan.fills:
        ours, theirs = slot.tensor.dtype, join(model, name, keys, [meta(shards.spec(key)) for key in keys]).dtype
        if ours.is_floating_point != theirs.is_floating_point:
            raise ValueError(
                f"{directory}: {name}: the model has {ours}, the file {theirs}, not converted; take its own weights"
            )


def _refuse_meta_buffers(model: nn.Module) -> None:
    held = {id(slot.tensor) for slot in find_slots(model)}
    for name, buffer in model.named_buffers():
        if buffer.device.type == "meta" and id(buffer) not in held:
            raise ValueError(f"buffer {name} is on the meta device and in no file; build the model on a real device")
