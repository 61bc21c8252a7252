"""A safetensors file read at the places of its tensors, into memory that is there already.

Without a memory map no page of the file counts as this process's, and a file that is cut short while it is read is an
error, not the end of the process.
"""

import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

from tt_ckpt.safetensors_file import Header, flat_bytes

_PIECE = 1 << 20  # bytes that a cache holds


class PlacedFile:
    """The tensors of one file, read when asked for. ``close`` it, or let go of it."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self._file = header.path.open("rb", buffering=0)
        self.close = weakref.finalize(self, self._file.close)
        self._piece = torch.empty(0, dtype=torch.uint8)

    def read_into(self, name: str, out: Tensor) -> None:
        """Fill ``out``, cast to its dtype and moved to its device a piece at a time where those differ."""
        spec = self.header.tensors[name]
        assert tuple(out.shape) == spec.shape
        if not out.is_contiguous() or type(out) is not Tensor:
            whole = torch.empty(spec.shape, dtype=spec.dtype)
            self.read_into(name, whole)
            out.copy_(whole)
        elif out.dtype == spec.dtype and out.device.type == "cpu":
            self._read(self.header.offsets[name], flat_bytes(out))
        else:
            flat, done = out.view(-1), 0
            for piece in self._pieces(name):
                values = piece.view(spec.dtype)
                flat[done : done + values.numel()].copy_(values)
                done += values.numel()

    def _pieces(self, name: str) -> Iterator[Tensor]:
        """The bytes of a tensor, each piece in the memory of the one before."""
        if not self._piece.numel():
            self._piece = torch.empty(_PIECE, dtype=torch.uint8)
        start, nbytes = self.header.offsets[name], self.header.tensors[name].nbytes
        for begin in range(0, nbytes, _PIECE):
            piece = self._piece[: min(_PIECE, nbytes - begin)]
            self._read(start + begin, piece)
            yield piece

    def _read(self, offset: int, out: Tensor) -> None:
        """Fill ``out``, bytes in memory of the CPU."""
        view = memoryview(out.numpy())  # type: ignore[arg-type]
        self._file.seek(self.header.start + offset)
        while view:
            count = self._file.readinto(view)
            if not count:
                raise ValueError(f"{self.header.path}: cut short while it was read; download it again")
            view = view[count:]
