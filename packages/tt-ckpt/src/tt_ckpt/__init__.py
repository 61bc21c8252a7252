"""Checkpoints of open LLMs: Hugging Face directories, training state that survives crashes, hub transfer."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tt_ckpt.formats.convert import Conversion, convert
    from tt_ckpt.formats.torchtune_adapter import AdapterConversion, convert_adapter
    from tt_ckpt.hf.directory import read_config
    from tt_ckpt.hf.load import check_weights, load_weights
    from tt_ckpt.hf.save import save_hf
    from tt_ckpt.hf.stored_tensors import StoredTensors, open_tensors, tensor_dtypes
    from tt_ckpt.hf.verify import Verified, verify_files
    from tt_ckpt.hub.download import Download, download
    from tt_ckpt.hub.upload import Upload, model_card, upload
    from tt_ckpt.model_path import resolve
    from tt_ckpt.redaction import redact
    from tt_ckpt.safetensors_file import TensorSpec
    from tt_ckpt.train.checkpoint import CheckpointNotSaved, TrainCheckpoint, TrainState

__version__ = "0.1.0"

_HOMES = {
    name: module
    for module, names in {
        "formats.convert": "Conversion convert",
        "formats.torchtune_adapter": "AdapterConversion convert_adapter",
        "hf.directory": "read_config",
        "hf.load": "check_weights load_weights",
        "hf.save": "save_hf",
        "hf.stored_tensors": "StoredTensors open_tensors tensor_dtypes",
        "hf.verify": "Verified verify_files",
        "hub.download": "Download download",
        "hub.upload": "Upload model_card upload",
        "model_path": "resolve",
        "redaction": "redact",
        "safetensors_file": "TensorSpec",
        "train.checkpoint": "CheckpointNotSaved TrainCheckpoint TrainState",
    }.items()
    for name in names.split()
}

__all__ = [
    "read_config", "resolve", "check_weights", "load_weights", "tensor_dtypes", "open_tensors", "StoredTensors",
    "TensorSpec", "save_hf", "convert", "Conversion", "convert_adapter", "AdapterConversion", "download", "Download",
    "upload", "Upload", "model_card",
    "verify_files", "Verified", "redact", "TrainCheckpoint", "TrainState", "CheckpointNotSaved",
]  # fmt: skip


if not TYPE_CHECKING:  # so that a misspelt name is an error to a type checker

    def __getattr__(name: str) -> object:
        """Import on first use, so that ``tt_ckpt.files`` comes without torch."""
        if name not in _HOMES:
            raise AttributeError(f"module 'tt_ckpt' has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(f"tt_ckpt.{_HOMES[name]}"), name)
        return value
