"""What a path given to load, merge or export means: its base, adapter, tokenizer and template."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tt_ckpt
import tt_data
from tt_ckpt.shown import quoted
from tt_models.config_keys import pop_quantization
from tt_train.errors import ConfigError, closest, did_you_mean
from tt_train.records.run_files import FinishedRun, is_run, read_json

NF4, DENSE = "nf4", "dense"
LONGEST_PATH = 1000  # characters in the name of a base
Base = str | Path | Sequence[str | Path] | None


@dataclass(frozen=True, kw_only=True)
class Origin:
    """``model``: the directory with the weights, or with those of the base; None for random weights by a name.

    ``places``: where to look for the tokenizer, chat template and generation settings, nearest first.
    """

    path: Path
    run: FinishedRun | None = None
    adapter: Path | None = None
    model: Path | None = None
    places: tuple[Path, ...]
    nf4: bool = False  # whether the base computes in 4 bits
    trained_on_nf4: bool = False
    settings: dict[str, Any] = field(default_factory=dict)  # ``model:`` of a run's config

    @property
    def stopped(self) -> FinishedRun | None:
        """The run, if it has no result yet: its weights are in its newest checkpoint."""
        return self.run if self.run is not None and self.adapter is None and self.run.model is None else None

    @property
    def base_words(self) -> str | None:
        """A sentence that says how the base is loaded, if there is a choice."""
        if self.nf4 and self.trained_on_nf4:
            return f"base: 4 bits (NF4), as in training; --base {DENSE} uses the weights of its files"
        if self.nf4:
            return "base: quantized to 4 bits (NF4)"
        if self.trained_on_nf4:
            return f"base: the weights of its files; the adapter was trained on 4 bits (--base {NF4})"
        return None


def find_origin(path: str | Path, base: Base = None) -> Origin:
    """What ``path`` is: a run directory, an adapter, a model directory or a hub id.

    ``base``: the directory of the base of a run or adapter if it has moved, ``nf4`` or ``dense``, or both. The default
    is the base that the run or adapter names, in 4 bits if the run was trained so.

    Raises:
        ConfigError: the base is missing; the message names the file that refers to it.
    """
    folder = Path(path)
    moved, nf4 = _read_base(base)
    is_adapter = (folder / "adapter_config.json").is_file()
    if is_adapter and folder.name == "adapter" and is_run(folder.parent):
        folder, is_adapter = folder.parent, False
    if is_adapter:
        model = _resolve_base(folder / "adapter_config.json", "base_model_name_or_path", moved)
        return Origin(path=folder, adapter=folder, model=model, places=(folder, model), nf4=bool(nf4))
    if (run := FinishedRun.at(folder)) is not None:
        return _of_run(run, moved, nf4)
    if base is not None:
        raise ConfigError([f"--base: {path} is neither a run nor an adapter, so it has no base; leave out --base"])
    refuse_absent_run(folder)
    if (folder / "adapter_model.safetensors").is_file() and not (folder / "config.json").is_file():
        raise ConfigError([f"{path}: an adapter without adapter_config.json; save or download the adapter again"])
    model = tt_ckpt.resolve(str(path))
    if not (model / "config.json").is_file() and (inside := sorted(model.glob("*/adapter_config.json"))):
        raise ConfigError([f"{path}: neither a run nor a model, but {inside[0].parent} is an adapter; give that"])
    return Origin(path=folder, model=model, places=(model,))


def _of_run(run: FinishedRun, moved: str | None, nf4: bool | None) -> Origin:
    settings = run.section("model")
    trained_on_nf4 = bool(run.section("adapter").get("quantize_base"))
    adapter, own = run.adapter, run.model
    if adapter is None and own is not None:
        if moved is not None or nf4 is not None:
            raise ConfigError([f"--base: {run.path} trained the whole model, so it has no base; leave out --base"])
        return Origin(path=run.path, run=run, model=own, places=(run.path, own), settings=settings)
    model: Path | None = None
    if adapter is not None:
        model = _resolve_base(adapter / "adapter_config.json", "base_model_name_or_path", moved)
    elif settings.get("path"):
        model = _resolve_base(run.path / "manifest.json", "model.path", moved, settings["path"])
    tokenizer = [Path(settings["tokenizer"])] if settings.get("tokenizer") else []
    places = [run.path, *([adapter] if adapter else []), *(file for file in tokenizer if file.exists())]
    return Origin(
        path=run.path,
        run=run,
        adapter=adapter,
        model=model,
        places=(*places, *([model] if model else [])),
        nf4=trained_on_nf4 if nf4 is None else nf4,
        trained_on_nf4=trained_on_nf4,
        settings=settings,
    )


def _read_base(base: Base) -> tuple[str | None, bool | None]:
    """The directory in ``base``, and whether it says nf4 (True) or dense (False)."""
    words = [base] if isinstance(base, str | Path) else list(base or ())
    kinds = [word for word in words if word in (NF4, DENSE)]
    folders = [str(word) for word in words if word not in (NF4, DENSE)]
    if len(kinds) > 1 or len(folders) > 1:
        raise ConfigError(
            [f"--base: give at most one directory, and one of {NF4}, {DENSE}; got {', '.join(map(str, words))}"]
        )
    return (folders[0] if folders else None), (kinds[0] == NF4 if kinds else None)


def _resolve_base(file: Path, key: str, moved: str | None, named: object = None) -> Path:
    """The directory of the base: ``moved``, else what ``file`` names; of a run without an adapter, its model."""
    if moved is not None:
        run = FinishedRun.at(moved)
        return tt_ckpt.resolve(moved if run is None or run.model is None else run.model)
    named = named or read_json(file).get(key)
    if not named:
        raise ConfigError([f"{file}: names no base model ({key}); give --base DIR"])
    if not isinstance(named, str | Path) or not str(named).isprintable() or len(str(named)) > LONGEST_PATH:
        what = f"found {quoted(named)}"
        raise ConfigError([f"{file}: {key}: expected the name or path of a model, {what}; give --base DIR"])
    beside = file.parent / str(named)
    if not (Path(str(named)) / "config.json").is_file() and (beside / "config.json").is_file():
        named = beside  # relative to the adapter, not to the working directory
    try:
        run = FinishedRun.at(str(named))
        found = tt_ckpt.resolve(str(named) if run is None or run.model is None else run.model)
    except (FileNotFoundError, ValueError) as error:
        why = "which does not exist" if str(named).startswith(("/", ".", "~")) else f"which was not found ({error})"
        raise ConfigError(
            [f"{file}: names the base model {named}, {why}; if it is elsewhere, give --base DIR"]
        ) from None
    except ConnectionError as error:
        raise ConnectionError(
            f"{file}: names the base model {named}; {error}; if it is on this machine, give --base DIR"
        ) from None
    if not (found / "config.json").is_file() and not (found / "adapter_config.json").is_file():
        raise ConfigError([f"{file}: names the base model {named}, a directory without config.json; give --base DIR"])
    config = tt_ckpt.read_config(found) if (found / "config.json").is_file() else {}
    try:
        pop_quantization(config)
    except ValueError:
        raise ConfigError(
            [f"{file}: names the base model {named}, whose weights are quantized; give the model it was made from: "
             "--base DIR (with --base nf4 it computes in 4 bits)"]
        ) from None  # fmt: skip
    return found


def refuse_absent_run(path: Path, *, root: str | Path = "runs") -> None:
    """ConfigError if nothing is at ``path``, and it is beside runs, under ``root``, or called nearly like a run.

    ``run/one`` is like the run ``runs/one``, so the hub is not asked for it.
    """
    if path.exists():
        return
    in_folder, folder, home = len(path.parts) > 1, path.parent, Path(root)
    is_beside = in_folder and (folder == home or bool(_runs_in(folder)))
    is_misspelt = in_folder and not is_beside and not folder.exists() and closest(str(folder), [str(home)], cutoff=0.8)
    if in_folder and not is_beside and not is_misspelt:
        return
    runs = _runs_in(folder if is_beside else home)
    exact = next((run for run in runs if Path(run).name == str(path)), None)
    near = f"; did you mean {exact!r}?" if exact else did_you_mean(str(path), runs, cutoff=0.8 if is_misspelt else 0.6)
    if near or is_beside:
        raise ConfigError([f"{path}: no such run{near}; tt ls runs lists them"])


def _runs_in(folder: Path) -> list[str]:
    return sorted(os.path.relpath(entry) for entry in folder.iterdir() if is_run(entry)) if folder.is_dir() else []


def load_tokenizer(origin: Origin) -> tt_data.Tokenizer:
    """The tokenizer of a run, adapter or model, with the template that it was trained with."""
    template = None if origin.run is None else origin.run.template
    return tt_data.choose_template(tt_data.load_tokenizer(origin.places), template)
