"""A checkpoint as it was found: checked before any of it is used, since anybody may have written it, and read in parts.

Beside ``checkpoints``, so that what an attacker may have written is read in one small file.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

import tt_ckpt
from tt_ckpt.ranks import is_dtensor
from tt_ckpt.shown import plain, quoted
from tt_ckpt.train.tensor_groups import Group
from tt_train.errors import ConfigError
from tt_train.records.run_files import number

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
        "token_stream": isinstance(state.get("token_stream"), str | None),
        "best": best is None or (isinstance(best, dict) and _is_best(best)),
        "row": row is None or (isinstance(row, dict) and all(map(_is_figure, row.values()))),
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
        raise ConfigError([f"{where}: not in the checkpoint, which is of a different kind of run; {_CURE}"])
    for name, tensor in expected.items():
        if name not in found:
            raise ConfigError([f"{where}: {plain(name)} is missing; {_CURE}"])
        if found[name].shape != tensor.shape:
            shapes = f"has shape {list(found[name].shape)}, the run's {list(tensor.shape)}"
            raise ConfigError([f"{where}: {plain(name)} {shapes}; {_CURE}"])
    for name in found:
        if name not in expected:
            raise ConfigError([f"{where}: {plain(name)} is not one that the run trains; {_CURE}"])


# ---- the part of it that this rank holds ----


class HeldTensors(Mapping[str, Tensor]):
    """A group of a checkpoint, of which this rank reads what it holds: ``like(name, shape)`` says how it is spread."""

    def __init__(self, group: Group, like: Callable[[str, tuple[int, ...]], Tensor | None]) -> None:
        self.group, self.like = group, like

    def __getitem__(self, name: str) -> Tensor:
        like = self.like(name, self.group.wholes[name].shape)
        return self.group[name] if like is None else self.group.held(name, like)

    def __iter__(self) -> Iterator[str]:
        return iter(self.group)

    def __len__(self) -> int:
        return len(self.group)


def held_groups(
    saved: tt_ckpt.TrainState, weights: Mapping[str, Tensor], *, whole: Collection[str]
) -> dict[str, Mapping[str, Tensor]]:
    """The groups of a checkpoint that any number of ranks saved; this rank reads what it holds of the tensors of
    ``weights``, and of what the optimizer keeps for them. ``whole``: groups whose files may be laid out differently
    from the parameters, as those of an adapter are; their tensors are read whole."""
    spread = {name: weight for name, weight in weights.items() if is_dtensor(weight)}

    def like(key: str, shape: tuple[int, ...]) -> Tensor | None:
        weight = spread.get(key, spread.get(key.rpartition("/")[0]))
        return weight if weight is not None and tuple(weight.shape) == shape else None

    return {name: group if name in whole else HeldTensors(group, like) for name, group in saved.tensors.items()}
