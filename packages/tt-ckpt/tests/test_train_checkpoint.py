import json
import logging
import os
import stat

import pytest
import torch

import tt_ckpt
from tt_ckpt import CheckpointNotSaved, TrainCheckpoint


def contents(step):
    torch.manual_seed(step)
    tensors = {
        "model": {"w": torch.randn(4, 3), "b": torch.randn(3).bfloat16()},
        "optimizer": {"w.exp_avg": torch.randn(4, 3), "w.step": torch.tensor(float(step))},
        "rng": {"cpu": torch.get_rng_state()},
    }
    return tensors, {"step": step, "data": {"position": [step, 2]}, "loss": 0.5}


def save(checkpoints, step, **more):
    tensors, state = contents(step)
    return checkpoints.save(step, tensors=tensors, state=state, **more)


def check(found, step):
    tensors, state = contents(step)
    assert found.step == step
    assert found.state == state
    assert found.tensors.keys() == tensors.keys()
    for group, named in tensors.items():
        assert found.tensors[group].keys() == named.keys()
        for name, tensor in named.items():
            assert torch.equal(found.tensors[group][name], tensor)
            assert found.tensors[group][name].dtype == tensor.dtype


@pytest.fixture
def checkpoints(tmp_path):
    return TrainCheckpoint(tmp_path / "run" / "checkpoints")


def test_what_was_saved_is_restored(checkpoints):
    path = save(checkpoints, 7)
    assert path.name == "step-000007"
    assert checkpoints.latest() == path
    check(checkpoints.restore(), 7)
    check(checkpoints.restore(path), 7)


def test_a_checkpoint_contains_no_pickle(checkpoints):
    path = save(checkpoints, 7)
    names = sorted(file.name for file in path.iterdir())
    assert names == ["MANIFEST.json", "model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"]


def test_adapter_only_runs_save_the_adapter_only(checkpoints):
    path = checkpoints.save(1, tensors={"adapter": {"a": torch.ones(3)}}, state={})
    assert sum(file.stat().st_size for file in path.iterdir()) < 2000
    assert list(checkpoints.restore().tensors) == ["adapter"]


def test_files_and_folders_of_the_caller_are_part_of_it(checkpoints):
    def folder(path):
        path.mkdir()
        (path / "adapter_config.json").write_text("{}")

    path = save(checkpoints, 1, files={"adapter": folder, "note.txt": lambda path: path.write_text("hello")})
    assert (path / "note.txt").read_text() == "hello"
    (path / "adapter" / "adapter_config.json").write_text("[]")
    assert checkpoints.latest() is None


def test_the_manifest_holds_info_versions_sizes_and_hashes(checkpoints):
    import hashlib

    path = save(checkpoints, 3, info={"base_model": "a/b", "world_size": 1, "step": 99})
    manifest = json.loads((path / "MANIFEST.json").read_text())
    assert manifest["base_model"] == "a/b"
    assert manifest["step"] == 3
    assert manifest["versions"]["torch"] == torch.__version__
    for name, entry in manifest["files"].items():
        data = (path / name).read_bytes()
        assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert checkpoints.restore().manifest["base_model"] == "a/b"


def test_the_newest_is_by_number_not_by_name(checkpoints):
    for step in (999_999, 1_000_000):
        save(checkpoints, step)
    assert checkpoints.latest().name == "step-1000000"


@pytest.mark.parametrize("keep_last", [2, 3])
def test_the_last_few_are_kept(tmp_path, keep_last):
    checkpoints = TrainCheckpoint(tmp_path, keep_last=keep_last)
    for step in range(1, 6):
        save(checkpoints, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{s:06d}" for s in range(6 - keep_last, 6)]


@pytest.mark.parametrize("keep_last", [1, 0, -3])
def test_fewer_than_two_are_refused(tmp_path, keep_last):
    with pytest.raises(ValueError, match="at least 2"):
        TrainCheckpoint(tmp_path, keep_last=keep_last)


def test_nothing_yet_is_none_or_an_error_with_a_cure(checkpoints):
    assert checkpoints.latest() is None
    with pytest.raises(FileNotFoundError, match="no usable checkpoint"):
        checkpoints.restore()
    save(checkpoints, 1)
    with pytest.raises(FileNotFoundError, match="holds step-000001"):
        checkpoints.restore(checkpoints.directory / "step-000002")


FILES = ["MANIFEST.json", "model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"]


def damage(path, how):
    data = bytearray(path.read_bytes())
    path.unlink()
    if how == "flip a bit at the front":
        data[9] ^= 1
    elif how == "flip a bit in the middle":
        data[len(data) // 2] ^= 16
    elif how == "flip a bit at the end":
        data[-2] ^= 4
    elif how == "cut":
        del data[len(data) // 2 :]
    elif how == "empty":
        data.clear()
    elif how == "grow":
        data += b"\0"
    if how != "remove":
        path.write_bytes(data)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "how",
    ["flip a bit at the front", "flip a bit in the middle", "flip a bit at the end", "cut", "empty", "grow", "remove"],
)
def test_damage_is_named_and_the_previous_one_is_used(checkpoints, caplog, name, how):
    save(checkpoints, 1)
    path = save(checkpoints, 2)
    damage(path / name, how)
    with caplog.at_level(logging.WARNING):
        check(checkpoints.restore(), 1)
    assert str(path / name) in caplog.text
    with pytest.raises((ValueError, FileNotFoundError), match=name):
        checkpoints.restore(path)


def test_every_bit_of_a_manifest_is_watched(checkpoints):
    path = checkpoints.save(1, tensors={"a": {"x": torch.ones(1)}}, state={}) / "MANIFEST.json"
    whole = path.read_bytes()
    unnoticed = []
    for at in range(len(whole)):
        data = bytearray(whole)
        data[at] ^= 1 << (at % 8)
        path.write_bytes(data)
        if checkpoints.latest(hashes=False) is not None:
            unnoticed.append(at)
    assert all(
        change.strip() in {"->", "\n ->"} or change.isspace() or set(change) <= set(" \n\t\r->") for change in unnoticed
    )


def test_sizes_alone_can_be_compared(checkpoints):
    path = save(checkpoints, 2)
    damage(path / "model.safetensors", "flip a bit at the end")
    assert checkpoints.latest() is None
    assert checkpoints.latest(hashes=False) == path
    damage(path / "model.safetensors", "cut")
    assert checkpoints.latest(hashes=False) is None


def test_a_file_that_is_not_listed_is_damage(checkpoints):
    path = save(checkpoints, 2)
    (path / "extra").write_text("x")
    assert checkpoints.latest() is None


def test_a_link_in_place_of_a_file_is_damage(checkpoints, tmp_path):
    path = save(checkpoints, 2)
    (path / "state.json").rename(tmp_path / "elsewhere")
    (path / "state.json").symlink_to(tmp_path / "elsewhere")
    assert checkpoints.latest() is None


@pytest.mark.parametrize("name", ["../state.json", "/etc/passwd", "a/../../b"])
def test_a_manifest_cannot_point_out_of_its_folder(checkpoints, name):
    from tt_ckpt.commit import _digest, encode_json

    path = save(checkpoints, 2) / "MANIFEST.json"
    body = json.loads(path.read_text())
    body["files"][name] = body["files"].pop("state.json")
    body.pop("sha256")
    path.write_bytes(encode_json({**body, "sha256": _digest(body)}))
    with pytest.raises(ValueError, match="refused the file name"):
        checkpoints.restore(path.parent)
    assert checkpoints.latest() is None


def test_a_future_format_is_refused_by_version(checkpoints):
    from tt_ckpt.commit import _digest, encode_json

    path = save(checkpoints, 2) / "MANIFEST.json"
    body = json.loads(path.read_text()) | {"version": 99}
    body.pop("sha256")
    path.write_bytes(encode_json({**body, "sha256": _digest(body)}))
    with pytest.raises(ValueError, match=r"format version 99, this tt_ckpt reads 1; use tt-ckpt 0\.1"):
        checkpoints.restore()


def test_the_same_step_can_be_saved_again(checkpoints):
    save(checkpoints, 1)
    path = save(checkpoints, 2)
    damage(path / "state.json", "cut")
    save(checkpoints, 2)
    check(checkpoints.restore(), 2)
    assert sorted(os.listdir(checkpoints.directory)) == ["step-000001", "step-000002"]


def test_a_replacement_that_was_interrupted_leaves_the_old_one_usable(checkpoints):
    path = save(checkpoints, 2)
    path.rename(path.parent / ".old-step-000002-0123abcd")
    check(checkpoints.restore(), 2)
    save(checkpoints, 3)
    check(checkpoints.restore(path.parent / ".old-step-000002-0123abcd"), 2)


def test_leftovers_of_killed_saves_are_removed(checkpoints):
    (checkpoints.directory / ".tmp-step-000004-0123abcd").mkdir(parents=True)
    save(checkpoints, 5)
    assert os.listdir(checkpoints.directory) == ["step-000005"]


def test_the_one_just_saved_stays_whatever_its_number(checkpoints):
    for step in (7, 8, 9):
        save(checkpoints, step)
    path = save(checkpoints, 3)
    assert path.is_dir()
    check(checkpoints.restore(path), 3)


def test_damaged_ones_go_when_they_are_older_than_all_that_are_kept(checkpoints):
    path = save(checkpoints, 1)
    damage(path / "state.json", "cut")
    for step in (2, 3):
        save(checkpoints, step)
    assert not path.exists()


def test_damaged_checkpoints_do_not_count_as_kept(checkpoints):
    for step in (1, 2, 3):
        path = save(checkpoints, step)
    damage(path / "model.safetensors", "cut")
    save(checkpoints, 4)
    damage(checkpoints.directory / "step-000004" / "model.safetensors", "cut")
    check(checkpoints.restore(), 2)


@pytest.mark.parametrize("where", ["fsync", "rename", "mkdir", "manifest"])
def test_a_failed_save_cleans_up_and_keeps_what_was(checkpoints, monkeypatch, where):
    save(checkpoints, 1)
    target = {"fsync": "os.fsync", "rename": "pathlib.Path.rename", "mkdir": "pathlib.Path.mkdir",
              "manifest": "tt_ckpt.commit.write_manifest"}[where]  # fmt: skip
    with monkeypatch.context() as patch:

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        patch.setattr(target, full)
        with pytest.raises(CheckpointNotSaved, match="step-000002: not saved: .*No space left") as caught:
            save(checkpoints, 2)
    assert isinstance(caught.value.__cause__, OSError)
    assert os.listdir(checkpoints.directory) == ["step-000001"]
    check(checkpoints.restore(), 1)


def test_state_must_be_json(checkpoints):
    for state in ({"x": torch.ones(1)}, {"x": float("nan")}, {"x": {1, 2}}):
        with pytest.raises(CheckpointNotSaved):
            checkpoints.save(1, tensors={}, state=state)
    assert os.listdir(checkpoints.directory) == []


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".."])
def test_names_must_be_plain(checkpoints, name):
    with pytest.raises(ValueError, match="refused the file name"):
        checkpoints.save(1, tensors={name: {}}, state={})
    with pytest.raises(ValueError, match="refused the file name"):
        checkpoints.save(1, tensors={}, state={}, files={name: lambda path: None})
    with pytest.raises(ValueError, match="negative"):
        checkpoints.save(-1, tensors={}, state={})


def test_modes_follow_the_umask(checkpoints):
    before = os.umask(0o022)
    try:
        path = save(checkpoints, 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o644}


def test_a_checkpoint_can_be_verified_by_itself(checkpoints):
    path = save(checkpoints, 1)
    assert tt_ckpt.verify_files(path).files == [
        "model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"]  # fmt: skip
    damage(path / "rng.safetensors", "flip a bit at the end")
    with pytest.raises(ValueError, match="rng.safetensors"):
        tt_ckpt.verify_files(path)


def test_what_is_passed_is_not_changed(checkpoints):
    tensors, state = contents(1)
    before = {group: dict(named) for group, named in tensors.items()}
    checkpoints.save(1, tensors=tensors, state=state, info={"a": 1})
    assert state == contents(1)[1]
    assert all(tensors[group][name] is tensor for group, named in before.items() for name, tensor in named.items())


def test_restored_tensors_outlive_their_files(checkpoints):
    """Files are unlinked, never cut or written over: what is mapped stays readable."""
    save(checkpoints, 1)
    found = checkpoints.restore()
    first = found.tensors["model"]["w"]
    for step in (1, 2, 3):
        save(checkpoints, step)
    assert not (checkpoints.directory / "step-000001").exists()
    assert torch.equal(first, contents(1)[0]["model"]["w"])


def test_what_could_not_be_verified_is_not_saved(checkpoints, tmp_path):
    (tmp_path / "elsewhere").write_text("x")
    with pytest.raises(CheckpointNotSaved, match="link.*a link, which cannot be part of a checkpoint"):
        checkpoints.save(1, tensors={}, state={}, files={"link": lambda path: path.symlink_to(tmp_path / "elsewhere")})
    with pytest.raises(CheckpointNotSaved, match="the manifest has its own sha256"):
        checkpoints.save(1, tensors={}, state={}, info={"sha256": "mine"})
    assert checkpoints.latest() is None
