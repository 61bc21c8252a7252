"""Several ranks, forked, over gloo. Each function below runs on every rank."""

import json
import logging
import os
import time
from pathlib import Path

import pytest
import torch
import torch._dynamo  # seconds in every forked rank, once here
import torch.distributed as dist
import torch.distributed.fsdp
import torch.multiprocessing as mp
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

from tt_ckpt import CheckpointNotSaved, TrainCheckpoint


def on_rank(rank, size, store, function, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    function(rank, *args)
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture
def ranks(tmp_path):
    """ranks(size, function, *args): run function(rank, *args) on so many forked processes"""
    count = iter(range(100))

    def run(size, function, *args):
        store = tmp_path / f"store{next(count)}"
        mp.start_processes(on_rank, args=(size, store, function, args), nprocs=size, start_method="fork")

    return run


def whole(step=1):
    torch.manual_seed(step)
    return {"model": {"w": torch.randn(7, 4), "v": torch.randn(5), "steps": torch.tensor(step)},
            "optimizer": {"w.exp_avg": torch.randn(7, 4), "bf16": torch.randn(6, 2).bfloat16()}}  # fmt: skip


def spread(groups):
    """The same, sharded over the ranks there are; scalars plain, one tensor replicated."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def place(name, tensor):
        if tensor.dim() == 0:
            return tensor
        return distribute_tensor(tensor, mesh, [Replicate() if name == "v" else Shard(0)], src_data_rank=None)

    return {group: {name: place(name, tensor) for name, tensor in named.items()} for group, named in groups.items()}


def save(rank, directory, step=1):
    tensors = spread(whole(step)) | {"rng": {f"rank{rank}.cpu": torch.full((3,), rank, dtype=torch.uint8)}}
    TrainCheckpoint(directory).save(step, tensors=tensors, state={"step": step, "of": "rank 0"})


def load(rank, directory, step=1, replicas=None):
    checkpoints = TrainCheckpoint(directory)
    targets = spread(
        {group: {name: torch.zeros_like(t) for name, t in named.items()} for group, named in whole().items()}
    )
    found = checkpoints.restore(into=targets)
    assert found.step == step
    assert found.state == {"step": step, "of": "rank 0"}
    for group, named in whole(step).items():
        for name, tensor in named.items():
            target = targets[group][name]
            full = target.full_tensor() if hasattr(target, "full_tensor") else target
            assert torch.equal(full, tensor), name
    if replicas:
        assert sorted(found.tensors["rng"]) == [f"rank{r}.cpu" for r in range(replicas)]
        assert bool((found.tensors["rng"][f"rank{rank % replicas}.cpu"] == rank % replicas).all())


@pytest.mark.parametrize(("saved_by", "loaded_by"), [(2, 2), (2, 1), (1, 2), (2, 3), (3, 2)])
def test_any_number_of_ranks_reads_what_any_number_wrote(ranks, tmp_path, saved_by, loaded_by):
    ranks(saved_by, save, tmp_path / "run")
    ranks(loaded_by, load, tmp_path / "run", 1, saved_by)


def test_one_process_without_ranks_reads_it_whole(ranks, tmp_path):
    ranks(2, save, tmp_path / "run")
    found = TrainCheckpoint(tmp_path / "run").restore()
    for group, named in whole().items():
        assert sorted(found.tensors[group]) == sorted(named)
        assert all(torch.equal(found.tensors[group][name], tensor) for name, tensor in named.items())
    assert found.manifest["world_size"] == 2


def test_ranks_read_what_one_process_without_ranks_wrote(ranks, tmp_path):
    TrainCheckpoint(tmp_path / "run").save(1, tensors=whole(), state={"step": 1, "of": "rank 0"})
    ranks(2, load, tmp_path / "run")


def test_there_is_no_pickle_and_each_rank_writes_its_part(ranks, tmp_path):
    ranks(2, save, tmp_path / "run")
    path = tmp_path / "run" / "step-000001"
    names = sorted(file.name for file in path.iterdir())
    assert names == ["MANIFEST.json", "model.00000.safetensors", "model.00001.safetensors", "model.layout.json",
                     "optimizer.00000.safetensors", "optimizer.00001.safetensors", "optimizer.layout.json",
                     "rng.00000.safetensors", "rng.00001.safetensors", "rng.layout.json", "state.json"]  # fmt: skip
    stored = sum(file.stat().st_size for file in path.glob("model.*.safetensors"))
    assert stored < 2 * sum(t.nbytes for t in whole()["model"].values()) + 1000  # replicated tensors are written once
    assert all(file.read_bytes()[:1] != b"\x80" for file in path.iterdir())


def fall_back(rank, directory):
    for step in (1, 2):
        save(rank, directory, step)
    if rank == 0:
        path = directory / "step-000002" / "model.00001.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.unlink()
        path.write_bytes(data)
    dist.barrier()
    assert TrainCheckpoint(directory).latest().name == "step-000001"
    load(rank, directory, 1)
    with pytest.raises(ValueError, match=r"model.00001.safetensors: contents changed"):
        TrainCheckpoint(directory).restore(directory / "step-000002")


def test_all_ranks_fall_back_together(ranks, tmp_path):
    ranks(2, fall_back, tmp_path / "run")


def fail(rank, directory, which):
    save(rank, directory, 1)
    checkpoints = TrainCheckpoint(directory)
    if rank == which:
        import tt_ckpt.train.sharded

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        tt_ckpt.train.sharded.write_tensors = full
    with pytest.raises(CheckpointNotSaved, match=f"rank {which}: .*No space left"):
        checkpoints.save(2, tensors=spread(whole(2)), state={})
    dist.barrier()
    assert os.listdir(directory) == ["step-000001"]
    load(rank, directory, 1)


@pytest.mark.parametrize("which", [0, 1])
def test_a_failure_on_one_rank_is_raised_on_all_and_cleaned_up(ranks, tmp_path, which):
    ranks(2, fail, tmp_path / "run", which)


def in_background(rank, directory):
    checkpoints = TrainCheckpoint(directory)
    tensors = spread(whole(1)) | {"rng": {f"rank{rank}.cpu": torch.zeros(1)}}
    checkpoints.save_async(1, tensors=tensors, state={"step": 1, "of": "rank 0"})
    for named in tensors.values():  # training goes on
        for tensor in named.values():
            (tensor.to_local() if hasattr(tensor, "to_local") else tensor).zero_()
    assert checkpoints.wait() == directory / "step-000001"
    load(rank, directory, 1)


def test_a_background_save_holds_the_values_of_its_moment(ranks, tmp_path):
    ranks(2, in_background, tmp_path / "run")


def mismatch(rank, directory):
    save(rank, directory)
    checkpoints = TrainCheckpoint(directory)
    wrong = [
        ({"model": {"x": torch.zeros(1)}}, "model holds no x"),
        (
            {"model": {"v": torch.zeros(5).bfloat16()}},
            r"v was saved as torch.float32 \[5\], the run has torch.bfloat16",
        ),
        ({"model": {"v": torch.zeros(6)}}, r"\[5\], the run has torch.float32 \[6\]"),
        ({"adapter": {}}, "no group 'adapter', only model, optimizer, rng"),
    ]
    for into, message in wrong:
        with pytest.raises(ValueError, match=message):
            checkpoints.restore(into=into)


def test_nothing_is_cast_or_passed_over_in_silence(ranks, tmp_path):
    ranks(2, mismatch, tmp_path / "run")


def step_with_fsdp(rank, directory, phase):
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    checkpoints = TrainCheckpoint(directory)

    def groups():
        names = {id(p): name for name, p in model.named_parameters()}
        moments = {f"{names[id(p)]}.{key}": value for p, held in optimizer.state.items() for key, value in held.items()}
        return {"model": dict(model.named_parameters()), "optimizer": moments}

    def train(steps):
        for step in steps:
            torch.manual_seed(step)
            optimizer.zero_grad()
            model(torch.randn(4, 5)).square().mean().backward()
            optimizer.step()

    if phase == "first half":
        train(range(3))
        checkpoints.save(3, tensors=groups(), state={})
        train(range(3, 5))
    else:
        train([99])  # other values, and optimizer state to be filled
        with torch.no_grad():
            checkpoints.restore(into=groups())
        train(range(3, 5))
    full = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
    if rank == 0:
        torch.save(full, directory / f"{phase}.pt")


@pytest.mark.parametrize("loaded_by", [2, 1])
def test_an_fsdp_run_goes_on_as_if_never_stopped(ranks, tmp_path, loaded_by):
    ranks(2, step_with_fsdp, tmp_path, "first half")
    ranks(loaded_by, step_with_fsdp, tmp_path, "second half")
    first, second = (torch.load(tmp_path / f"{phase}.pt") for phase in ("first half", "second half"))
    for name, value in first.items():
        assert torch.allclose(value, second[name], rtol=1e-6, atol=1e-7), name
        assert loaded_by == 1 or torch.equal(value, second[name])


def load_weights_sharded(rank, source):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    import tt_ckpt

    reference = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Linear(8, 3))
    tt_ckpt.load_weights(reference, source)
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Linear(8, 3))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    tt_ckpt.load_weights(model, source, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        assert torch.equal(parameter.full_tensor(), dict(reference.named_parameters())[name])
    x = torch.ones(2, 5)
    assert torch.allclose(model(x), reference(x), atol=1e-6)
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def save_weights_sharded(rank, source, out):
    from torch.distributed.fsdp import fully_shard

    import tt_ckpt

    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Linear(8, 3))
    fully_shard(model)
    tt_ckpt.load_weights(model, source)
    tt_ckpt.save_hf(model, out, config={}, source=source)
    with pytest.raises(FileExistsError, match="already"):
        tt_ckpt.save_hf(model, out, config={})
    tt_ckpt.save_hf(model, out, config={}, max_shard_size="100KB", overwrite=True)


def test_a_sharded_model_is_saved_as_one(ranks, tmp_path, equal_dirs):
    from safetensors.torch import save_file

    model, source = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Linear(8, 3)), tmp_path / "source"
    source.mkdir()
    save_file(model.state_dict(), source / "model.safetensors", metadata={"format": "pt"})
    (source / "config.json").write_text("{}\n")
    ranks(2, save_weights_sharded, source, tmp_path / "out")
    assert equal_dirs(source, tmp_path / "out") == []


def test_weights_load_into_a_sharded_model_on_meta(ranks, tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Linear(8, 3))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    ranks(2, load_weights_sharded, tmp_path)


def die(rank, directory):
    save(rank, directory, 1)
    checkpoints = TrainCheckpoint(directory)
    if rank == 1:
        os.kill(os.getpid(), 9)
    time.sleep(0.5)
    with pytest.raises(CheckpointNotSaved, match="not saved"):
        checkpoints.save(2, tensors=spread(whole(2)), state={})
    (directory / "told").touch()


def test_a_dead_peer_makes_a_failed_save_not_a_partial_one(ranks, tmp_path):
    with pytest.raises(mp.ProcessExitedException):
        ranks(2, die, tmp_path / "run")
    assert not (tmp_path / "run" / "step-000002").exists()
    assert TrainCheckpoint(tmp_path / "run").latest().name == "step-000001"


# ---- layouts that lie ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [
    lambda t: t["w"]["chunks"][0].update(file="../x.safetensors"),
    lambda t: t["w"]["chunks"][0].update(file="/etc/passwd"),
    lambda t: t["w"]["chunks"][0].update(offsets=[100, 0]),
    lambda t: t["w"]["chunks"][0].update(sizes=[4]),
    lambda t: t["w"]["chunks"][0].update(sizes=["4", 4]),
    lambda t: t["w"].update(shape=[-7, 4]),
    lambda t: t["w"].update(dtype="F99"),
    lambda t: t["w"].update(chunks=[]),
    lambda t: t["w"].pop("chunks"),
    lambda t: t.update(w=3),
])  # fmt: skip
def test_a_layout_that_lies_is_refused(ranks, tmp_path, change):
    from tt_ckpt.train.tensor_groups import Group

    ranks(2, save, tmp_path / "run")
    path = tmp_path / "run" / "step-000001"
    layout = json.loads((path / "model.layout.json").read_text())
    change(layout["tensors"])
    (path / "model.layout.json").write_text(json.dumps(layout))
    with pytest.raises(ValueError, match="damaged|refused the file name"):
        Group(path, "model")["w"]


def test_a_background_failure_is_noticed_at_the_next_check(tmp_path, monkeypatch, caplog):
    checkpoints = TrainCheckpoint(tmp_path / "run")
    checkpoints.save(1, tensors=whole(), state={})

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr("tt_ckpt.train.checkpoint.write_tensor_dict", full)
        checkpoints.save_async(2, tensors=whole(2), state={})
        while not checkpoints._pending.done():
            time.sleep(0.01)
        with pytest.raises(CheckpointNotSaved, match="No space left"):
            checkpoints.check()
    assert checkpoints.check() is None, "told once"
    assert os.listdir(tmp_path / "run") == ["step-000001"]
    checkpoints.save_async(3, tensors=whole(3), state={})
    found = None
    while found is None:
        found = checkpoints.check()
    assert found.name == "step-000003"


def test_at_most_one_background_save_is_under_way(tmp_path, monkeypatch):
    from tt_ckpt.train import checkpoint

    original, running, most = checkpoint.write_tensor_dict, [], []

    def slow(*args, **kwargs):
        running.append(1)
        most.append(len(running))
        time.sleep(0.05)
        result = original(*args, **kwargs)
        running.pop()
        return result

    monkeypatch.setattr(checkpoint, "write_tensor_dict", slow)
    checkpoints = TrainCheckpoint(tmp_path / "run")
    for step in (1, 2, 3):
        checkpoints.save_async(step, tensors={"a": {"x": torch.ones(2)}}, state={})
    assert checkpoints.wait(timeout=0.0) is None
    assert checkpoints.wait().name == "step-000003"
    assert max(most) == 1


def test_state_and_files_of_a_background_save_are_of_its_moment(tmp_path):
    checkpoints, state, text = TrainCheckpoint(tmp_path / "run"), {"loss": [1.0]}, ["before"]
    checkpoints.save_async(1, tensors={}, state=state, files={"note.txt": lambda path: Path(path).write_text(text[0])})
    state["loss"].append(2.0)
    text[0] = "after"
    path = checkpoints.wait()
    assert json.loads((path / "state.json").read_text()) == {"loss": [1.0]}
    assert (path / "note.txt").read_text() == "before"


def test_a_checkpoint_can_be_kept_besides_the_newest(tmp_path):
    checkpoints = TrainCheckpoint(tmp_path, keep_last=2)
    for step in range(1, 7):
        checkpoints.save(step, tensors={}, state={})
        checkpoints.keep = {3} if step >= 3 else {1}
    assert sorted(os.listdir(tmp_path)) == ["step-000003", "step-000005", "step-000006"]


def test_preflight_tells_before_training(tmp_path):
    checkpoints = TrainCheckpoint(tmp_path / "run", keep_last=3)
    checkpoints.preflight(1000)
    assert os.listdir(tmp_path / "run") == []
    with pytest.raises(OSError, match="4 checkpoints need 4800000.0 TB; free some"):
        checkpoints.preflight(10**18)
    with pytest.raises(OSError, match="1 checkpoint and the result need"):
        checkpoints.preflight(1000, copies=1, besides=10**18)
    for step in range(4):
        checkpoints.save(step, tensors={}, state={})
    with pytest.raises(OSError, match="1 checkpoint need"):  # the newest three are there already
        checkpoints.preflight(10**18)
    checkpoints.preflight(10**18, copies=3)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        TrainCheckpoint(tmp_path / "file" / "run").preflight(1)
