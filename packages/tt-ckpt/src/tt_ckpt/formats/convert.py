"""From one format of model directory to another: one tensor at a time, read back before the result appears."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from tt_ckpt import commit
from tt_ckpt.formats.gguf.file import find_gguf, is_gguf
from tt_ckpt.formats.limits import refuse_unsaid
from tt_ckpt.formats.meta import write_meta
from tt_ckpt.formats.source import epochs_in, open_model
from tt_ckpt.formats.torchtune import write_torchtune
from tt_ckpt.hf.directory import (
    check_destination,
    check_room,
    copy_companions,
    has_tokenizer,
    new_directory,
    write_config,
)  # fmt: skip
from tt_ckpt.hf.mismatch import refuse_missing_layers
from tt_ckpt.hf.save import choose_layout, counter, write_shards
from tt_ckpt.hf.weights import EMBEDDING, Weights, cast, compare
from tt_ckpt.model_path import resolve
from tt_ckpt.safe_names import from_home
from tt_ckpt.shown import plain, quoted

Format = Literal["hf", "meta", "torchtune"]
FORMATS = ("hf", "meta", "torchtune")


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """The result of a conversion, or of its ``dry_run``. Plain data."""

    source: str
    destination: str
    source_format: str
    to: str
    model_type: str
    num_tensors: int
    num_parameters: int
    num_bytes: int
    dtypes: list[str]
    files: list[str]
    epochs: list[int]  # that a folder of torchtune has; the newest was converted
    verified: bool
    seconds: float


def convert(
    source: str | Path,
    destination: str | Path,
    to: Format = "hf",
    *,
    allow_pickle: bool = False,
    config: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: str | int = "5GB",
    num_parts: int = 1,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Write the model of ``source`` (directory, hub id or GGUF file) to ``destination`` in the format ``to``.

    Some rows of a tensor are copied at a time. Everything is read back and compared before ``destination`` appears.
    Tokenizer, template and generation files are copied; those of a GGUF file are made from it.

    ``allow_pickle``: read ``.pth``, ``.pt`` and ``.bin`` files (by a restricted unpickler; still only if you trust
    them). ``config``: a directory with the config.json or params.json that the source lacks; for a GGUF file, the
    original model, whose tokenizer is used instead. ``dtype``: cast floating-point tensors (default: unchanged;
    float32 for a GGUF file with quantized tensors). ``max_shard_size`` is for hf, ``num_parts`` (model-parallel parts)
    for meta. ``progress(done, total)`` counts bytes, each twice: written and read back.
    """
    started, target = time.monotonic(), from_home(destination)
    if to not in FORMATS:
        raise ValueError(f"to: expected one of {', '.join(FORMATS)}, got {to!r}")
    base = None if config is None else resolve(config)
    directory, weights = _open(source, allow_pickle, base)
    _check_config(weights, directory, to)
    weights = weights if dtype is None else cast(weights, dtype)
    if dry_run:
        files: list[str] = []
        check_destination(target, overwrite=overwrite)
        check_room(target, weights.nbytes)
    else:
        with new_directory(target, weights.nbytes, overwrite=overwrite) as tmp:
            advance = counter(progress, 2 * weights.nbytes) if progress else None
            origins = [] if weights.format == "gguf" else [weights.files[0].parent, directory]
            origins = list(dict.fromkeys(origins + ([base] if base else [])))
            with _of(directory):
                _write(weights, origins, tmp, to, max_shard_size=max_shard_size, num_parts=num_parts, advance=advance)
            compare(open_model(tmp, allow_pickle=True), weights, where=target, progress=advance)
            files = commit.list_files(tmp)
    return Conversion(
        source=str(directory),
        destination=str(target),
        source_format=weights.format,
        to=to,
        model_type=plain(weights.family),
        num_tensors=len(weights.specs),
        num_parameters=sum(spec.numel for spec in weights.specs.values()),
        num_bytes=weights.nbytes,
        dtypes=sorted({str(spec.dtype).removeprefix("torch.") for spec in weights.specs.values()}),
        files=files,
        epochs=[] if weights.format == "gguf" else epochs_in(directory),
        verified=not dry_run,
        seconds=round(time.monotonic() - started, 3),
    )


def _open(source: str | Path, allow_pickle: bool, base: Path | None) -> tuple[Path, Weights]:
    """The path and the weights of a model. A GGUF file is given itself, or is the only one in a directory."""
    path = from_home(source)
    file = path if is_gguf(path) else None
    if file is None:
        path = resolve(source)
        file = find_gguf(path)
    if file is None:
        with _of(base or path):
            return path, open_model(path, allow_pickle=allow_pickle, config=base)
    from tt_ckpt.formats.gguf.model import from_gguf

    return file, from_gguf(file, tokenizer=base is None or not has_tokenizer(base))


@contextmanager
def _of(directory: Path) -> Iterator[None]:
    """Add the folder to errors about a config.json."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith("config.json"):
            raise ValueError(f"{directory}/{error}") from None
        raise


def _check_config(weights: Weights, directory: Path, to: str) -> None:
    """ValueError if the config does not fit: missing layers, a resized embedding, what the format cannot express."""
    if not weights.config:
        raise ValueError(f"{directory}: no config.json; give config=DIR of the same model")
    refuse_missing_layers(directory, weights.config, {name: spec.shape for name, spec in weights.specs.items()})
    if to != "hf":
        with _of(directory):
            refuse_unsaid(weights.config, to)
    stated, embedding = weights.config.get("vocab_size"), weights.specs.get(EMBEDDING)
    if stated is not None and embedding is not None and stated != embedding.shape[0]:
        raise ValueError(
            f"{directory}: config.json: vocab_size {quoted(stated)}, but {EMBEDDING} has {embedding.shape[0]} rows; "
            f"set vocab_size to {embedding.shape[0]}, or use the weights that were saved with this config"
        )


def _write(
    weights: Weights,
    origins: list[Path],
    tmp: Path,
    to: str,
    *,
    max_shard_size: str | int,
    num_parts: int,
    advance: Callable[[int], None] | None,
) -> None:
    """Write the model into ``tmp``, with config, companions and layout from the first of ``origins`` that has them."""
    for name, text in weights.companions.items():
        commit.write_bytes(tmp / name, text.encode())
    configured = next((origin for origin in origins if (origin / "config.json").exists()), None)
    write_config(tmp / "config.json", weights.config, weights.specs, configured)
    for origin in origins:
        copy_companions(origin, tmp)
    if to == "hf":
        write_shards(weights, tmp, choose_layout(origins, weights.specs, max_shard_size), advance)
    elif to == "meta":
        write_meta(weights, tmp, num_parts=num_parts, progress=advance)
    else:
        write_torchtune(weights, tmp, progress=advance)
