"""Tensors as views of a memory map, whose pages leave memory when they are done with."""

import ctypes
import mmap
from pathlib import Path

import torch
from torch import Tensor

from tt_ckpt.files import DOWNLOAD
from tt_ckpt.safetensors_file import Header, read_header
from tt_ckpt.shown import plain, quoted


class MappedFile:
    """A safetensors file whose tensors are views of a private memory map: pages are read when a tensor is used."""

    def __init__(self, path: str | Path, header: Header | None = None) -> None:
        self.header = header or read_header(path)
        self._given: list[Tensor] = []
        try:
            size = self.header.path.stat().st_size
            self._bytes = torch.UntypedStorage.from_file(str(self.header.path), shared=False, nbytes=size)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{plain(self.header.path)}: not read ({quoted(str(error))}); {DOWNLOAD}") from None

    def tensor(self, name: str) -> Tensor:
        if name not in self.header.tensors:
            raise ValueError(f"{plain(self.header.path)}: it has no tensor {quoted(name)}; {DOWNLOAD}")
        spec, begin = self.header.tensors[name], self.header.offsets[name]
        held = self._bytes[begin : begin + spec.nbytes]
        if held.nbytes() != spec.nbytes:
            raise ValueError(f"{plain(self.header.path)}: cut short since it was opened; {DOWNLOAD}")
        self._given.append(torch.empty(0, dtype=spec.dtype).set_(held, 0, spec.shape))  # type: ignore[call-overload]
        return self._given[-1]

    def release(self) -> None:
        """Drop the pages of all tensors given so far from memory; they are read again if they are used again."""
        for tensor in self._given:
            release_mapped(tensor)
        self._given.clear()


def release_mapped(tensor: Tensor) -> None:
    """Drop the pages of a contiguous view of a private, unchanged memory map from memory, if the system can do so.

    They are read again from the file when they are used again. Other memory would lose its values.
    """
    advice, page = getattr(mmap, "MADV_DONTNEED", None), mmap.PAGESIZE
    if advice is not None and tensor.nbytes:
        begin = tensor.data_ptr() // page * page
        size = tensor.data_ptr() + tensor.nbytes - begin
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), ctypes.c_int(advice))
