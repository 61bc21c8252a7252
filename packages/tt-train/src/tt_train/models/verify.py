"""A certificate that a model directory gives the same results here and in transformers."""

from pathlib import Path
from typing import Any

import torch

import tt_ckpt
import tt_models
from tt_ckpt.shown import plain
from tt_models import parity
from tt_train.errors import ConfigError, shell_word
from tt_train.models.load import load_base
from tt_train.records.run_files import FinishedRun


def verify(path: str | Path, *, seed: int = 0) -> dict[str, Any]:
    """Compare a Hugging Face directory or hub id with transformers.

    Compared are logits, gradients, decoding, and the directory written back.

    The certificate is ready for JSON: ``passed``, ``errors`` (relative distances to transformers in fp64),
    ``reference_errors`` (those of transformers in fp32), ``limits``, ``versions``. The directory
    written back has a config.json of ours, so that this is checked too.

    Raises:
        ValueError: if transformers is not installed, or the directory cannot be read.
    """
    folder = Path(path)
    run = FinishedRun.at(folder)
    if run is not None and run.model is not None:
        path = run.model
    elif run is not None or (folder / "adapter_config.json").is_file():
        merge = f"tt merge {shell_word(folder)} -o DIR"
        raise ConfigError([f"{plain(folder)}: a run or an adapter; verify takes a model: {merge}, then DIR"])
    return parity.verify(tt_ckpt.resolve(path), load=_load, save=_save, seed=seed)


def _load(folder: Path) -> tt_models.Decoder:
    return load_base(folder, device=torch.device("cpu"), dtype=torch.float32)


def _save(model: tt_models.Decoder, folder: Path) -> None:
    tt_ckpt.save_hf(model, folder, config=tt_models.config_to_hf(model.config))
