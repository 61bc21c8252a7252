"""Headers of safetensors files."""

import json
import struct
from pathlib import Path
from typing import Any

from tt_ckpt.safetensors_file import read_header

HEADER = {
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
    "__metadata__": {"format": "pt"},
}


def as_file(header: object) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(22)


def test_any_bytes_are_a_header_or_one_of_our_errors(tmp_path: Path, fuzz: Any) -> None:
    file = tmp_path / "model.safetensors"

    def read(data: bytes) -> None:
        file.write_bytes(data)
        read_header(file)

    fuzz(read, fuzz.mutated(as_file(HEADER)))


def test_any_json_is_a_header_or_one_of_our_errors(tmp_path: Path, fuzz: Any) -> None:
    file = tmp_path / "model.safetensors"

    def read(header: object) -> None:
        file.write_bytes(as_file(header))
        read_header(file)

    fuzz(read, fuzz.mutated_json(HEADER))
