"""What an attacker or an accident puts into a model directory: links, pipes, placeholders, absurd sizes."""

import json
import os
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import tt_ckpt
from tt_ckpt.formats.source import open_model
from tt_ckpt.safetensors_file import read_header

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 4900000000\n"
PAGE = b"<!DOCTYPE html>\n<html><title>Sign in</title></html>"


@pytest.fixture
def private(tmp_path):
    """A folder of the user's that no model directory has to do with."""
    folder = tmp_path / "home" / "private"
    folder.mkdir(parents=True)
    for name in ("id_rsa", "config.json", "model.safetensors", "tokenizer.json", "params.json", "template.jinja"):
        (folder / name).write_text("PRIVATE KEY")
    return folder


@pytest.fixture
def formats(model_dir, tmp_path):
    """formats(name) -> a model directory of that format: hf, sharded, meta, torchtune or bin."""

    def make(name):
        source = model_dir()
        folder = tmp_path / name
        if name == "hf":
            return source
        if name in ("meta", "torchtune"):
            tt_ckpt.convert(source, folder, name)
        elif name == "sharded":
            tt_ckpt.convert(source, folder, max_shard_size="40KB")
            assert len(list(folder.glob("*.safetensors"))) == 3
        else:
            folder.mkdir()
            (folder / "config.json").write_bytes((source / "config.json").read_bytes())
            (folder / "tokenizer.json").write_text("{}")
            torch.save(open_model(source).get("model.norm.weight"), folder / "pytorch_model.bin")
        return folder

    return make


FILES = [
    ("hf", "model.safetensors"), ("hf", "config.json"), ("hf", "tokenizer.json"), ("hf", "generation_config.json"),
    ("sharded", "model-00002-of-00003.safetensors"), ("sharded", "model.safetensors.index.json"),
    ("meta", "consolidated.00.pth"), ("meta", "params.json"), ("torchtune", "torchtune_model_0.pt"),
    ("bin", "pytorch_model.bin"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "message"), [
    (POINTER, r"a git-lfs pointer \(oid sha256:abababababab.*, 4\.9 GB\), not the file itself; run: git lfs pull"),
    (PAGE, "a web page, not the file itself; .*download it again"),
    (b"Entry not found", "the answer of a web server"),
])  # fmt: skip
@pytest.mark.parametrize(("kind", "name"), FILES)
def test_a_placeholder_of_any_file_is_named_with_its_cure(formats, tmp_path, kind, name, content, message):
    folder = formats(kind)
    if kind == "meta":
        (folder / "config.json").unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: {message}") as caught:
        tt_ckpt.convert(folder, tmp_path / "out", allow_pickle=True)
    assert str(caught.value).isprintable()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "name"), [one for one in FILES if one[1] != "generation_config.json"])
def test_an_empty_file_is_named(formats, tmp_path, kind, name):
    folder = formats(kind)
    if kind == "meta":
        (folder / "config.json").unlink()
    (folder / name).write_bytes(b"")
    if name == "tokenizer.json":
        return  # an empty file travels as it is; the tokenizer says so when it is read
    with pytest.raises(ValueError, match=f"{name}: 0 bytes"):
        tt_ckpt.convert(folder, tmp_path / "out", allow_pickle=True)


@pytest.mark.parametrize("thing", ["outside", "nothing", "itself", "pipe"])
@pytest.mark.parametrize(("kind", "name"), FILES)
def test_a_link_or_a_pipe_in_the_place_of_any_file_is_refused(formats, tmp_path, private, kind, name, thing):
    folder = formats(kind)
    if kind == "meta":
        (folder / "config.json").unlink()
    (folder / name).unlink()
    if thing == "pipe":
        os.mkfifo(folder / name)
    else:
        target = {"outside": private / "id_rsa", "nothing": "../nowhere", "itself": name}[thing]
        (folder / name).symlink_to(target)
    with pytest.raises(ValueError, match=rf"{name}: (refused: a link|a pipe, not a regular file)"):
        tt_ckpt.convert(folder, tmp_path / "out", allow_pickle=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["hf", "meta"])
def test_a_linked_folder_of_templates_is_not_copied(model_dir, tmp_path, private, to, tiny, config):
    source = model_dir()
    (source / "additional_chat_templates").symlink_to(private)
    with pytest.raises(ValueError, match="additional_chat_templates: refused: a link that leaves its folder"):
        tt_ckpt.convert(source, tmp_path / "out", to)
    with pytest.raises(ValueError, match="additional_chat_templates: refused: a link that leaves its folder"):
        tt_ckpt.save_hf(tiny(), tmp_path / "saved", config=config(), source=source)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "saved").exists()
    (source / "additional_chat_templates").unlink()
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").symlink_to(private / "template.jinja")
    with pytest.raises(ValueError, match=r"tool\.jinja: refused: a link that leaves"):
        tt_ckpt.convert(source, tmp_path / "out", to)


def test_an_epoch_folder_that_is_a_link_is_not_followed(formats, tmp_path, private):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "epoch_0").symlink_to(private)
    with pytest.raises(ValueError, match="epoch_0: refused: a link that leaves its folder"):
        tt_ckpt.convert(folder, tmp_path / "out", allow_pickle=True)


def test_a_model_in_the_hub_cache_converts_with_its_templates(model_dir, tmp_path):
    source, repository = model_dir(), tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    (snapshot / "additional_chat_templates").mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted(source.iterdir())):
        file.rename(blobs / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    (blobs / "t").write_text("{{ messages }}")
    (snapshot / "additional_chat_templates" / "tool.jinja").symlink_to("../../../blobs/t")
    done = tt_ckpt.convert(snapshot, tmp_path / "out")
    assert "additional_chat_templates/tool.jinja" in done.files
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_an_index_that_leads_elsewhere_names_itself_and_the_tensor(formats, private):
    folder = formats("sharded")
    path = folder / "model.safetensors.index.json"
    whole = json.loads(path.read_text())
    for name, message in (
        ("../home/private/model.safetensors", "weight_map: 'model.norm.weight': refused the file name"),
        (str(private / "model.safetensors"), "weight_map: 'model.norm.weight': refused the file name"),
        ("config.json", r"'model.norm.weight': 'config.json' is not a \*.safetensors file"),
        (["x"], r"'model.norm.weight': expected a file name, found \['x'\]"),
        ("a\x1b.safetensors", r"refused the file name 'a\\x1b.safetensors'"),
    ):
        path.write_text(json.dumps({**whole, "weight_map": {**whole["weight_map"], "model.norm.weight": name}}))
        with pytest.raises(ValueError, match=message) as caught:
            tt_ckpt.tensor_dtypes(folder)
        assert path.name in str(caught.value)
        assert str(caught.value).isprintable()


def test_an_index_of_half_a_million_entries_is_answered(formats):
    folder = formats("sharded")
    path = folder / "model.safetensors.index.json"
    names = {f"layers.{i}.x": f"model-{i}.safetensors" for i in range(500_000)}
    path.write_text(json.dumps({"metadata": {"total_size": 10**400}, "weight_map": names}))
    with pytest.raises(FileNotFoundError, match="500000 of 500000 shards missing: model-0.safetensors, "):
        tt_ckpt.tensor_dtypes(folder)


def test_what_is_wrong_with_a_config_is_said_with_its_file(model_dir, tmp_path):
    folder = model_dir()
    config = json.loads((folder / "config.json").read_text())
    for change in ({"rms_norm_eps": float("nan")}, {"num_hidden_layers": 1.5}, {"model_type": ["\x1b"]}):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=r"source/config\.json: ") as caught:
            tt_ckpt.convert(folder, tmp_path / "out", "meta")
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["./a\x1b[31m", "x" * 100_000, "a\nb/c/d", "./a\u202eb"])
def test_a_name_that_no_directory_has_is_shown_as_it_is_spelt(name):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        tt_ckpt.resolve(name)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


# ---- headers ---------------------------------------------------------------------------------------------------------


def header_file(path, header, nbytes=0):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(nbytes))
    return path


HEADERS = {
    "a huge shape over few bytes": ({"a": {"dtype": "F32", "shape": [2**40, 2**19], "data_offsets": [0, 8]}}, 8),
    "a zero beside numbers that overflow": (
        {"a": {"dtype": "F32", "shape": [0, 2**50, 2**50], "data_offsets": [0, 0]}}, 0),
    "a hundred thousand dimensions": ({"a": {"dtype": "F32", "shape": [1] * 100_000, "data_offsets": [0, 4]}}, 4),
    "tensors over each other": (
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
         "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, 12),
    "a name with NUL": ({"a\0": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, 1),
    "a name with an escape": ({"a\x1b]0;x\x07": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, 1),
    "a name with a line break": ({"a\nb": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, 1),
    "no name": ({"": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, 1),
    "a long name": ({"x" * 70_000: {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, 1),
    "half of a surrogate pair": (b'{"\\ud800": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}', 1),
    "a type that torch lacks": ({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, 1),
    "a type of 70,000 letters": ({"a": {"dtype": "\x1b" * 70_000, "shape": [2], "data_offsets": [0, 1]}}, 1),
    "deep JSON": (b"[" * 100_000, 0),
    "deep JSON in an object": (b'{"a":' * 100_000, 0),
    "spaces before": (b'  {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}', 1),
    "a whole number of 5000 digits": (b'{"a": {"dtype": "U8", "shape": [' + b"9" * 5000 + b"]}}", 1),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, 0),
    "bytes that belong to nothing": ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, 100),
    "twice the same": (b'{"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}, "a": 1}', 0),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_a_hostile_header_is_refused_with_its_file(tmp_path, name):
    path = header_file(tmp_path / "model.safetensors", *HEADERS[name])
    with pytest.raises(
        ValueError, match=r"model\.safetensors: damaged safetensors header: .*; download it again"
    ) as caught:
        read_header(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_a_header_at_the_limit_is_read_at_once_and_one_beyond_is_not(tmp_path):
    path = header_file(tmp_path / "model.safetensors", {"__metadata__": {"a": "x" * 24_000_000}})
    assert len(read_header(path).metadata["a"]) == 24_000_000
    many = {f"{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(300_000)}
    assert len(read_header(header_file(path, many)).tensors) == 300_000
    with pytest.raises(ValueError, match="its header would be 25000001 bytes"):
        read_header(header_file(path, b"x" * 25_000_001))


def test_names_that_differ_in_case_only_are_two_tensors(model_dir, tiny):
    folder = model_dir()
    tensors = {**tiny().state_dict(), "MODEL.NORM.WEIGHT": torch.ones(32)}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 unexpected \(MODEL\.NORM\.WEIGHT\)"):
        tt_ckpt.load_weights(tiny(), folder)


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "value", "held"), [
    ("num_hidden_layers", 10**8, "3 layers"),
    ("num_hidden_layers", 10**30, "3 layers"),
    ("vocab_size", 10**9, "65 embedding rows"),
    ("hidden_size", 2**40, "32 numbers in an embedding"),
    ("intermediate_size", 10**12, "48 rows in up_proj"),
    ("num_attention_heads", 10**7, "32 rows in q_proj"),
    ("num_key_value_heads", 10**7, "16 rows in k_proj"),
    ("head_dim", 10**7, "32 rows in q_proj"),
])  # fmt: skip
def test_a_size_that_the_weights_do_not_have_is_named_before_anything_is_made(model_dir, tmp_path, key, value, held):
    folder = model_dir()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    for action in (lambda: tt_ckpt.read_config(folder), lambda: tt_ckpt.convert(folder, tmp_path / "out")):
        with pytest.raises(ValueError, match=rf"config\.json: {key} .*, but the weights have {held}"):
            action()


def test_experts_are_counted(model_dir):
    folder = model_dir()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_local_experts": 10**6}))
    save_file(
        {f"model.layers.0.mlp.experts.{i}.w1.weight": torch.ones(1) for i in range(4)}, folder / "model.safetensors"
    )
    with pytest.raises(ValueError, match="num_local_experts 1000000, but the weights have 4 experts"):
        tt_ckpt.read_config(folder)


def test_a_conversion_with_more_layers_than_weights_is_refused(model_dir, tmp_path):
    folder = model_dir()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(ValueError, match="num_hidden_layers 4, but the weights have 3 layers"):
        tt_ckpt.convert(folder, tmp_path / "out")


def test_params_with_absurd_sizes_are_refused(formats, tmp_path):
    folder = formats("meta")
    (folder / "config.json").unlink()
    whole = json.loads((folder / "params.json").read_text())
    for key, value in (("n_layers", 10**8), ("dim", 2**39), ("n_heads", 2**30), ("n_layers", 10**30), ("dim", True)):
        (folder / "params.json").write_text(json.dumps(whole | {key: value}))
        with pytest.raises(ValueError, match=r".") as caught:
            tt_ckpt.convert(folder, tmp_path / "out", allow_pickle=True)
        assert str(caught.value).isprintable()


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoints(tmp_path):
    found = tt_ckpt.TrainCheckpoint(tmp_path / "run" / "checkpoints")
    for step in (1, 2):
        found.save(step, tensors={"a": {"x": torch.ones(2)}}, state={"y": 1})
    return found


def test_a_checkpoint_that_is_a_link_is_neither_read_nor_removed(checkpoints, tmp_path, caplog):
    elsewhere = tmp_path / "home" / "step-000009"
    elsewhere.parent.mkdir()
    (checkpoints.directory / "step-000002").rename(elsewhere)
    (checkpoints.directory / "step-000009").symlink_to(elsewhere)
    assert checkpoints.latest().name == "step-000001"
    assert "step-000009 is a link and is not used; copy the folder instead" in caplog.text
    checkpoints.remove_after(1)
    for step in (10, 11, 12):
        checkpoints.save(step, tensors={}, state={})
    assert (elsewhere / "MANIFEST.json").exists()


def test_leftovers_and_replaced_checkpoints_that_are_links_lose_the_link_only(checkpoints, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "x").write_text("KEEP")
    names = (".tmp-step-000003-0123abcd", ".old-step-000001-0123abcd", "step-000003")
    for name in names:
        (checkpoints.directory / name).symlink_to(precious)
    checkpoints.save(3, tensors={}, state={})
    assert (precious / "x").read_text() == "KEEP"
    assert [path.name for path in checkpoints.directory.iterdir() if path.is_symlink()] == []


@pytest.mark.parametrize("name", ["MANIFEST.json", "state.json", "a.safetensors"])
@pytest.mark.parametrize("thing", ["link", "pipe", "pointer"])
def test_a_file_of_a_checkpoint_that_is_none_is_refused(checkpoints, tmp_path, name, thing):
    folder = checkpoints.directory / "step-000002"
    (folder / name).rename(tmp_path / "moved")
    if thing == "link":
        (folder / name).symlink_to(tmp_path / "moved")
    elif thing == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).write_bytes(POINTER)
    with pytest.raises(ValueError, match=name):
        checkpoints.restore(folder)
    assert checkpoints.latest().name == "step-000001"


def test_a_checkpoint_with_a_linked_folder_is_refused(tmp_path, private):
    checkpoints = tt_ckpt.TrainCheckpoint(tmp_path / "run")
    folder = checkpoints.save(
        1,
        tensors={},
        state={},
        files={"adapter": lambda path: (path.mkdir(), (path / "id_rsa").write_text("PRIVATE KEY"))},
    )
    (folder / "adapter" / "id_rsa").unlink()
    (folder / "adapter").rmdir()
    (folder / "adapter").symlink_to(private)
    with pytest.raises(ValueError, match="adapter/id_rsa: refused: a link that leaves"):
        checkpoints.restore(folder)


def test_a_checkpoint_of_another_step_is_refused(checkpoints):
    (checkpoints.directory / "step-000002").rename(checkpoints.directory / "step-000007")
    with pytest.raises(ValueError, match="of step 2, not of step-000007"):
        checkpoints.restore(checkpoints.directory / "step-000007")


def test_parts_that_lie_over_each_other_are_refused(tmp_path):
    from tt_ckpt.train.tensor_groups import Group

    chunk = {"file": "g.00000.safetensors", "offsets": [0], "sizes": [2]}
    layout = {"tensors": {"x": {"dtype": "F32", "shape": [4], "chunks": [chunk, chunk]}}}
    (tmp_path / "g.layout.json").write_text(json.dumps(layout))
    with pytest.raises(ValueError, match=r"g\.layout\.json: damaged: 'x' has parts that do not cover it"):
        Group(tmp_path, "g")


# ---- GGUF ------------------------------------------------------------------------------------------------------------


def gguf(path, tail, tensors=0, values=1):
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, values) + tail)
    return path


def key(name, kind, value):
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


HOSTILE_GGUF = {
    "2**60 values": (b"", 0, 2**60),
    "2**60 tensors": (b"", 2**60, 0),
    "a name of 2**60": (struct.pack("<Q", 2**60), 0, 1),
    "text of 2**60": (key(b"a", 8, struct.pack("<Q", 2**60)), 0, 1),
    "a list of 2**60": (key(b"a", 9, struct.pack("<IQ", 0, 2**60)), 0, 1),
    "texts of 2**60": (key(b"a", 9, struct.pack("<IQ", 8, 2**60)), 0, 1),
    "a list of lists": (key(b"a", 9, struct.pack("<IQ", 9, 1) + struct.pack("<IQ", 9, 1) * 10), 0, 1),
    "an unknown type": (key(b"a", 77, b""), 0, 1),
    "alignment 0": (key(b"general.alignment", 4, struct.pack("<I", 0)), 0, 1),
    "alignment 2**31": (key(b"general.alignment", 4, struct.pack("<I", 2**31)), 0, 1),
    "a key with an escape": (key(b"\x1b]0;x\x07", 4, struct.pack("<I", 0)), 0, 1),
    "an architecture with an escape": (key(b"general.architecture", 8, struct.pack("<Q", 3) + b"\x1b[m"), 0, 1),
    "a type with an escape": (key(b"general.type", 8, struct.pack("<Q", 3) + b"\x1b[m"), 0, 1),
    "a split of 2**60": (key(b"split.count", 10, struct.pack("<Q", 2**60)), 0, 1),
}


@pytest.mark.parametrize("name", HOSTILE_GGUF)
def test_a_hostile_gguf_file_is_refused_at_once(tmp_path, name):
    pytest.importorskip("gguf")
    tail, tensors, values = HOSTILE_GGUF[name]
    path = gguf(tmp_path / "m.gguf", tail + bytes(64), tensors, values)
    with pytest.raises(ValueError, match=r"m\.gguf: ") as caught:
        tt_ckpt.convert(path, tmp_path / "out")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_a_sparse_gguf_file_takes_no_memory(tmp_path):
    pytest.importorskip("gguf")
    path = gguf(tmp_path / "m.gguf", key(b"a", 8, struct.pack("<Q", 1 << 40)), 0, 1)
    os.truncate(path, 1 << 41)
    lists = gguf(
        tmp_path / "n.gguf", b"".join(key(b"%d" % i, 9, struct.pack("<IQ", 0, 1 << 40)) for i in range(1)), 0, 1
    )
    os.truncate(lists, 1 << 41)
    code = (
        "import resource, sys, tt_ckpt.formats.gguf.file as g; from pathlib import Path\n"
        "g.quant_sizes(); size = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + 2**29,) * 2)\n"
        "for name in sys.argv[1:]:\n"
        "    try: g.read_gguf(Path(name))\n"
        "    except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path, lists], capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 2


# ---- what a download left --------------------------------------------------------------------------------------------


def test_verification_reads_nothing_through_links_and_no_endless_record(model_dir, private):
    folder = model_dir()
    records = folder / ".cache" / "huggingface" / "download"
    records.mkdir(parents=True)
    with (records / "config.json.metadata").open("wb") as file:
        file.truncate(1 << 40)
    os.mkfifo(records / "tokenizer.json.metadata")
    (records / "generation_config.json.metadata").symlink_to(private / "id_rsa")
    assert tt_ckpt.verify_files(folder).files == []
    (folder / "extra.json").symlink_to(private / "config.json")
    with pytest.raises(ValueError, match=r"extra\.json: refused: a link that leaves its folder"):
        tt_ckpt.verify_files(folder)


def test_nothing_of_a_result_is_written_through_links_that_are_there(model_dir, tmp_path, tiny, config):
    precious = tmp_path / "precious"
    precious.mkdir()
    out = tmp_path / "out"
    out.mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json", "model.safetensors.index.json", ".tmp-model"):
        (precious / name).write_text("KEEP")
        (out / name).symlink_to(precious / name)
    with pytest.raises(FileExistsError):
        tt_ckpt.save_hf(tiny(), out, config=config(), source=model_dir())
    tt_ckpt.save_hf(tiny(), out, config=config(), source=tmp_path / "source", overwrite=True)
    assert {path.read_text() for path in precious.iterdir()} == {"KEEP"}
    assert not any((out / name).is_symlink() for name in ("model.safetensors", "config.json", "tokenizer.json"))
