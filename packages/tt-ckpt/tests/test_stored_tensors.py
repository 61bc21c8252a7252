import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tt_ckpt.hf.save import encode_index, parse_size, read_layout, split
from tt_ckpt.hf.stored_tensors import format_size, open_tensors, read_json
from tt_ckpt.safetensors_file import TensorSpec, spec_of


def specs(*sizes):
    return {f"t{i}": TensorSpec(dtype=torch.uint8, shape=(size,)) for i, size in enumerate(sizes)}


@pytest.mark.parametrize(
    ("sizes", "limit"),
    [
        ((6, 6, 2, 6, 2, 2), 10),
        ((1, 1, 1), 1),
        ((30, 1, 1), 10),
        ((1, 30, 1), 10),
        ((10, 10), 10),
        ((3,), 10),
        ((0, 3), 2),
    ],
)
def test_the_split_is_that_of_huggingface_hub(sizes, limit):
    reference = pytest.importorskip("huggingface_hub").split_torch_state_dict_into_shards
    theirs = reference({name: torch.zeros(spec.shape, dtype=torch.uint8) for name, spec in specs(*sizes).items()},
                       max_shard_size=limit, filename_pattern="model{suffix}.safetensors")  # fmt: skip
    assert split(specs(*sizes), parse_size(limit)) == theirs.filename_to_tensors


def test_the_index_counts_bytes_and_parameters():
    named = {"b": TensorSpec(dtype=torch.bfloat16, shape=(3, 2)), "a": TensorSpec(dtype=torch.float32, shape=())}
    index = json.loads(encode_index({"x": ["b"], "y": ["a"]}, named))
    assert index == {"metadata": {"total_parameters": 7, "total_size": 16}, "weight_map": {"a": "y", "b": "x"}}


@pytest.mark.parametrize(
    ("text", "number"), [("5GB", 5 * 10**9), ("60KB", 60_000), ("1.5 mb", 1_500_000), (7, 7), ("1TB", 10**12)]
)
def test_sizes_are_read(text, number):
    assert parse_size(text) == number


@pytest.mark.parametrize("text", ["5", "GB", "5 gigabytes", "1.2.3GB", "-5GB", 0, -1, "0GB", ""])
def test_wrong_sizes_are_refused(text):
    with pytest.raises(ValueError, match="max_shard_size"):
        parse_size(text)


def test_sizes_are_shown():
    assert [format_size(n) for n in (12, 1_200_000_000, 64_000)] == ["12 bytes", "1.2 GB", "64.0 KB"]


@pytest.fixture
def sharded(tmp_path):
    a, b = {"x": torch.ones(4), "y": torch.ones(2)}, {"z": torch.ones(3)}
    save_file(a, tmp_path / "model-00001-of-00002.safetensors")
    save_file(b, tmp_path / "model-00002-of-00002.safetensors")
    where = {key: f"model-0000{1 + (key == 'z')}-of-00002.safetensors" for key in ("x", "y", "z")}
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 36}, "weight_map": where})
    )
    return tmp_path


def edit_index(directory, change):
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def test_shards_are_found_by_their_index(sharded):
    found = open_tensors(sharded)
    assert sorted(found.where) == ["x", "y", "z"]
    assert found.nbytes == 36
    assert found.specs["z"] == spec_of(torch.ones(3))


def test_missing_shards_are_listed_with_their_size(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"1 of 2 shards missing: model-00002-of-00002.safetensors.*tt download"
    ):
        open_tensors(sharded)


def test_an_index_that_disagrees_with_the_shards_is_refused(sharded):
    edit_index(sharded, lambda index: index["weight_map"].update(x="model-00002-of-00002.safetensors"))
    with pytest.raises(ValueError, match="names model-.* for 'x', which is in model-00001.*; download both again"):
        open_tensors(sharded)


def test_the_index_decides_among_copies(sharded):
    """In two shards, in a file of the whole model, in Mistral's own, in another precision: only one counts."""
    weights = load_file(sharded / "model-00002-of-00002.safetensors")
    save_file({**weights, "x": torch.zeros(4)}, sharded / "model-00002-of-00002.safetensors")
    for name in ("model.safetensors", "model.fp16.safetensors", "consolidated.safetensors"):
        save_file({"x": torch.zeros(4), "stray": torch.ones(9)}, sharded / name)
    (sharded / "model.fp16.safetensors.index.json").write_text("{}")
    found = open_tensors(sharded)
    assert {key: name[:11] for key, name in found.where.items()} == {
        "x": "model-00001", "y": "model-00001", "z": "model-00002",
    }  # fmt: skip
    assert torch.equal(found["x"], torch.ones(4))
    (sharded / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match="if model.safetensors is of the whole model and the index is old, remove"
    ):
        open_tensors(sharded)


def test_a_tensor_that_the_index_does_not_name_is_left_out_and_told(sharded, caplog):
    """Repositories reuse old shards: https://github.com/vllm-project/vllm/pull/54230."""
    edit_index(sharded, lambda index: index["weight_map"].pop("y"))
    assert sorted(open_tensors(sharded).where) == ["x", "z"]
    assert "does not name 1 tensor of its shards (y), left out here" in caplog.text


def test_a_whole_set_of_shards_needs_no_index(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    assert sorted(open_tensors(sharded).where) == ["x", "y", "z"]
    assert read_layout(sharded) is None  # written again, it gets one
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="only model-00001-of-00002.safetensors; .* download the index too"):
        open_tensors(sharded)


def test_a_stale_index_beside_a_whole_set_is_explained(sharded):
    edit_index(sharded, lambda index: index["weight_map"].update(x="model-00001-of-00003.safetensors"))
    with pytest.raises(
        FileNotFoundError, match=r"if model-00001-of-00002.safetensors is of the whole model and the index"
    ):
        open_tensors(sharded)


def test_copies_without_an_index_to_decide_are_refused(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    weights = load_file(sharded / "model-00002-of-00002.safetensors")
    save_file({**weights, "x": torch.ones(4)}, sharded / "model-00002-of-00002.safetensors")
    with pytest.raises(
        ValueError, match=r"'x' is in model-00001.* and in model-00002.*download model.safetensors.index"
    ):
        open_tensors(sharded)


def test_training_states_of_others_lead_to_what_reads_them(tmp_path):
    (tmp_path / "zero" / "global_step7").mkdir(parents=True)
    (tmp_path / "fsdp" / "pytorch_model_fsdp_0").mkdir(parents=True)
    (tmp_path / "fsdp" / "pytorch_model_fsdp_0" / ".metadata").write_bytes(b"x")
    for name, cure in (("zero", "zero_to_fp32.py"), ("fsdp", r"tt convert .*fsdp/pytorch_model_fsdp_0 DEST")):
        with pytest.raises(FileNotFoundError, match=cure):
            open_tensors(tmp_path / name)


@pytest.mark.parametrize("change", [
    lambda index: index.pop("weight_map"),
    lambda index: index.update(weight_map=[]),
    lambda index: index.update(weight_map={}),
    lambda index: index["weight_map"].update(x=3),
    lambda index: index["weight_map"].update(x=None),
])  # fmt: skip
def test_an_index_of_another_form_is_refused(sharded, change):
    edit_index(sharded, change)
    with pytest.raises(ValueError, match="weight_map"):
        open_tensors(sharded)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b", "C:x", "a\0b", "a\nb"]
)
def test_an_index_that_points_elsewhere_is_refused(sharded, name):
    edit_index(sharded, lambda index: index["weight_map"].update(x=name))
    with pytest.raises(ValueError, match="refused the file name"):
        open_tensors(sharded)


def test_links_out_of_the_folder_are_refused(sharded, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "secret.safetensors"
    shard = sharded / "model-00002-of-00002.safetensors"
    shard.rename(outside)
    shard.symlink_to(outside)
    with pytest.raises(ValueError, match="a link that leaves its folder"):
        open_tensors(sharded)


def test_links_into_the_hub_cache_are_followed(tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save_file({"x": torch.ones(1)}, blobs / ("0" * 64))
    (snapshot / "model.safetensors").symlink_to("../../blobs/" + "0" * 64)
    assert list(open_tensors(snapshot).where) == ["x"]


@pytest.mark.parametrize(("files", "message"), [
    (["pytorch_model.bin"], "only as pickles.*tt convert"),
    (["consolidated.00.pth", "params.json"], "a Meta checkpoint.*tt convert"),
    (["adapter_model.safetensors", "adapter_config.json"], "an adapter, not a model"),
    (["model-00001-of-00002.safetensors"], "neither model.safetensors nor model.safetensors.index.json, only"),
    (["notes.txt"], "expected model.safetensors or model.safetensors.index.json, found notes.txt"),
    ([], "found nothing"),
])  # fmt: skip
def test_a_directory_without_weights_is_explained(tmp_path, files, message):
    for name in files:
        (tmp_path / name).write_text("x")
    with pytest.raises(FileNotFoundError, match=message) as caught:
        open_tensors(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "message"), [
    ('{"a": 1,\n"b"', r"config.json:2:4: not valid JSON"),
    ("", "0 bytes"),
    ("version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ("[" * 100_000, "not valid JSON"),
])  # fmt: skip
def test_json_that_is_none_is_explained(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "config.json")


def test_a_folder_of_runs_in_the_place_of_a_model_is_answered_with_the_runs(tmp_path):
    (tmp_path / "runs/first").mkdir(parents=True)
    (tmp_path / "runs/first/manifest.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="runs: a folder of runs, not a model; name one of them: .*runs/first$"):
        open_tensors(tmp_path / "runs")
