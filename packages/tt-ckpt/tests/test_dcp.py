import os
import pickle
import random
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

import tt_ckpt
from tt_ckpt.formats.dcp import DistributedFolder


def save(path, state):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=path, no_dist=True)
    return path


@pytest.fixture
def folder(tmp_path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": {"c": torch.ones(4).bfloat16(), "n": torch.tensor(3)}}
    return save(tmp_path / "dcp", {**tensors, "lr": 0.1, "names": ["x"], "nothing": None})


def test_tensors_are_read_and_nothing_else(folder):
    found = DistributedFolder(folder)
    assert sorted(found) == ["a", "b.c", "b.n"]
    assert torch.equal(found["a"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(found["b.c"], torch.ones(4).bfloat16())
    assert found["b.n"] == 3
    assert list(found.below("b.")) == ["c", "n"]


def test_members_of_an_enum_are_read_in_either_form_that_python_writes(tmp_path, monkeypatch):
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

    for name, form in (("name", lambda self, _: (getattr, (type(self), self.name))),
                       ("value", lambda self, _: (type(self), (self.value,)))):  # fmt: skip
        monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", form)
        found = DistributedFolder(save(tmp_path / name, {"a": torch.arange(6.0)}))
        assert (b"getattr" in (tmp_path / name / ".metadata").read_bytes()) == (name == "name")
        assert torch.equal(found["a"], torch.arange(6.0))


def save_on_rank(rank, store, path):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    whole = torch.randn(7, 3)
    sharded = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
    columns = distribute_tensor(whole, mesh, [Shard(1)], src_data_rank=None)
    dcp.save({"rows": sharded, "columns": columns, "plain": torch.ones(2)}, checkpoint_id=path)
    dist.destroy_process_group()


def test_shards_of_several_ranks_are_put_together(tmp_path):
    args = (tmp_path / "store", tmp_path / "dcp")
    mp.start_processes(save_on_rank, args=args, nprocs=2, start_method="fork")
    found = DistributedFolder(tmp_path / "dcp")
    torch.manual_seed(0)
    whole = torch.randn(7, 3)
    assert torch.equal(found["rows"], whole)
    assert torch.equal(found["columns"], whole)
    assert torch.equal(found["plain"], torch.ones(2))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["hf", "torchtune"])
def test_a_model_in_such_a_folder_converts(model_dir, tmp_path, kind, nested):
    source = model_dir()
    if kind == "torchtune":
        tt_ckpt.convert(source, tmp_path / "tune", "torchtune")
        state = torch.load(tmp_path / "tune" / "torchtune_model_0.pt")
    else:
        state = load_file(source / "model.safetensors")
    path = save(tmp_path / "dcp", {"model": state, "optimizer": {"lr": torch.ones(1)}} if nested else state)
    with pytest.raises(ValueError, match="--allow-pickle"):
        tt_ckpt.convert(path, tmp_path / "back", "hf", config=source)
    tt_ckpt.convert(path, tmp_path / "back", "hf", config=source, allow_pickle=True)
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


# ---- hostile folders -------------------------------------------------------------------------------------------------


class Canary:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def metadata_of(folder):
    return pickle.loads((folder / ".metadata").read_bytes())


@pytest.mark.parametrize("where", ["top", "planner_data", "key"])
def test_the_code_of_hostile_metadata_never_runs(folder, tmp_path, where):
    metadata, canary = metadata_of(folder), Canary(tmp_path / "sung")
    if where == "planner_data":
        metadata.planner_data = canary
    elif where == "key":
        metadata.state_dict_metadata["x"] = canary
    (folder / ".metadata").write_bytes(pickle.dumps(canary if where == "top" else metadata))
    with pytest.raises(ValueError, match=r".metadata: refused: it asks for posix.system"):
        DistributedFolder(folder)
    assert not (tmp_path / "sung").exists()


def test_a_canary_among_the_values_is_not_read(tmp_path):
    folder = save(tmp_path / "dcp", {"w": torch.ones(2), "x": Canary(tmp_path / "sung")})
    assert torch.equal(DistributedFolder(folder)["w"], torch.ones(2))
    assert not (tmp_path / "sung").exists()


def test_a_canary_in_place_of_a_tensor_does_not_sing(folder, tmp_path):
    import io

    buffer = io.BytesIO()
    torch.save(Canary(tmp_path / "sung"), buffer)
    metadata = metadata_of(folder)
    for info in metadata.storage_data.values():
        info.relative_path, info.offset, info.length = "evil.distcp", 0, len(buffer.getvalue())
    (folder / "evil.distcp").write_bytes(buffer.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    found = DistributedFolder(folder)
    with pytest.raises(ValueError, match="refused: not a tensor"):
        found["a"]
    assert not (tmp_path / "sung").exists()


@pytest.mark.parametrize("change", [
    lambda m: [setattr(info, "relative_path", "../../etc/passwd") for info in m.storage_data.values()],
    lambda m: [setattr(info, "relative_path", "/etc/passwd") for info in m.storage_data.values()],
    lambda m: [setattr(info, "length", 10**9) for info in m.storage_data.values()],
    lambda m: [setattr(info, "offset", -5) for info in m.storage_data.values()],
    lambda m: setattr(m.state_dict_metadata["a"], "size", torch.Size([2**40, 2**40])),
    lambda m: setattr(m.state_dict_metadata["a"], "size", torch.Size([1, 1])),
    lambda m: m.state_dict_metadata["a"].chunks.clear(),
    lambda m: setattr(m, "storage_data", None),
    lambda m: setattr(m, "state_dict_metadata", [1]),
    lambda m: [setattr(info, "transform_descriptors", ["zstd"]) for info in m.storage_data.values()],
])  # fmt: skip
def test_metadata_that_lies_is_refused(folder, change):
    metadata = metadata_of(folder)
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="refused|missing or cut short"):
        DistributedFolder(folder)


def test_a_tensor_of_another_shape_than_announced_is_refused(folder):
    metadata = metadata_of(folder)
    infos = {index.fqn: info for index, info in metadata.storage_data.items()}
    infos["a"].offset, infos["a"].length = infos["b.c"].offset, infos["b.c"].length
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="not what .metadata says"):
        DistributedFolder(folder)["a"]


def test_a_memo_index_does_not_reserve_memory(folder):
    (folder / ".metadata").write_bytes(b"\x80\x04N" + b"r\xff\xff\xff\x7f" + b".")  # LONG_BINPUT 2**31 - 1
    with pytest.raises(ValueError, match="refused"):
        DistributedFolder(folder)


def test_fuzzed_metadata_ends_in_our_error_or_in_the_same_tensors(folder):
    whole, draw, refused = (folder / ".metadata").read_bytes(), random.Random(0), 0
    for _ in range(1500):
        data = bytearray(whole)
        for _ in range(draw.choice((1, 1, 2, 4))):
            at = draw.randrange(len(data))
            kind = draw.randrange(3)
            if kind == 0:
                data[at] = draw.randrange(256)
            elif kind == 1:
                del data[at : at + draw.randrange(1, 6)]
            else:
                data[at:at] = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 4)))
        (folder / ".metadata").write_bytes(data)
        try:
            found = DistributedFolder(folder)
            for name in found:
                found[name]
        except ValueError:
            refused += 1
    assert refused > 300
