"""Saves that are killed, run out of space, or find their files damaged. ``pytest --crashes 200`` keeps the promise."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import tt_ckpt
from tt_ckpt import CheckpointNotSaved, TrainCheckpoint

SIZE = 20_000


def contents(step):
    generator = torch.Generator().manual_seed(step)
    return {"model": {"w": torch.randn(SIZE, generator=generator)}, "rng": {"cpu": generator.get_state()}}


def check_whole(directory, at_least):
    """The newest checkpoint is one that was acknowledged, or a later one, and holds what its step should hold."""
    found = TrainCheckpoint(directory).restore() if at_least or TrainCheckpoint(directory).latest() else None
    if found is None:
        return 0
    assert found.step >= at_least, "an acknowledged checkpoint is lost"
    assert found.state == {"step": found.step}
    for group, named in contents(found.step).items():
        for name, tensor in named.items():
            assert torch.equal(found.tensors[group][name], tensor), "a mixed state"
    return found.step


def forked(function, *args):
    """Run in a forked process; returns its wait status."""
    child = os.fork()
    if child == 0:
        try:
            function(*args)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def save_for_ever(directory, pipe, first, background):
    checkpoints = TrainCheckpoint(directory)
    for step in range(first, 10**6):
        if background:
            checkpoints.save_async(step, tensors=contents(step), state={"step": step})
            checkpoints.wait()
        else:
            checkpoints.save(step, tensors=contents(step), state={"step": step})
        os.write(pipe, step.to_bytes(4, "big"))


def test_no_acknowledged_checkpoint_is_lost_to_sigkill(tmp_path, request):
    """Kill at random moments, again and again in the same folder, and resume each time."""
    draw, step = random.Random(0), 0
    for crash in range(request.config.getoption("--crashes", 6)):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                save_for_ever(tmp_path, write, step + 1, crash % 3 == 2)
            finally:  # an error must not carry the tests on in this process
                os._exit(1)
        os.close(write)
        time.sleep(draw.uniform(0.0, 0.12))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        acknowledged = b""
        while piece := os.read(read, 4096):
            acknowledged += piece
        os.close(read)
        last = int.from_bytes(acknowledged[-4:], "big") if acknowledged else 0
        step = max(step, check_whole(tmp_path, max(step, last)))
    TrainCheckpoint(tmp_path).save(step + 1, tensors=contents(step + 1), state={"step": step + 1})
    assert all(name.startswith("step-") for name in os.listdir(tmp_path)), "leftovers are removed by the next save"


POINTS = ("open", "fsync", "rename", "mkdir", "unlink", "rmdir")


def die_at(at, action):
    """SIGKILL at the ``at``-th call that changes the disk."""
    calls = 0

    def counted(original):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for name in POINTS:
        setattr(os, name, counted(getattr(os, name)))
    action()


def deaths(action):
    """``action`` in a forked process that dies earlier or later, until one lives; yields after each."""
    at = 1
    while os.WIFSIGNALED(forked(die_at, at, action)):
        yield at
        at += 1


def save(directory, step):
    TrainCheckpoint(directory).save(step, tensors=contents(step), state={"step": step})


def test_every_step_of_a_save_may_be_the_last(tmp_path):
    """Death before each call that changes the disk: the checkpoints before are whole, and the next save works."""
    for step in (1, 2, 3):
        save(tmp_path, step)
    for at in deaths(lambda: save(tmp_path, 5)):  # noqa: B007
        assert check_whole(tmp_path, 3) in (3, 5)
        if (tmp_path / "step-000005").exists():
            shutil.rmtree(tmp_path / "step-000005")
            save(tmp_path, 2)
            save(tmp_path, 3)
    assert at > 15
    save(tmp_path, 6)
    assert sorted(os.listdir(tmp_path)) == ["step-000005", "step-000006"]


def test_replacing_a_step_may_be_interrupted_anywhere(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    for at in deaths(lambda: save(tmp_path, 2)):  # noqa: B007
        assert check_whole(tmp_path, 2) == 2
    assert at > 15


# ---- several ranks ---------------------------------------------------------------------------------------------------


def rank_saves_for_ever(rank, store, directory):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    checkpoints = TrainCheckpoint(directory)
    start = checkpoints.latest()
    first = int(start.name.removeprefix("step-")) + 1 if start else 1
    for step in range(first, 10**6):
        checkpoints.save(step, tensors=contents(step) | {"own": {f"{rank}": torch.ones(9)}}, state={"step": step})
        if rank == 0:
            (directory.parent / "acknowledged").write_text(str(step))


@pytest.mark.parametrize("victim", [0, 1])
def test_killing_a_rank_loses_nothing(tmp_path, victim, request):
    run, draw = tmp_path / "run", random.Random(victim)
    for crash in range(max(1, request.config.getoption("--crashes", 6) // 6)):
        args = (tmp_path / f"store{crash}", run)
        context = mp.start_processes(rank_saves_for_ever, args=args, nprocs=2, start_method="fork", join=False)
        while not (tmp_path / "acknowledged").exists():
            time.sleep(0.01)
        time.sleep(draw.uniform(0.0, 0.3))
        os.kill(context.pids()[victim], signal.SIGKILL)
        with pytest.raises((mp.ProcessExitedException, mp.ProcessRaisedException)):
            context.join(timeout=60)
        step = check_whole(run, int((tmp_path / "acknowledged").read_text() or 0))
        assert list(TrainCheckpoint(run).restore().tensors["own"]) == ["0", "1"]
        assert step > 0


# ---- a full disk -----------------------------------------------------------------------------------------------------


def save_with_limit(directory, limit, told):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        TrainCheckpoint(directory).save(2, tensors=contents(2), state={"step": 2})
    except CheckpointNotSaved as error:
        os.write(told, str(error).encode())


@pytest.mark.parametrize("limit", [0, 100, 4096, 50_000, 79_000])
def test_a_file_that_cannot_grow_is_our_error_and_leaves_nothing(tmp_path, limit):
    TrainCheckpoint(tmp_path).save(1, tensors=contents(1), state={"step": 1})
    read, write = os.pipe()
    forked(save_with_limit, tmp_path, limit, write)
    os.close(write)
    assert b"step-000002: not saved: [Errno 27]" in os.read(read, 4096)
    os.close(read)
    assert os.listdir(tmp_path) == ["step-000001"]
    assert check_whole(tmp_path, 1) == 1


FULL_DISK = """
import os, pathlib, sys, torch
from tt_ckpt import CheckpointNotSaved, TrainCheckpoint, save_hf
root = pathlib.Path(sys.argv[1])
filler, run = root / "filler", root / "run"
tensors = {"model": {"w": torch.arange(20_000.0)}}
TrainCheckpoint(run).save(1, tensors=tensors, state={})
model = torch.nn.Linear(100, 200)
free = os.statvfs(root).f_bavail * os.statvfs(root).f_frsize
for left in (0, 4096, 20_000, 60_000, 80_000, 90_000):
    filler.write_bytes(b"x" * (free - left))
    for action, kind in (
        (lambda: TrainCheckpoint(run).save(2, tensors=tensors, state={}), CheckpointNotSaved),
        (lambda: save_hf(model, root / "hf", config={}), OSError),
    ):
        try:
            action()
        except kind as error:
            assert "No space left" in str(error) or "free, the model needs" in str(error), error
        else:
            assert left >= 80_000, left
    assert TrainCheckpoint(run).latest() is not None
    assert sorted(os.listdir(root)) in (["filler", "run"], ["filler", "hf", "run"]), os.listdir(root)
    assert not [name for name in os.listdir(run) if name.startswith(".")]
    filler.unlink()
    for name in ("run/step-000002", "hf"):
        import shutil
        shutil.rmtree(root / name, ignore_errors=True)
print("held")
"""


def test_a_full_disk_keeps_the_old_files_and_leaves_no_new_ones(tmp_path):
    """On a small tmpfs of our own, in a namespace where that may be mounted."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "script.py").write_text(FULL_DISK)
    mount = [
        "unshare",
        "-rm",
        "sh",
        "-c",
        'mount -t tmpfs -o size=400k tmpfs "$0" && exec "$@"',
        str(tmp_path / "disk"),
    ]
    if not shutil.which("unshare") or subprocess.run([*mount, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    command = [*mount, sys.executable, str(tmp_path / "script.py"), str(tmp_path / "disk")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "held", done.stderr


# ---- damage ----------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_or_a_cut_anywhere_is_found(tmp_path, request):
    draw = random.Random(0)
    checkpoints = TrainCheckpoint(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, tensors=contents(step), state={"step": step})
    newest = tmp_path / "step-000002"
    for _ in range(5 * request.config.getoption("--crashes", 6)):
        path = draw.choice(sorted(newest.iterdir()))
        whole = path.read_bytes()
        data = bytearray(whole)
        if draw.random() < 0.5:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        else:
            del data[draw.randrange(len(data)) :]
        path.unlink()
        path.write_bytes(data)
        assert checkpoints.latest().name == "step-000001", path.name
        path.unlink()
        path.write_bytes(whole)
        assert checkpoints.latest() == newest


def test_a_conversion_that_is_killed_leaves_no_destination(model_dir, tmp_path):
    """Or the whole one: death before each call that changes the disk."""
    source = model_dir()

    for at in deaths(lambda: tt_ckpt.convert(source, tmp_path / "out", "hf")):  # noqa: B007
        if (tmp_path / "out").exists():
            assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(source))
            assert (tmp_path / "out" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
            shutil.rmtree(tmp_path / "out")
    assert at > 10
