"""The types that a user of the package sees, by mypy in strict mode."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tt_ckpt

pytest.importorskip("mypy")
USER = """
from pathlib import Path
from torch import nn
import tt_ckpt

def use(model: nn.Module, path: Path) -> None:
    tensors: tt_ckpt.StoredTensors = tt_ckpt.open_tensors(path)
    for name, spec in tensors.specs.items():
        reveal_type((name, spec.dtype, spec.shape, spec.nbytes))
    reveal_type(tensors["a"])
    reveal_type(tt_ckpt.read_config(path))
    reveal_type(tt_ckpt.convert(path, path, "meta").files)
    reveal_type(tt_ckpt.TrainCheckpoint(path).restore().tensors)
    reveal_type(tt_ckpt.tensor_dtypes(path))
    tt_ckpt.load_weights(model, path, copy=False)
    tt_ckpt.load_weight(model, path)
    tt_ckpt.convert(path, path, "gguf")
"""


def test_a_user_sees_types_and_mistakes(tmp_path):
    (tmp_path / "user.py").write_text(USER)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "user.py"]
    found = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"MYPYPATH": ""}, capture_output=True, text=True, timeout=300
    ).stdout
    told = [line.split(": ", 2)[2] for line in found.splitlines() if line.startswith("user.py:")]
    assert [line.partition('"')[2].rstrip('"') for line in told if line.startswith("Revealed")] == [
        "tuple[str, torch._C.dtype, tuple[int, ...], int]",
        "torch._tensor.Tensor",
        "dict[str, Any]",
        "list[str]",
        "dict[str, tt_ckpt.train.tensor_groups.Group]",
        "dict[str, torch._C.dtype]",
    ]
    mistakes = [line for line in told if "[" in line and not line.startswith("Revealed")]
    assert ["copy" in mistakes[0], "load_weight" in mistakes[1], "convert" in mistakes[2]] == [True] * 3, mistakes


def test_every_public_name_is_there_and_documented():
    for name in tt_ckpt.__all__:
        assert (getattr(tt_ckpt, name).__doc__ or "").strip(), name
        home = importlib.import_module(f"tt_ckpt.{tt_ckpt._HOMES[name]}")
        assert getattr(home, name) is getattr(tt_ckpt, name)
    source = Path(tt_ckpt.__file__).read_text()
    assert all(f"{name}" in source.partition("__version__")[0] for name in tt_ckpt.__all__), "for type checkers"
