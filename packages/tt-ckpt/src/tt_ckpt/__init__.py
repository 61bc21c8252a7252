"""Checkpoints of open LLMs: Hugging Face directories, training state that survives crashes, hub transfer."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tt_ckpt.formats.convert import Conversion, convert
    from tt_ckpt.hf.directory import read_config, resolve
    from tt_ckpt.hf.load import check_weights, load_weights, tensor_dtypes
    from tt_ckpt.hf.save import save_hf
    from tt_ckpt.hub.download import Download, download
    from tt_ckpt.hub.upload import Upload, model_card, upload
    from tt_ckpt.hub.verify import Verified, verify_files
    from tt_ckpt.redaction import redact
    from tt_ckpt.train.checkpoint import CheckpointNotSaved, TrainCheckpoint, TrainState

__version__ = "0.1.0"

_HOMES = {
    "Conversion": "formats.convert",
    "convert": "formats.convert",
    "read_config": "hf.directory",
    "resolve": "hf.directory",
    "save_hf": "hf.save",
    "Download": "hub.download",
    "download": "hub.download",
    "check_weights": "hf.load",
    "load_weights": "hf.load",
    "tensor_dtypes": "hf.load",
    "redact": "redaction",
    "CheckpointNotSaved": "train.checkpoint",
    "TrainCheckpoint": "train.checkpoint",
    "TrainState": "train.checkpoint",
    "Upload": "hub.upload",
    "model_card": "hub.upload",
    "upload": "hub.upload",
    "Verified": "hub.verify",
    "verify_files": "hub.verify",
}

__all__ = [
    "read_config",
    "resolve",
    "check_weights",
    "load_weights",
    "tensor_dtypes",
    "save_hf",
    "convert",
    "Conversion",
    "download",
    "Download",
    "upload",
    "Upload",
    "model_card",
    "verify_files",
    "Verified",
    "redact",
    "TrainCheckpoint",
    "TrainState",
    "CheckpointNotSaved",
]


if not TYPE_CHECKING:  # so that a misspelt name is an error to a type checker

    def __getattr__(name: str) -> object:
        """Import on first use, so that ``tt_ckpt.files`` comes without torch."""
        if name in _HOMES:
            return getattr(importlib.import_module(f"tt_ckpt.{_HOMES[name]}"), name)
        raise AttributeError(f"module 'tt_ckpt' has no attribute {name!r}")
