"""Tensors of the size that real models have: above 2^24 values, where float32 stops counting, and above 2^31.

The large ones are sparse files and zero pages that nobody wrote to: they take no disk and next to no memory.
"""

import hashlib
import json
import math
import os

import numpy as np
import pytest
import torch
from torch import nn

import tt_ckpt
from tt_ckpt.formats.pickles import _data_offsets, read_pickled
from tt_ckpt.hf.save import encode_index, split
from tt_ckpt.hf.stored_tensors import open_tensors
from tt_ckpt.hf.weights import is_finite, num_not_finite, same_bytes
from tt_ckpt.mapped_file import MappedFile
from tt_ckpt.ranks import box, is_cover
from tt_ckpt.safetensors_file import TensorSpec, announced, encode_header, read_header, read_tensor, spec_of
from tt_ckpt.train import tensor_groups

ABOVE_24, ABOVE_31 = 2**24 + 3, 2**31 + 5


def zeros(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros without memory behind them until they are written to."""
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[dtype.itemsize]
    return torch.from_numpy(np.zeros(count, unsigned)).view(dtype)


def sparse(path, specs: dict[str, TensorSpec], written: dict[str, tuple[int, bytes]]):
    """A safetensors file of zeros but for ``written``: tensor -> (byte in it, what is there)."""
    with path.open("wb") as file:
        header = encode_header(specs, {"format": "pt"})
        file.write(header)
        start = len(header)
        for name, spec in specs.items():
            if name in written:
                offset, data = written[name]
                file.seek(start + offset)
                file.write(data)
            start += spec.nbytes
        file.truncate(start)
    return path


@pytest.fixture
def large(tmp_path):
    """A sparse file with a tensor above 2^31 values, and one behind it; the last value of each is 1.0."""
    one = np.float32(1.0).tobytes()
    half_one = torch.ones(1, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    specs = {
        "large": TensorSpec(dtype=torch.bfloat16, shape=(ABOVE_31,)),
        "next": TensorSpec(dtype=torch.float32, shape=(3,)),
    }
    written = {"large": (2 * (ABOVE_31 - 1), half_one), "next": (8, one)}
    return sparse(tmp_path / "model.safetensors", specs, written)


def test_headers_offsets_and_slices_reach_beyond_two_gigabytes(large):
    header = read_header(large)
    assert header.tensors["large"].numel == ABOVE_31
    assert header.offsets["next"] - header.offsets["large"] == 2 * ABOVE_31
    file = MappedFile(large)
    assert file.tensor("large").shape == (ABOVE_31,)
    assert file.tensor("large")[-2:].tolist() == [0.0, 1.0]
    assert file.tensor("next").tolist() == [0.0, 0.0, 1.0]
    behind = torch.empty(3)
    read_tensor(header, "next", behind)
    assert behind.tolist() == [0.0, 0.0, 1.0]
    tensors = open_tensors(large.parent)
    assert tensors["next"].tolist() == tensors.borrow("next").tolist() == [0.0, 0.0, 1.0]


def test_a_tensor_above_two_to_the_31_is_mapped_whole(large):
    tensors = open_tensors(large.parent)
    assert tensors.mapped("large")[-2:].tolist() == [0.0, 1.0]
    assert tt_ckpt.tensor_dtypes(large.parent) == {"large": torch.bfloat16, "next": torch.float32}


def test_shards_are_planned_and_counted_in_whole_numbers():
    specs = {f"t{i}": TensorSpec(dtype=torch.bfloat16, shape=(2**20 + 1, 2**12 + 1)) for i in range(9)}
    each = (2**20 + 1) * (2**12 + 1)
    files = split(specs, 20 * 10**9)
    assert [len(keys) for keys in files.values()] == [2, 2, 2, 2, 1]
    index = json.loads(encode_index(files, specs))
    assert index["metadata"] == {"total_parameters": 9 * each, "total_size": 18 * each}
    assert json.loads(encode_header(specs, None)[8:])["t8"]["data_offsets"] == [16 * each, 18 * each]


def test_nothing_of_a_large_tensor_is_left_out_when_it_is_checked_or_written():
    tensor = zeros(ABOVE_31, torch.float8_e4m3fn)
    assert sum(len(piece) for piece in announced("large", "one", spec_of(tensor), tensor)) == ABOVE_31
    for dtype in (torch.bfloat16, torch.float16):
        values = zeros(ABOVE_24, dtype)
        assert is_finite(values)
        values[-1] = torch.nan
        assert not is_finite(values)
        assert num_not_finite(values) == 1
    assert is_finite(torch.full((ABOVE_24,), 60_000.0, dtype=torch.float16))  # their sum is not


def test_the_last_value_above_two_to_the_31_is_checked_and_compared():
    tensor, other = zeros(ABOVE_31, torch.bfloat16), zeros(ABOVE_31, torch.bfloat16)
    assert same_bytes(tensor, other)
    other[-1] = torch.nan
    assert not same_bytes(tensor, other)
    assert num_not_finite(other) == 1
    assert not is_finite(other)


class Wide(nn.Module):
    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.empty(rows, columns, dtype=dtype))


def numbered(rows: int, columns: int, dtype: torch.dtype) -> Wide:
    """Every row has its own values: a row that is left out or put elsewhere is seen."""
    model = Wide(rows, columns, dtype)
    with torch.no_grad():
        model.wide.copy_(torch.arange(rows).remainder(251)[:, None].expand(rows, columns))
    return model


def test_a_tensor_above_two_to_the_24_is_saved_loaded_and_converted_whole(tmp_path):
    model = numbered(4099, 4096, torch.bfloat16)
    assert model.wide.numel() > ABOVE_24
    tt_ckpt.save_hf(model, tmp_path / "a", config={"model_type": "wide"})
    for dtype in (torch.bfloat16, torch.float32):
        again = Wide(4099, 4096, dtype)
        tt_ckpt.load_weights(again, tmp_path / "a")
        assert torch.equal(again.wide.bfloat16(), model.wide)
    tt_ckpt.verify_files(tmp_path / "a")


def test_a_training_state_above_two_to_the_24_comes_back_whole(tmp_path):
    model = numbered(4099, 4096, torch.bfloat16)
    checkpoints = tt_ckpt.TrainCheckpoint(tmp_path)
    checkpoints.save(1, tensors={"model": {"wide": model.wide.detach()}}, state={"tokens": 2**53 - 1})
    found = checkpoints.restore()
    assert torch.equal(found.tensors["model"]["wide"], model.wide)
    assert found.state == {"tokens": 2**53 - 1}


def test_parts_of_a_tensor_above_two_to_the_31_are_put_where_they_belong():
    rows = 2**20
    whole = tensor_groups.Whole(
        torch.bfloat16,
        (rows, 4096),
        tuple(tensor_groups.Part("f", f"k{i}", (i * rows // 4, 0), (rows // 4, 4096)) for i in range(4)),
    )
    boxes = [(part.offsets, part.sizes) for part in whole.parts]
    assert is_cover(whole.shape, boxes)
    assert math.prod(whole.shape) > ABOVE_31
    target = torch.empty(whole.shape, dtype=whole.dtype, device="meta")
    last = box(target, whole.parts[3].offsets, whole.parts[3].sizes)
    assert (last.shape, last.storage_offset()) == ((rows // 4, 4096), 3 * rows // 4 * 4096)
    assert not is_cover(whole.shape, boxes[:3])
    assert not is_cover(whole.shape, [*boxes[:3], boxes[2]])


def test_a_pickled_tensor_above_two_to_the_31_is_found_behind_it_and_read_by_slices(tmp_path):
    path = tmp_path / "consolidated.00.pth"
    hollow = {"large": zeros(ABOVE_31, torch.bfloat16), "next": torch.empty(3)}
    with torch.serialization.skip_data():
        torch.save(hollow, path)
    at, behind = _data_offsets(path, 2)
    assert behind - at > 2 * ABOVE_31
    with path.open("r+b") as file:
        file.seek(at + 2 * (ABOVE_31 - 1))
        file.write(torch.ones(1, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes())
        file.seek(behind)
        file.write(torch.tensor([1.0, 2.0, 3.0]).numpy().tobytes())
    found = read_pickled(path, allow_pickle=True)
    assert found["large"][-2:].tolist() == [0.0, 1.0]
    assert found["next"].tolist() == [1.0, 2.0, 3.0]


def test_a_quantized_tensor_above_two_to_the_31_is_read_by_rows(tmp_path):
    gguf = pytest.importorskip("gguf")
    from tt_ckpt.formats.gguf.file import GGUFTensor, read_rows

    width, rows = 4096, 2**31 // 4096 + 2
    row = gguf.quantize(np.arange(width, dtype=np.float32)[None], gguf.GGMLQuantizationType.Q8_0)
    tensor = GGUFTensor(file=tmp_path / "rows", start=64, kind="Q8_0", shape=(rows, width), row_bytes=row.shape[1])
    with tensor.file.open("wb") as file:
        file.truncate(64 + rows * row.shape[1])
        file.seek(64 + (rows - 1) * row.shape[1])
        file.write(row.tobytes())
    found = read_rows(tensor, rows - 2, 2, torch.float32)
    assert not found[0].any()
    assert torch.equal(found[1], torch.from_numpy(gguf.dequantize(row, gguf.GGMLQuantizationType.Q8_0))[0])


def test_every_byte_of_a_large_file_is_hashed(tmp_path):
    path = tmp_path / "large"
    digests = []
    for last in (b"\0", b"\1"):
        with path.open("wb") as file:
            file.truncate(ABOVE_24)
            file.seek(ABOVE_24 - 1)
            file.write(last)
        digests.append(tt_ckpt.commit.sha256_of(path))
        assert digests[-1] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert digests[0] != digests[1]


def test_a_sparse_file_takes_no_disk(large):
    assert os.stat(large).st_blocks * 512 < 2**22 < large.stat().st_size
