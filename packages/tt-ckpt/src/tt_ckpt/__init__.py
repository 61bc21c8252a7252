"""Checkpoints of open LLMs: Hugging Face directories, training state that survives crashes, hub transfer."""

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tt_ckpt.convert import Conversion, convert
    from tt_ckpt.directory import read_config, resolve
    from tt_ckpt.hf import save_hf
    from tt_ckpt.hub import Download, download
    from tt_ckpt.load import check_weights, load_weights, tensor_dtypes
    from tt_ckpt.redact import redact
    from tt_ckpt.train_checkpoint import CheckpointNotSaved, TrainCheckpoint, TrainState
    from tt_ckpt.upload import Upload, model_card, upload
    from tt_ckpt.verify import Verified, verify_files

__version__ = "0.1.0"

_HOMES = {
    "Conversion": "convert",
    "convert": "convert",
    "read_config": "directory",
    "resolve": "directory",
    "save_hf": "hf",
    "Download": "hub",
    "download": "hub",
    "check_weights": "load",
    "load_weights": "load",
    "tensor_dtypes": "load",
    "redact": "redact",
    "CheckpointNotSaved": "train_checkpoint",
    "TrainCheckpoint": "train_checkpoint",
    "TrainState": "train_checkpoint",
    "Upload": "upload",
    "model_card": "upload",
    "upload": "upload",
    "Verified": "verify",
    "verify_files": "verify",
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


class _Package(ModuleType):
    """Imports on first use, so that ``tt_ckpt.files`` comes without torch."""

    def __getattr__(self, name: str) -> Any:
        if name in _HOMES:
            return getattr(importlib.import_module(f"tt_ckpt.{_HOMES[name]}"), name)
        if not name.startswith("_") and importlib.util.find_spec(f"tt_ckpt.{name}") is not None:
            return importlib.import_module(f"tt_ckpt.{name}")
        raise AttributeError(f"module 'tt_ckpt' has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        """Of ``convert``, ``redact`` and ``upload``, names of a module and of its function, the function is kept."""
        if name in _HOMES and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
