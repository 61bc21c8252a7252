"""Checkpoints of open LLMs: Hugging Face directories, training state that survives crashes, hub transfer."""

from tt_ckpt.convert import Conversion, convert
from tt_ckpt.directory import read_config, resolve
from tt_ckpt.hf import save_hf
from tt_ckpt.hub import Download, download
from tt_ckpt.load import load_weights, tensor_dtypes
from tt_ckpt.redact import redact
from tt_ckpt.train_checkpoint import CheckpointNotSaved, TrainCheckpoint, TrainState
from tt_ckpt.upload import Upload, model_card, upload
from tt_ckpt.verify import Verified, verify_files

__version__ = "0.1.0"

__all__ = [
    "read_config",
    "resolve",
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
