"""Checkpoints of open LLMs: Hugging Face directories, training state that survives crashes, hub transfer."""

from tt_ckpt.convert import Conversion, convert
from tt_ckpt.directory import read_config, resolve
from tt_ckpt.hf import save_hf
from tt_ckpt.load import load_weights
from tt_ckpt.train_checkpoint import CheckpointNotSaved, TrainCheckpoint, TrainState

__all__ = [
    "read_config",
    "resolve",
    "load_weights",
    "save_hf",
    "convert",
    "Conversion",
    "TrainCheckpoint",
    "TrainState",
    "CheckpointNotSaved",
]
