"""Whatever stands in the JSON files of a directory or checkpoint: a result, or one of our errors in one line."""

import copy
import json
import random
import string

import pytest
import torch

import tt_ckpt
from tt_ckpt.commit import _digest, encode_json, verify
from tt_ckpt.hf.stored_tensors import open_tensors
from tt_ckpt.safe_names import check_basename, safe_file

ODD = [
    None,
    True,
    -1,
    0,
    1,
    2.5,
    1e308,
    10**30,
    "",
    "x",
    "../x",
    "/etc/passwd",
    "a\0b",
    [],
    [1],
    ["x"],
    {},
    {"x": 1},
    [[]],
]


def mutated(value, draw):
    """The same JSON with one or two places replaced, removed, doubled or renamed."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 2))):
        places = list(walk(value))
        if not places:
            return draw.choice(ODD)
        holder, key = draw.choice(places)
        kind = draw.randrange(4)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[draw.choice(["x", "../x", "", "weight_map"])] = holder.pop(key)
        else:
            holder[key] = draw.choice(ODD)
    return value


def walk(value):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from walk(inner)


def assert_ours(error):
    assert isinstance(error, ValueError | OSError), repr(error)
    assert "\n" not in str(error)
    assert str(error)


def attempt(action):
    """Run; returns whether it succeeded. Anything but our errors fails the test."""
    try:
        action()
    except (ValueError, OSError) as error:
        assert_ours(error)
        return False
    return True


def test_indexes(tiny, config, tmp_path):
    tt_ckpt.save_hf(tiny(), tmp_path / "m", config=config(), max_shard_size="40KB")
    path, draw = tmp_path / "m" / "model.safetensors.index.json", random.Random(0)
    whole = json.loads(path.read_text())
    results = []
    for _ in range(300):
        path.write_text(json.dumps(mutated(whole, draw)))
        results.append(attempt(lambda: open_tensors(tmp_path / "m")))
    assert 0 < sum(results) < 200  # a changed total_size does no harm


@pytest.mark.parametrize("to", ["hf", "meta", "torchtune"])
def test_configs(model_dir, tmp_path, to):
    source, draw = model_dir(rope_scaling={"rope_type": "llama3", "factor": 8.0}), random.Random(1)
    whole = json.loads((source / "config.json").read_text())
    for number in range(60):
        (source / "config.json").write_text(json.dumps(mutated(whole, draw)))
        attempt(lambda number=number: tt_ckpt.convert(source, tmp_path / f"out{number}", to))
        attempt(lambda: tt_ckpt.convert(source, tmp_path / "dry", to, dry_run=True))


def test_params(model_dir, tmp_path):
    tt_ckpt.convert(model_dir(model_type="mistral", sliding_window=4), tmp_path / "meta", "meta")
    (tmp_path / "meta" / "config.json").unlink()
    path, draw = tmp_path / "meta" / "params.json", random.Random(2)
    whole = json.loads(path.read_text()) | {"use_scaled_rope": True, "rope_scaling_factor": 8, "max_seq_len": 10}
    for _ in range(60):
        path.write_text(json.dumps(mutated(whole, draw)))
        attempt(lambda: tt_ckpt.convert(tmp_path / "meta", tmp_path / "out", "hf", allow_pickle=True, overwrite=True))


def test_manifests(tmp_path):
    checkpoints = tt_ckpt.TrainCheckpoint(tmp_path)
    folder = checkpoints.save(1, tensors={"a": {"x": torch.ones(2)}}, state={"y": [1, 2]})
    path, draw = folder / "MANIFEST.json", random.Random(4)
    whole = json.loads(path.read_text())
    for _ in range(300):
        value = mutated(whole, draw)
        if isinstance(value, dict):  # signed anew: by somebody who means it
            value.pop("sha256", None)
            value["sha256"] = _digest(value)
        path.write_bytes(encode_json(value))
        attempt(lambda: verify(folder))
        attempt(checkpoints.latest)
        attempt(lambda: checkpoints.restore(folder))


def test_states(tmp_path):
    checkpoints = tt_ckpt.TrainCheckpoint(tmp_path)
    folder = checkpoints.save(1, tensors={}, state={"y": [1, 2]})
    path, draw = folder / "state.json", random.Random(5)
    whole = path.read_bytes()
    for _ in range(100):
        data = bytearray(whole)
        data[draw.randrange(len(data))] = draw.randrange(256)
        if bytes(data) == whole:
            continue
        path.write_bytes(data)
        assert not attempt(lambda: checkpoints.restore(folder))


def test_five_hundred_names_stay_inside(tmp_path):
    draw = random.Random(6)
    letters = string.ascii_letters + "./\\:-_ \0\n\t~$%*?\u202e\u00e9"
    accepted = 0
    for _ in range(500):
        name = "".join(draw.choice(letters) for _ in range(draw.choice((1, 2, 3, 8, 20, 300))))
        if draw.random() < 0.3:
            name = draw.choice(["../", "..\\", "/", "C:", "./", "a/../"]) + name
        if attempt(lambda name=name: safe_file(tmp_path, name)):
            accepted += 1
            path = safe_file(tmp_path, name)
            assert path.parent == tmp_path
            assert path.resolve().parent == tmp_path.resolve()
            assert not set(name) & set("/\\:\0\n\t\u202e")
    assert 20 < accepted < 400


@pytest.mark.parametrize("name", [None, 3, b"x", [], ".", "..", "", "a/b", "a\\b", "C:", "x\0", "x\n", "y" * 256])
def test_what_is_no_plain_name_is_refused(name):
    with pytest.raises(ValueError, match="refused the file name"):
        check_basename(name, where="here")


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "a b", "\u00e9.json", ".metadata", "y" * 255])
def test_plain_names_pass(name):
    assert check_basename(name, where="here") == name
