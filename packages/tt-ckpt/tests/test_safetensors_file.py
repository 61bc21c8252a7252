import json
import os
import random
import stat
import struct

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from tt_ckpt.mapped_file import MappedFile
from tt_ckpt.safetensors_file import (
    DTYPES,
    TensorSpec,
    announced,
    read_header,
    read_tensor,
    spec_of,
    write_tensor_dict,
    write_tensors,
)


def one_of_each():
    made = {name.lower(): torch.zeros(2, 3, dtype=dtype) for name, dtype in DTYPES.items()}
    return made | {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4), 'name \u00fc"\\': torch.arange(7.0)}


def test_files_equal_the_librarys_byte_for_byte(tmp_path):
    tensors = one_of_each()
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    write_tensor_dict(tmp_path / "ours", tensors)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_headers_agree_with_the_library(tmp_path):
    save_file(one_of_each(), tmp_path / "file", metadata={"format": "pt", "b": "1"})
    header = read_header(tmp_path / "file")
    with safe_open(tmp_path / "file", "pt") as file:
        assert list(header.tensors) == file.offset_keys()
        assert header.metadata == file.metadata()
        for name, spec in header.tensors.items():
            assert spec == spec_of(file.get_tensor(name))
            assert spec.nbytes == file.get_tensor(name).nbytes


def test_tensors_come_back_from_the_map(tmp_path):
    tensors = one_of_each()
    write_tensor_dict(tmp_path / "file", tensors)
    file = MappedFile(tmp_path / "file")
    for name, tensor in tensors.items():
        assert torch.equal(file.tensor(name).reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_strided_tensors_are_written_in_order(tmp_path):
    tensor = torch.arange(12.0).reshape(3, 4)
    write_tensor_dict(
        tmp_path / "file", {"t": tensor.T, "column": tensor[:, 1], "grad": torch.ones(2, requires_grad=True)}
    )
    assert torch.equal(load_file(tmp_path / "file")["t"], tensor.T)
    assert torch.equal(load_file(tmp_path / "file")["column"], tensor[:, 1])


def test_a_tensor_larger_than_the_copy_buffer_is_whole(tmp_path):
    tensor = torch.arange(5_000_000, dtype=torch.int32)
    write_tensor_dict(tmp_path / "file", {"t": tensor})
    assert torch.equal(load_file(tmp_path / "file")["t"], tensor)
    read = torch.empty_like(tensor)
    read_tensor(read_header(tmp_path / "file"), "t", read)
    assert torch.equal(read, tensor)


def test_a_large_tensor_is_written_in_pieces_that_are_smaller_than_a_huge_page():
    tensor = torch.arange(1_000_000)
    pieces = list(announced("file", "t", spec_of(tensor), tensor))
    assert max(piece.nbytes for piece in pieces) < 2**21
    assert b"".join(pieces) == tensor.numpy().tobytes()


def test_the_hash_is_the_files(tmp_path):
    import hashlib

    digest = write_tensor_dict(tmp_path / "file", one_of_each(), hashed=True)
    assert digest == hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()
    assert write_tensor_dict(tmp_path / "other", one_of_each()) is None


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o000, 0o644)])
def test_the_mode_is_0644_less_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_tensor_dict(tmp_path / "file", {"t": torch.ones(1)})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_a_file_that_exists_is_never_written_over(tmp_path):
    write_tensor_dict(tmp_path / "file", {"t": torch.ones(1)})
    with pytest.raises(FileExistsError):
        write_tensor_dict(tmp_path / "file", {"t": torch.zeros(1)})
    assert load_file(tmp_path / "file")["t"] == 1


def test_a_failure_of_the_disk_while_writing_is_not_lost(tmp_path, monkeypatch):
    def fsync(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"):
        write_tensor_dict(tmp_path / "file", {"a": torch.arange(1000.0)})


def test_order_metadata_and_progress_are_the_callers(tmp_path):
    specs = {name: TensorSpec(dtype=torch.float32, shape=(2,)) for name in ("b", "a")}
    seen = []
    write_tensors(
        tmp_path / "file", specs, lambda name: torch.ones(2), metadata={"z": "1", "a": "2"}, progress=seen.append
    )
    header = read_header(tmp_path / "file")
    assert list(header.tensors) == ["b", "a"]
    assert list(header.metadata) == ["z", "a"]
    assert seen == [8, 8]


def test_a_tensor_that_is_not_as_announced_is_refused(tmp_path):
    specs = {"a": TensorSpec(dtype=torch.float32, shape=(2,))}
    with pytest.raises(ValueError, match="announced"):
        write_tensors(tmp_path / "file", specs, lambda name: torch.ones(3))


# ---- damaged files ---------------------------------------------------------------------------------------------------


def with_header(path, header, data=b"\0" * 8):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([], "not a JSON object"),
        (b"{", "damaged safetensors header"),
        (b"\xff\xfe{}", "damaged safetensors header"),
        (b"[" * 100_000, "damaged safetensors header"),
        ({"a": []}, "exactly dtype, shape and data_offsets"),
        ({"a": {**GOOD, "more": 1}}, "exactly dtype, shape and data_offsets"),
        ({"a": {**GOOD, "dtype": "F3"}}, "unknown dtype 'F3'"),
        ({"a": {**GOOD, "dtype": ["F32"]}}, "unknown dtype"),
        ({"a": {**GOOD, "shape": [3]}}, "bytes 0 to 8, expected 0 to 12"),
        ({"a": {**GOOD, "shape": [-2]}}, "has shape"),
        ({"a": {**GOOD, "shape": [2.0]}}, "has shape"),
        ({"a": {**GOOD, "shape": [True, 2]}}, "has shape"),
        ({"a": {**GOOD, "shape": [2**40, 2**40]}}, "has shape"),
        ({"a": {**GOOD, "data_offsets": [8, 0]}}, "expected 0 to 8"),
        ({"a": {**GOOD, "data_offsets": [4, 12]}}, "expected 0 to 8"),
        ({"a": {**GOOD, "data_offsets": [0, 8, 16]}}, "data_offsets"),
        ({"a": GOOD, "b": GOOD}, "expected 8 to 16"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], "shape": [2]}}', "'shape' appears twice"),
        (b'{"__metadata__": {"x": 1}}', "must map text to text"),
        (b'{"__metadata__": ["x"]}', "must map text to text"),
    ],
)
def test_a_bad_header_is_named_with_its_file(tmp_path, header, message):
    path = with_header(tmp_path / "model.safetensors", header)
    with pytest.raises(ValueError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sizes_present_and_expected_are_told(tmp_path):
    path = tmp_path / "model.safetensors"
    write_tensor_dict(path, {"a": torch.ones(4)})
    whole = path.read_bytes()
    for cut, message in (
        (len(whole) - 3, f"cut short: {len(whole) - 3} bytes, its header says {len(whole)}"),
        (20, "cut short: 20 bytes of at least"),
        (3, "3 bytes, too short"),
        (0, "0 bytes; download it again"),
    ):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=message):
            read_header(path)
    path.write_bytes(whole + b"xx")
    with pytest.raises(ValueError, match=f"too long: {len(whole) + 2} bytes, its header says {len(whole)}"):
        read_header(path)


def test_a_huge_header_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(ValueError, match="not a safetensors file"):
        read_header(path)


def test_a_git_lfs_pointer_is_recognised(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:" + "ab" * 32 + "\nsize 4976698672\n")
    with pytest.raises(ValueError, match=r"git-lfs pointer \(oid sha256:abab.*5.0 GB.*git lfs pull"):
        read_header(path)


def mutations(whole: bytes, count: int, seed: int):
    """The header with bytes changed, removed, doubled, or whole words exchanged; the data stays."""
    draw = random.Random(seed)
    (length,) = struct.unpack("<Q", whole[:8])
    for _ in range(count):
        header = bytearray(whole[8 : 8 + length])
        for _ in range(draw.choice((1, 1, 1, 2, 5))):
            at = draw.randrange(len(header))
            kind = draw.randrange(4)
            if kind == 0:
                header[at] = draw.randrange(256)
            elif kind == 1:
                del header[at : at + draw.randrange(1, 9)]
            elif kind == 2:
                header[at:at] = header[at : at + draw.randrange(1, 9)]
            else:
                header[at] ^= 1 << draw.randrange(8)
        yield (
            struct.pack("<Q", len(header) if draw.random() < 0.9 else draw.randrange(2**16))
            + bytes(header)
            + whole[8 + length :]
        )


def test_mutated_headers_never_load_as_something_else(tmp_path):
    """Each is refused by us in one line, or is read exactly as the library reads it; the keys are then checked."""
    tensors = {"model.a.weight": torch.ones(3, 2), "model.b.weight": torch.ones(5).bfloat16(), "c": torch.tensor(3)}
    write_tensor_dict(tmp_path / "good", tensors)
    path, messages = tmp_path / "bad", []
    for mutant in mutations((tmp_path / "good").read_bytes(), 3000, seed=0):
        path.write_bytes(mutant)
        try:
            header = read_header(path)
        except ValueError as error:
            messages.append(str(error))
            continue
        with safe_open(path, "pt") as file:
            assert header.tensors == {name: spec_of(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    assert all(str(path) in message and "\n" not in message for message in messages)
    assert len(messages) > 2700  # what is read is renamed keys, spaces, and little else


def test_what_the_library_refuses_we_refuse(tmp_path):
    write_tensor_dict(tmp_path / "good", {"model.a.weight": torch.ones(3, 2), "c": torch.tensor(3)})
    path = tmp_path / "bad"
    for mutant in mutations((tmp_path / "good").read_bytes(), 1000, seed=1):
        path.write_bytes(mutant)
        try:
            with safe_open(path, "pt"):
                continue
        except SafetensorError:
            pass
        with pytest.raises(ValueError, match="bad"):
            read_header(path)


def test_a_key_that_stands_twice_among_many_is_found_at_once(tmp_path):
    header = ("{" + ",".join(f'"{i}":0' for i in range(200_000)) + ',"199999":0}').encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ValueError, match="'199999' appears twice"):  # a search for each key would take hours
        read_header(path)


def test_a_tensor_cannot_take_the_place_of_the_metadata(tmp_path):
    with pytest.raises(ValueError, match="cannot be called __metadata__"):
        write_tensor_dict(tmp_path / "x.safetensors", {"__metadata__": torch.ones(1)})
