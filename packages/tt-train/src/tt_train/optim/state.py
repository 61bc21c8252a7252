"""The state of an optimizer in a checkpoint: plain tensors by name, out and back in.

Shards of one world come back as those of another. torch's entries are DTensors, which ``tt_ckpt`` spreads anew.
torchao keeps blocks of 8 or 4 bits of the rows that a rank holds: each rank saves its own, and rows that are cut
differently are decoded and coded anew.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tt_ckpt.ranks import chunk_of, is_dtensor
from tt_train.devices.sharding import local
from tt_train.errors import TrainingError
from tt_train.optim.master_weights import MasterWeights, call
from tt_train.optim.optimizers import AnyOptimizer

_NUMBER = "#"  # after the name of an entry that is a number and no tensor
_ROWS = re.compile(r"\[(\d{1,18}):(\d{1,18})\]")  # in the name of an entry: which rows of the parameter it is for


def state_bytes(optimizer: MasterWeights) -> int:
    """How much the optimizer will keep for its parameters; it is called once per shape to find out."""
    sizes: dict[torch.Size, int] = {}
    total = 0
    for one, group, parameter in _members(optimizer):
        if parameter.shape not in sizes:
            state = _first_state(one, group, parameter)
            sizes[parameter.shape] = sum(tensor.nbytes for tensor in _flat(state, by_rows=keeps_few_bits(one)).values())
        total += sizes[parameter.shape]
    return total


def optimizer_tensors(optimizer: AnyOptimizer, names: dict[nn.Parameter, str]) -> dict[str, Tensor]:
    """The optimizer's state as flat, plain tensors: ``<parameter name>/<entry>``.

    The parts of a tensor of 8 or 4 bits are ``<entry>.codes``, ``<entry>.scale`` and so on; a number is a tensor named
    ``<entry>#``. Of a shard of torchao's, the name says which rows it is for: ``<entry>[0:64].codes``. What an
    optimizer counts per group of parameters is saved with the first of them, as ``group:<key>#``. TrainingError if it
    keeps something else, which could not be restored.
    """
    found: dict[str, Tensor] = {}
    for one, _, parameter in _members(optimizer):
        flat = _flat(one.state.get(parameter, {}), by_rows=keeps_few_bits(one))
        found |= {f"{names[parameter]}/{entry}": tensor for entry, tensor in flat.items()}
    for group, counts in optimizer.counted() if isinstance(optimizer, MasterWeights) else ():
        name = names[group["params"][0]]
        found |= {f"{name}/{entry}": tensor for entry, tensor in _flat(counts, "group:").items()}
    return found


def load_optimizer_tensors_(
    optimizer: AnyOptimizer, tensors: Mapping[str, Tensor], names: dict[nn.Parameter, str]
) -> None:
    """The inverse of ``optimizer_tensors``; ValueError if names, shapes or dtypes are not the saved ones."""
    known, saved = set(names.values()), defaultdict[str, dict[str, Tensor]](dict)
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        if name not in known:
            raise ValueError(f"the checkpoint has optimizer state for {name[:200]!r}, which this run does not train")
        saved[name][entry] = value
    for one, group, parameter in _members(optimizer):
        name = names[parameter]
        counts = {entry: saved[name].pop(entry) for entry in list(saved[name]) if entry.startswith("group:")}
        for entry, value in counts.items():
            group[entry.removeprefix("group:").removesuffix(_NUMBER)] = value.item()
        if saved[name]:
            state = _first_state(one, group, parameter)
            own = _flat(state, by_rows=keeps_few_bits(one)).keys()
            if keeps_few_bits(one) and not own <= saved[name].keys():
                _code_anew_(state, saved[name], name, one, group, parameter)
            else:
                others = {entry for entry in saved[name] if _ROWS.search(entry)} - own  # those of other ranks
                mine = {entry: saved[name][entry] for entry in saved[name].keys() - others}
                _fill_(state, mine, name, by_rows=keeps_few_bits(one))
            one.state[parameter] = state


def keeps_few_bits(optimizer: AnyOptimizer) -> bool:
    """Whether the state is torchao's: in blocks of 8 or 4 bits, which are cut by rank."""
    members = optimizer.optimizers if isinstance(optimizer, MasterWeights) else (optimizer,)
    return any(type(one).__module__.startswith("torchao.") for one in members)


@torch.no_grad()
def _code_anew_(
    state: dict[str, Any],
    saved: Mapping[str, Tensor],
    name: str,
    one: torch.optim.Optimizer,
    group: dict[str, Any],
    parameter: nn.Parameter,
) -> None:
    """Fill ``state`` from what was saved for other rows than those that this rank holds."""
    size = len(parameter) if parameter.dim() else 0
    first, end = _rows(parameter) if is_dtensor(parameter) else (0, size)
    cuts = sorted({(int(rows[1]), int(rows[2])) for rows in map(_ROWS.search, saved) if rows}) or [(0, size)]
    if [begin for begin, _ in cuts] != [0, *(stop for _, stop in cuts[:-1])] or cuts[-1][1] != size:
        raise ValueError(f"optimizer state of {name} is for the rows {cuts[:8]}, which are not all of {size}")
    whole = {entry: torch.zeros(end - first, *parameter.shape[1:]) for entry, value in state.items() if value.dim()}
    parts = []
    for begin, stop in cuts:
        low, high = max(begin, first), min(stop, end)
        if low >= high:
            continue
        part = _first_state(one, group, nn.Parameter(torch.zeros(stop - begin, *parameter.shape[1:])))
        rows = f"[{begin}:{stop}]"
        _fill_(
            part, {key.replace(rows, ""): held for key, held in saved.items() if rows in key or "[" not in key}, name
        )
        parts.append((begin, part))
        for entry, value in part.items():
            if entry in whole:
                plain = value if type(value) is Tensor else value.dequantize()
                whole[entry][low - first : high - first] = plain[low - begin : high - begin]
            else:
                state[entry].copy_(value)
    for entry, value in whole.items():
        local(state[entry]).copy_(value)
        for begin, part in parts:
            _copy_blocks_(local(state[entry]), part[entry], (begin - first) * (parameter.numel() // size))


def _copy_blocks_(target: Any, source: Any, offset: int) -> None:
    """Copy the blocks that both have as they are; ``source`` begins ``offset`` values after ``target``."""
    if type(target) is Tensor or type(source) is Tensor or offset % target.block_size:
        return
    low, high = max(0, offset), min(target.numel(), offset + source.numel())
    low, high = low + -low % target.block_size, high - high % target.block_size
    for name in ("codes", "scale") if low < high else ():
        held, given = getattr(target, name).view(-1), getattr(source, name).view(-1)
        values = target.numel() // len(held)  # that one number is for
        held[low // values : high // values] = given[(low - offset) // values : (high - offset) // values]


def _rows(tensor: Any) -> tuple[int, int]:
    """The first row that this rank holds of a DTensor, and the one behind its last."""
    chunk = chunk_of(tensor)
    return chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]


def _fill_(state: dict[str, Any], saved: Mapping[str, Tensor], name: str, *, by_rows: bool = False) -> None:
    """Write saved values into the first state of the parameter ``name``, where the optimizer has put it."""
    expected = _flat(state, by_rows=by_rows)
    for entry in sorted(expected.keys() ^ saved.keys()):
        what = "is missing" if entry in expected else "is not one that this optimizer keeps"
        raise ValueError(f"optimizer state {entry[:200]!r} of {name} {what}")
    for entry, tensor in expected.items():
        found = saved[entry]
        if (found.shape, found.dtype) != (tensor.shape, tensor.dtype):
            has = f"{list(found.shape)} ({found.dtype}), not {list(tensor.shape)} ({tensor.dtype})"
            raise ValueError(f"optimizer state {entry[:200]!r} of {name} has shape {has}")
        if entry.endswith(_NUMBER):
            state[entry.removesuffix(_NUMBER)] = found.item()
        else:
            tensor.copy_(found)


def _members(optimizer: AnyOptimizer) -> Iterator[tuple[torch.optim.Optimizer, dict[str, Any], nn.Parameter]]:
    """Every parameter, with the optimizer and the group that it is in."""
    for one in optimizer.optimizers if isinstance(optimizer, MasterWeights) else (optimizer,):
        for group in one.param_groups:
            yield from ((one, group, parameter) for parameter in group["params"])


@torch.no_grad()
def _first_state(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: nn.Parameter) -> dict[str, Any]:
    """What the optimizer keeps for ``parameter`` after its first step: a copy of it makes one, on zeros.

    So nothing need be known of an optimizer to restore its state, and a saved tensor must fit what the optimizer made.
    """
    zeros = nn.Parameter(torch.zeros_like(parameter, dtype=torch.float32))
    zeros.grad = torch.zeros_like(zeros)
    double: torch.optim.Optimizer = object.__new__(type(optimizer))
    vars(double).update(vars(optimizer))
    double.state, double.param_groups = defaultdict(dict), [{**group, "params": [zeros]}]
    call(double)
    first: dict[str, Any] = double.state[zeros]
    return first


def _flat(entries: Mapping[str, Any], prefix: str = "", *, by_rows: bool = False) -> dict[str, Tensor]:
    """The entries of a parameter as plain tensors; TrainingError for one that could not be restored.

    by_rows: of a DTensor the part of this rank, under a name that says which rows it has.
    """
    flat: dict[str, Tensor] = {}
    for entry, value in entries.items():
        if isinstance(value, Tensor):
            flat |= {f"{prefix}{entry}{part}": tensor for part, tensor in _parts(value, by_rows).items()}
        elif isinstance(value, int | float):
            flat[f"{prefix}{entry}{_NUMBER}"] = torch.tensor(value)
        elif value is not None:
            kind = type(value).__name__
            raise TrainingError(
                f"optimizer: it keeps {entry!r} as a {kind}, which no checkpoint holds; use another one"
            )
    return flat


@torch.no_grad()
def _parts(value: Tensor, by_rows: bool) -> dict[str, Tensor]:
    """A tensor, or the plain ones that a tensor of few bits is made of."""
    if by_rows and is_dtensor(value):
        first, end = _rows(value)
        own = _parts(value.to_local(), False) if end > first else {}
        return {f"[{first}:{end}]{part}": tensor for part, tensor in own.items()}
    if type(value) in (Tensor, nn.Parameter) or is_dtensor(value):
        return {"": value}
    return {f".{name}": getattr(value, name) for name in value.__tensor_flatten__()[0]}  # type: ignore[attr-defined]
