"""GGUF files are written tensor by tensor, read back and compared with what was meant, and only then named."""

import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tt_ckpt import commit
from tt_ckpt.files import TMP_PREFIX
from tt_ckpt.formats.gguf.blocks import decode, encode, is_within, quant_sizes
from tt_ckpt.formats.gguf.file import read_gguf, read_rows
from tt_ckpt.hf.directory import check_room
from tt_ckpt.hf.weights import is_finite
from tt_ckpt.shown import plain

if TYPE_CHECKING:
    from gguf import GGUFWriter

_FAILING = "the disk may be failing"
Rows = Callable[[str], Iterator[Tensor]]


@dataclass(frozen=True, kw_only=True)
class GGUFWritten:
    """What was written. Plain data. ``error``: the root mean square error of the matrices, relative to their values."""

    path: str
    type: str
    num_tensors: int
    num_bytes: int
    types: dict[str, int]  # how many tensors are of each type
    error: float
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class GGUFPlan:
    """A file that is to be written. ``rows(name)`` gives a tensor as matrices of some of its rows each."""

    kind: str
    values: dict[str, Any]
    kinds: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    rows: Rows
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(_nbytes(shape, self.kinds[name]) for name, shape in self.shapes.items())


def _nbytes(shape: tuple[int, ...], kind: str) -> int:
    _, width, size = next(sizes for sizes in quant_sizes().values() if sizes[0] == kind)
    return torch.Size(shape).numel() // width * size


def check_new_file(path: Path, nbytes: int) -> None:
    """FileExistsError if something is at ``path``; OSError unless its disk has room."""
    if os.path.lexists(path):
        raise FileExistsError(f"{plain(path)}: exists; choose another file")
    check_room(path, nbytes)


def write_gguf(plan: GGUFPlan, path: Path, *, progress: Callable[[int, int], None] | None = None) -> GGUFWritten:
    """Write ``plan`` to the new file ``path``, in the memory of a tensor; ``progress(done, total)`` counts bytes.

    The file is read back by this package's reader: keys must be equal, and tensors within the error of their type. It
    appears whole or not at all.

    Raises:
        FileExistsError: ``path`` exists. OSError: no room. ValueError: a value that is not finite or overflows.
    """
    check_new_file(path, plan.nbytes)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f"{TMP_PREFIX}{secrets.token_hex(4)}.gguf")
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, 2 * plan.nbytes)

    try:
        _write(plan, tmp, path, advance)
        error = _compare(plan, tmp, path, advance)
        tmp.rename(path)
        commit.fsync_dir(path.parent)
    finally:
        tmp.unlink(missing_ok=True)
    types = [plan.kinds[name] for name in plan.shapes]
    return GGUFWritten(
        path=str(path), type=plan.kind, num_tensors=len(types), num_bytes=path.stat().st_size,
        types={kind: types.count(kind) for kind in sorted(set(types))}, error=error, notes=list(plan.notes),
    )  # fmt: skip


def _write(plan: GGUFPlan, tmp: Path, path: Path, advance: Callable[[int], None]) -> None:
    writer = _start(plan, tmp)
    assert writer.fout is not None
    file = writer.fout[0]
    writer.write_padding(file, file.tell())
    for name in plan.shapes:
        kind, begun = plan.kinds[name], file.tell()
        for rows in plan.rows(name):
            data = encode(rows, kind)
            if kind == "F16" and not is_finite(decode(data, kind)):
                raise ValueError(f"{plain(path)}: {name}: values overflow F16; use --type bf16 or f32")
            file.write(data.tobytes())
            advance(data.nbytes)
        writer.write_padding(file, file.tell() - begun)
    file.flush()
    os.fsync(file.fileno())
    writer.close()


def _start(plan: GGUFPlan, path: Path) -> "GGUFWriter":
    """A file with the header of ``plan``: whole numbers as uint32, others as float32, lists by their first entry."""
    from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

    writer = GGUFWriter(path, str(plan.values["general.architecture"]))
    for key, value in plan.values.items():
        kind = GGUFValueType.get_type(value)
        if key != "general.architecture":  # the writer has it
            writer.add_key_value(key, value, GGUFValueType.UINT32 if kind == GGUFValueType.INT32 else kind)
    for name, shape in plan.shapes.items():
        stored, width = GGMLQuantizationType[plan.kinds[name]], np.dtype(np.float32)
        writer.add_tensor_info(name, shape, width, _nbytes(shape, plan.kinds[name]), stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer


def _compare(plan: GGUFPlan, tmp: Path, path: Path, advance: Callable[[int], None]) -> float:
    """The relative error of the matrices, after a ValueError unless the file says what was meant."""
    again = read_gguf(tmp)
    for key, value in plan.values.items():
        if not _equal(again.values.get(key), value):
            raise ValueError(f"{plain(path)}: reading back: {key} differs from what was written; {_FAILING}")
    squares, total = 0.0, 0.0
    for name, shape in plan.shapes.items():
        tensor, kind, first = again.tensors.get(name), plan.kinds[name], 0
        if tensor is None or (tensor.kind, tensor.shape) != (kind, shape):
            raise ValueError(f"{plain(path)}: reading back: {name} differs from what was written; {_FAILING}")
        for meant in plan.rows(name):
            found = read_rows(tensor, first, len(meant), torch.float32)
            first += len(meant)
            if not is_within(found, meant, kind):
                raise ValueError(f"{plain(path)}: reading back: {name} differs by more than {kind} rounds; {_FAILING}")
            if len(shape) > 1:
                squares += float((found - meant.float()).double().square().sum())
                total += float(meant.double().square().sum())
            advance(len(meant) * tensor.row_bytes)
    return (squares / total) ** 0.5 if total else 0.0


def _equal(found: Any, meant: Any) -> bool:
    """Numbers with a fraction are stored in float32."""
    if isinstance(meant, float):
        return isinstance(found, float) and abs(found - meant) <= 1e-6 * abs(meant)
    if isinstance(meant, list) and meant and isinstance(meant[0], float):
        return len(found) == len(meant) and all(map(_equal, found, meant))
    return bool(found == meant)
