import ast
import io
import os
import pickle
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import tt_ckpt
from tt_ckpt.formats.pickles import read_pickled, write_pickled
from tt_ckpt.safetensors_file import DTYPES, spec_of


class Canary:
    """Unpickled by the full unpickler, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def save(path, content):
    torch.save(content, path)
    return path


def test_what_is_written_torch_reads_lazily_or_not(tmp_path):
    tensors = {f"a.{name}": torch.ones(3, 5, dtype=dtype) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(2.0), "empty": torch.zeros(0, 2), "strided": torch.arange(6).reshape(2, 3).T}
    path = tmp_path / "file.pth"
    seen = []
    write_pickled(path, {k: spec_of(v) for k, v in tensors.items()}, tensors.__getitem__, progress=seen.append)
    assert sum(seen) == sum(tensor.nbytes for tensor in tensors.values())
    for mmap in (False, True):
        loaded = torch.load(path, weights_only=True, mmap=mmap)
        assert list(loaded) == list(tensors)
        for name, tensor in tensors.items():
            assert spec_of(loaded[name]) == spec_of(tensor)
            assert torch.equal(loaded[name].float(), tensor.float())
    assert read_pickled(path, allow_pickle=True).keys() == tensors.keys()


def test_bytes_in_the_order_of_another_machine_keep_their_values_when_pages_are_dropped(tmp_path):
    values = {name: torch.arange(8192.0) + at for at, name in enumerate("ab")}
    swapped = {name: torch.from_numpy(tensor.numpy().byteswap()) for name, tensor in values.items()}
    torch.save(swapped, tmp_path / "little.pth")
    other = b"big" if sys.byteorder == "little" else b"little"
    with zipfile.ZipFile(tmp_path / "little.pth") as read, zipfile.ZipFile(tmp_path / "f.pth", "w") as written:
        for entry in read.infolist():
            written.writestr(entry.filename, other if entry.filename.endswith("byteorder") else read.read(entry))
    tensors = read_pickled(tmp_path / "f.pth", allow_pickle=True)
    for _ in range(2):
        for name, tensor in values.items():
            assert torch.equal(tensors[name], tensor)
            assert torch.equal(torch.cat(list(tensors.pieces(name))).view(-1), tensor)


def test_values_whose_pages_were_dropped_are_read_again(tmp_path):
    values = {"a": torch.randn(4096, 5), "strided": torch.randn(300, 70).T, "c": torch.randn(3)}
    tensors = read_pickled(save(tmp_path / "f.pth", values), allow_pickle=True)
    first = {name: tensors[name] for name in values}
    for name, tensor in values.items():
        assert torch.equal(torch.cat([piece.clone() for piece in tensors.pieces(name)]).view_as(tensor), tensor)
        assert torch.equal(tensors[name], tensor)
    assert all(torch.equal(first[name], tensor) for name, tensor in values.items())


def test_data_is_aligned_for_mapping(tmp_path):
    tensors = {"a": torch.ones(3), "b": torch.ones(5, dtype=torch.bfloat16), "c": torch.ones(7)}
    write_pickled(tmp_path / "f.pth", {k: spec_of(v) for k, v in tensors.items()}, tensors.__getitem__)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in read_pickled(tmp_path / "f.pth", allow_pickle=True).values())


def test_an_existing_file_is_not_written_over(tmp_path):
    path = save(tmp_path / "f.pth", {"a": torch.ones(1)})
    with pytest.raises(FileExistsError):
        write_pickled(path, {}, {}.__getitem__)


def test_nothing_is_read_unless_allowed(tmp_path):
    path = save(tmp_path / "f.pth", {"a": torch.ones(1)})
    with pytest.raises(ValueError, match="--allow-pickle"):
        read_pickled(path, allow_pickle=False)


@pytest.mark.parametrize("place", ["top", "value", "key"])
def test_the_code_of_a_hostile_pickle_never_runs(tmp_path, place):
    canary, sung = Canary(tmp_path / "sung"), tmp_path / "sung"
    content = {"top": canary, "value": {"w": torch.ones(1), "x": canary}, "key": {"w": [torch.ones(1), canary]}}[place]
    path = save(tmp_path / "f.pth", content)
    with pytest.raises(ValueError, match="refused: not a plain file of tensors .*system"):
        read_pickled(path, allow_pickle=True)
    path.write_bytes(pickle.dumps(canary))  # a bare pickle, as .bin files can be
    with pytest.raises(ValueError, match="not a torch archive"):
        read_pickled(path, allow_pickle=True)
    assert not sung.exists()
    pickle.loads(pickle.dumps(canary))
    assert sung.exists(), "the canary must be able to sing"


def test_a_model_directory_with_a_canary_is_safe_with_and_without_the_option(tmp_path, config):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save(folder / "pytorch_model.bin", {"model.embed_tokens.weight": torch.ones(2, 2), "x": Canary(tmp_path / "sung")})
    for allowed in (False, True):
        with pytest.raises(ValueError, match="pytorch_model.bin"):
            tt_ckpt.convert(folder, tmp_path / "out", "hf", allow_pickle=allowed)
    assert not (tmp_path / "sung").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("content", "message"), [
    ([torch.ones(1)], "expected a dict of tensors, found list"),
    ({"a": {"b": torch.ones(1)}}, "a is a dict, not a tensor"),
    ({"a": 3}, "a is a int, not a tensor"),
    ({3: torch.ones(1)}, "expected names of tensors, found the key 3"),
    ({"a": torch.ones(2, 2).to_sparse()}, "refused|not a plain dense tensor"),
    ({"a": torch.empty(3, device="meta")}, "refused|not a plain dense tensor"),
    ({"a": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}, "refused|not a plain dense tensor"),
    ({"a": torch.ones(1).expand(10**9)}, "a is larger than its data"),
    ({"a": torch.ones(3, dtype=torch.complex128)}, "not a plain dense tensor"),
])  # fmt: skip
def test_only_flat_dense_tensors_pass(tmp_path, content, message):
    path = save(tmp_path / "f.pth", content)
    with pytest.raises(ValueError, match=message) as caught:
        read_pickled(path, allow_pickle=True)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def repacked(path, change):
    """The archive with its entries changed by ``change(name, data) -> data``; compressed when told."""
    out = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            data, kind = change(entry.filename, old.read(entry))
            new.writestr(entry.filename, data, compress_type=kind)
    path.write_bytes(out.getvalue())


def test_zip_bombs_are_refused(tmp_path):
    path = save(tmp_path / "f.pth", {"a": torch.zeros(1000)})
    repacked(path, lambda name, data: (data, zipfile.ZIP_DEFLATED))
    with pytest.raises(ValueError, match="compressed ones"):
        read_pickled(path, allow_pickle=True)


@pytest.mark.parametrize(("data", "message"), [
    (b"", "0 bytes"),
    (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    (b"PK\x03\x04 cut", "not a torch archive"),
    (b"\x80\x02}q\x00.", "not a torch archive"),
])  # fmt: skip
def test_files_that_are_no_archive_are_explained(tmp_path, data, message):
    (tmp_path / "f.pth").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_pickled(tmp_path / "f.pth", allow_pickle=True)


def test_a_cut_archive_is_refused(tmp_path):
    path = save(tmp_path / "f.pth", {"a": torch.ones(1000)})
    whole = path.read_bytes()
    for keep in range(1, len(whole), 97):
        path.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match=r"f.pth"):
            read_pickled(path, allow_pickle=True)


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            parts, inner = [], node.func
            while isinstance(inner, ast.Attribute):
                parts.append(inner.attr)
                inner = inner.value
            name = ".".join(reversed([*parts, getattr(inner, "id", "")]))
            yield name, {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                yield f"import {getattr(node, 'module', None) or ''}.{alias.name}", {}


AUDITED = {"pickles.py"}


def test_pickles_are_read_in_the_audited_modules_only():
    """S1, S2, S12: no pickle, eval, exec, shell or unrestricted load anywhere else in the package."""
    banned = ("torch.load", "pickle", "eval", "exec", "os.system", "subprocess", "marshal", "shelve", "cPickle", "dill")
    found = []
    for file in Path(tt_ckpt.__file__).parent.rglob("*.py"):
        for name, keywords in calls(ast.parse(file.read_text())):
            if name == "torch.load":
                assert keywords["weights_only"] is True
            if keywords.get("shell") or (keywords.get("allow_pickle") is True and "load" in name):
                found.append((file.name, name))
            loose = name.removeprefix("import ").strip(".")
            if loose.split(".")[0] in banned or loose in banned:
                found.append((file.name, name))
    assert [entry for entry in found if entry[0] not in AUDITED] == []
    assert ("pickles.py", "torch.load") in found
