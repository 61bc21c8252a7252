"""What a checkpoint says of a run, checked before any of it is used: anybody may have written it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tt_ckpt.shown import plain, quoted
from tt_train.errors import ConfigError
from tt_train.run_files import number
from tt_train.series import SERIES

_COUNTS = ("step", "tokens", "evaluations_since_best", "judged", "steps_total")
_CURE = "choose another checkpoint, or start a new run"


def check_state(path: Path, step: int, state: Any) -> None:
    """ConfigError unless ``state.json`` of the checkpoint at ``path`` holds what a run saves there."""
    file = path / "state.json"
    if not isinstance(state, dict) or "steps_total" not in state:
        raise ConfigError([f"--resume: {plain(path)} was written by another version of tt-train; {_CURE}"])
    best, row = state.get("best"), state.get("row")
    sound = {
        **{key: type(state.get(key)) is int and 0 <= state[key] < 1 << 53 for key in _COUNTS},
        "elapsed_s": (number(state.get("elapsed_s")) or 0.0) >= 0 and number(state.get("elapsed_s")) is not None,
        "data": isinstance(state.get("data"), str),
        "best": best is None or (isinstance(best, dict) and _is_best(best)),
        "row": row is None or (isinstance(row, dict) and all(_is_figure(row.get(key)) for key in SERIES)),
    }
    for key, is_sound in sound.items():
        if not is_sound:
            raise ConfigError([f"--resume: {plain(file)}: {key}: no run saves {quoted(state.get(key))}; {_CURE}"])
    if state["step"] != step:
        raise ConfigError([f"--resume: {plain(file)}: step is {state['step']}, the checkpoint's {step}; {_CURE}"])


def _is_best(best: dict[str, Any]) -> bool:
    return set(best) == {"step", "eval_loss"} and type(best["step"]) is int and number(best["eval_loss"]) is not None


def _is_figure(value: Any) -> bool:
    return value is None or number(value) is not None


def check_tensors(path: Path, group: str, found: Mapping[str, Tensor] | None, expected: Mapping[str, Tensor]) -> None:
    """ConfigError unless the tensors of a group are those of the run: the same names and shapes."""
    where = f"--resume: {plain(path)}: {group}"
    if found is None:
        raise ConfigError([f"{where}: not in the checkpoint, which is of another kind of run; {_CURE}"])
    for name, tensor in expected.items():
        if name not in found:
            raise ConfigError([f"{where}: {plain(name)} is missing; {_CURE}"])
        if found[name].shape != tensor.shape:
            shapes = f"has shape {list(found[name].shape)}, the run's {list(tensor.shape)}"
            raise ConfigError([f"{where}: {plain(name)} {shapes}; {_CURE}"])
    for name in found:
        if name not in expected:
            raise ConfigError([f"{where}: {plain(name)} is none that the run trains; {_CURE}"])
