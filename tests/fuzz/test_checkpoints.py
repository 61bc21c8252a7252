"""What tt_ckpt reads of a training checkpoint: manifest, state, parts. Signed anew, by somebody who means it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tt_ckpt
from tt_ckpt.commit import _digest, encode_json
from tt_ckpt.train.tensor_groups import Group


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    checkpoints = tt_ckpt.TrainCheckpoint(tmp_path / "run")
    return checkpoints.save(1, tensors={"a": {"x": torch.ones(2)}}, state={"y": [1, 2]}, info={"config": "abc"})


def restored(folder: Path) -> None:
    found = tt_ckpt.TrainCheckpoint(folder.parent).restore(folder)
    for group in found.tensors.values():
        dict(group)


def test_any_bytes_of_a_manifest_are_refused_or_whole(saved: Path, fuzz: Any) -> None:
    whole = (saved / "MANIFEST.json").read_bytes()

    def read(data: bytes) -> None:
        (saved / "MANIFEST.json").write_bytes(data)
        restored(saved)

    fuzz(read, fuzz.mutated(whole))


def test_any_signed_manifest_is_used_or_refused(saved: Path, fuzz: Any) -> None:
    whole = json.loads((saved / "MANIFEST.json").read_text())

    def read(value: Any) -> None:
        try:
            body = {**value, "sha256": _digest(value)} if isinstance(value, dict) else value
            data = encode_json(body)
        except ValueError:  # what JSON cannot say
            return
        (saved / "MANIFEST.json").write_bytes(data)
        restored(saved)

    fuzz(read, fuzz.mutated_json({key: value for key, value in whole.items() if key != "sha256"}))


def test_any_state_is_read_or_refused(saved: Path, fuzz: Any) -> None:
    from tt_ckpt.commit import write_manifest

    info = json.loads((saved / "MANIFEST.json").read_text())
    info = {key: value for key, value in info.items() if key not in ("sha256", "files")}

    def read(data: bytes) -> None:
        (saved / "state.json").write_bytes(data)
        (saved / "MANIFEST.json").unlink(missing_ok=True)
        write_manifest(saved, info)
        restored(saved)

    fuzz(read, fuzz.mutated((saved / "state.json").read_bytes()))


def test_any_layout_of_parts_is_used_or_refused(tmp_path: Path, fuzz: Any) -> None:
    from tt_ckpt.safetensors_file import write_tensor_dict

    write_tensor_dict(tmp_path / "g.0.safetensors", {"x@0": torch.ones(2), "x@2": torch.ones(1), "y@": torch.ones(())})
    chunks = [{"file": "g.0.safetensors", "offsets": [i], "sizes": [n]} for i, n in ((0, 2), (2, 1))]
    y = {"dtype": "F32", "shape": [], "chunks": [{"file": "g.0.safetensors", "offsets": [], "sizes": []}]}
    whole = {"tensors": {"x": {"dtype": "F32", "shape": [3], "chunks": chunks}, "y": y}}

    def read(value: Any) -> None:
        (tmp_path / "g.layout.json").write_text(json.dumps(value))
        dict(Group(tmp_path, "g"))

    read(whole)
    fuzz(read, fuzz.mutated_json(whole))
