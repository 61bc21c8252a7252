"""A certificate that a model directory gives the same results here and in transformers."""

import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import tt_ckpt
import tt_models
from tt_ckpt.shown import plain, quoted
from tt_models import parity
from tt_train.errors import ConfigError, shell_word
from tt_train.models.load import load_base, load_quantized
from tt_train.quantized.stored import is_torchao
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
    found = tt_ckpt.resolve(path)
    if is_torchao(tt_ckpt.read_config(found)):
        return verify_quantized(found, seed=seed)
    return parity.verify(found, load=_load, save=_save, seed=seed)


def verify_quantized(folder: Path, *, seed: int = 0) -> dict[str, Any]:
    """The certificate of a directory with quantized weights. The truth is the model of the matrices that they stand
    for, in transformers and fp64. A limit is 8 times the error of transformers with the same directory; if it cannot
    compute the format on this machine, of transformers with those matrices, in the dtype of the directory.
    """
    try:
        versions = {name: version(name) for name in ("tt-models", "torch", "torchao", "transformers")}
    except PackageNotFoundError as error:
        raise ValueError("verify compares with transformers: run pip install transformers") from error
    cpu, config = torch.device("cpu"), tt_ckpt.read_config(folder)
    model = load_base(folder, device=cpu)
    dtype, length = model.model.embed_tokens.weight.dtype, min(24, model.config.max_position_embeddings)
    ids = torch.randint(0, model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(seed))
    plain_config = {key: value for key, value in config.items() if key != "quantization_config"}
    with tempfile.TemporaryDirectory() as place, parity.without_noise(), torch.no_grad():
        tt_ckpt.save_hf(load_quantized(folder, device=cpu, as_dense=True), place, config=plain_config)
        reference, not_compared = parity.load_reference(place), list[str]()
        try:
            theirs = parity.reference_logits(parity.load_reference(folder, "auto"), ids)
        except Exception as error:  # a kernel that transformers does not have here: torchao raises what it likes
            not_compared = [f"the directory in transformers, which does not compute it here ({quoted(str(error))})"]
            theirs = parity.reference_logits(parity.load_reference(place, dtype), ids)
        with parity.in_fp64(reference):
            truth = parity.reference_logits(reference, ids)
            own = parity.relative_error(theirs, truth)
            limit = parity.FACTOR * max(own, parity.LEAST)
            errors: dict[str, float] = {
                "logits": parity.relative_error(model(ids), truth),
                "cached_decoding": parity.relative_error(parity.cached_logits(model, ids, prompt=length // 3), truth),
                "greedy_differences": parity.greedy_differences(
                    model, reference, ids[:, : length // 3], max_new_tokens=length // 2, slack=2 * limit
                ),
            }
    limits = {"logits": limit, "cached_decoding": limit, "greedy_differences": 0}
    reference_errors = {"logits": own, "cached_decoding": own}
    passed = all(value <= limits[name] for name, value in errors.items())
    about = {"model": str(folder), "model_type": model.config.model_type, "passed": passed, "factor": parity.FACTOR}
    found = {"errors": errors, "reference_errors": reference_errors, "limits": limits}
    return about | found | {"not_reached": not_compared, "versions": versions}


def _load(folder: Path) -> tt_models.Decoder:
    return load_base(folder, device=torch.device("cpu"), dtype=torch.float32)


def _save(model: tt_models.Decoder, folder: Path) -> None:
    tt_ckpt.save_hf(model, folder, config=tt_models.config_to_hf(model.config))
