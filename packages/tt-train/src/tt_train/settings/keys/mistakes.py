"""What is wrong with a config's values, said without reading any file: types, choices, bounds, conflicts."""

import dataclasses
import math
import re
import typing
from typing import Any

from tt_train.config import KDConfig, RunConfig, named_sets, to_dict
from tt_train.errors import ConfigError, did_you_mean
from tt_train.settings.keys.conflicts import conflicts
from tt_train.settings.keys.losses import loss_mistakes
from tt_train.settings.keys.schema import section_type
from tt_train.settings.keys.values import fits
from tt_train.settings.keys.wrong_type import shown, type_problem

CHOICES = {
    "model.dtype": ("bf16", "fp32"),
    "adapter.dtype": ("bf16", "fp32"),
    "adapter.init": ("kaiming", "gaussian", "pissa", "loftq"),
    "data.train_on": ("assistant", "last", "all"),
    "data.on_bad_row": ("drop", "error"),
    "data.special_tokens": ("text", "tokens"),
    "schedule.name": ("cosine", "linear", "constant", "wsd"),
    "schedule.decay": ("cosine", "linear", "1-sqrt"),
    "max_grad_norm_of": ("model", "parameter"),
    "on_nonfinite": ("stop", "skip"),
    "kd.divergence": ("forward", "reverse"),
    "kd.teacher_dtype": ("bf16", "fp32"),
    "quantization.weights": ("int4", "int8"),
    "quantization.activations": ("int8",),
}
# what other tools call these values
_ELSEWHERE = {"bfloat16": "bf16", "bfloat": "bf16", "auto": "bf16", "float32": "fp32", "float": "fp32", "full": "fp32",
              "constant_with_warmup": "constant", "cosine_with_min_lr": "cosine",
              "warmup_stable_decay": "wsd", "completion": "assistant",
              "true": "all", "input": "all", "inputs": "all"}  # fmt: skip
_STEPS = 10**9
# the least and the most that a number can be meant as; what a machine can hold is found out later
_BOUNDS: dict[str, tuple[float, float]] = {
    "batch_size": (1, 10**6), "micro_batch_size": (1, 10**6), "epochs": (1, 10**6), "max_steps": (1, _STEPS),
    "eval_every": (1, _STEPS), "early_stop_after": (1, _STEPS), "save_every": (1, _STEPS), "keep_last": (2, 10**6),
    "log_every": (1, _STEPS), "profile.first_step": (1, _STEPS), "profile.num_steps": (1, 20),
    "data.max_seq_len": (2, 2**24), "data.num_workers": (0, 256), "data.worker_timeout_s": (1e-3, 10**6),
    "data.max_dropped_share": (0, 1), "schedule.warmup_steps": (0, _STEPS), "schedule.decay_steps": (1, _STEPS),
    "schedule.num_cycles": (1e-9, 10**6), "samples.num": (0, 10**4), "samples.exact_match": (0, 10**6),
    "samples.max_new_tokens": (1, 2**20), "adapter.rank": (1, 2**16), "adapter.alpha": (-(10**6), 10**6),
    "adapter.lora_plus_ratio": (1e-9, 10**6), "optimizer.lr": (1e-30, 1000), "optimizer.weight_decay": (0, 10**6),
    "parallel.shard": (1, 2**20), "parallel.replicate": (1, 2**20),
    "optimizer.eps": (0, 1), "max_grad_norm": (1e-30, 10**30), "seed": (0, 2**64 - 1),
    "process_group_timeout_s": (1, 10**6), "loss.beta": (1e-9, 10**6), "loss.margin": (0, 10**6),
    "loss.sft_weight": (0, 10**6), "loss.desirable_weight": (0, 10**6), "loss.undesirable_weight": (0, 10**6),
    "kd.temperature": (1e-3, 1000), "kd.cross_entropy_weight": (0, 1),
    "quantization.group_size": (1, 2**20),
}  # fmt: skip
_BELOW_ONE = ("loss.label_smoothing", "schedule.min_lr_ratio", "schedule.warmup_ratio", "schedule.decay_ratio",
              "adapter.dropout", "optimizer.momentum", "optimizer.betas")  # fmt: skip
_UNSET = {"max_steps": "epochs decide", "eval_every": "at the end only", "save_every": "after the last step only",
          "early_stop_after": "never", "schedule.warmup_steps": "by schedule.warmup_ratio",
          "schedule.decay_steps": "by schedule.decay_ratio",
          "parallel.shard": "by the method", "parallel.replicate": "by parallel.shard",
          "quantization.group_size": "a scale for each row", "max_grad_norm": "no clipping"}  # fmt: skip
_LARGEST = 3e38  # of fp32, in which the numbers of a run are computed with


def refuse_mistakes(config: RunConfig) -> None:
    """ConfigError with every line of ``mistakes``, for a config that code has made, too."""
    if found := mistakes(config):
        raise ConfigError(found)


def mistakes(config: RunConfig, size: int = 1) -> list[str]:
    """Values that cannot be meant for ``size`` processes, one line each; tt_train.job checks what needs files."""
    if wrong := _wrong_types(config, type(config), ""):
        return wrong
    plain = to_dict(config)
    found = _wrong_choices(plain)
    if infinite := _not_finite(plain):
        return found + infinite
    found += _out_of_bounds(plain)
    found += _wrong_rows(config) + _wrong_checkpointing(config.activation_checkpointing)
    found += conflicts(config) + world_mistakes(config, size) + loss_mistakes(config)
    if config.adapter is not None and config.adapter.target_modules in ("all_linear", "all", "linear"):
        found.append(f"adapter.target_modules: did you mean 'all-linear', not {config.adapter.target_modules!r}?")
    return found


def world_mistakes(config: RunConfig, size: int) -> list[str]:
    """What ``size`` processes cannot share, one line each."""
    batch, micro = config.batch_size, config.micro_batch_size
    each = micro * size
    if batch < 1 or micro < 1 or batch % each == 0:
        return []
    near = " or ".join(str(value) for value in (batch // each * each, (batch // each + 1) * each) if value)
    smaller = next((m for m in range(min(micro, 10_000), 0, -1) if batch % (m * size) == 0), None)
    other = f"; or set micro_batch_size={smaller}" if smaller else ""
    shared = f" x {size} processes" if size > 1 else ""
    return [
        f"batch_size: {batch} is not a multiple of micro_batch_size {micro}{shared}; nearest that are: {near}{other}"
    ]


def missing(config: RunConfig) -> list[str]:
    """What a run needs and the config does not say, one line each."""
    found = []
    if config.model.path is None and config.model.name is None:
        found.append("model.path: missing; give a model directory or hub id: model.path=DIR")
    if config.model.path is None and config.model.name is not None and config.model.tokenizer is None:
        found.append(
            "model.tokenizer: missing; model.name alone has random weights and no tokenizer: model.tokenizer=DIR"
        )
    if config.data.streaming and config.max_steps is None:
        found.append("max_steps: missing; data.streaming reads without knowing how many rows there are: max_steps=1000")
    if config.data.train is None:
        found.append("data.train: missing; give a file of rows: data.train=rows.jsonl")
    if isinstance(config, KDConfig) and config.kd.teacher is None:
        found.append("kd.teacher: missing; give the model to learn from, a directory or hub id: kd.teacher=DIR")
    return found


def _wrong_types(values: Any, schema: type, prefix: str) -> list[str]:
    """A line for each value that is not of its key's type, as code can give one."""
    found = []
    for name, kind in typing.get_type_hints(schema, include_extras=True).items():
        value, section = getattr(values, name), section_type(kind)
        if section is not None and dataclasses.is_dataclass(value):
            found += _wrong_types(value, section, f"{prefix}{name}.")
        elif not fits(value, kind) or (section is not None and value is not None):
            found.append(f"{prefix}{name}: {type_problem(schema, name, value)}")
    return found


def _wrong_choices(plain: dict[str, Any]) -> list[str]:
    found = []
    for key, known in CHOICES.items():
        value = _look_up(plain, key)
        if key == "model.dtype" and value in ("fp16", "float16", "half"):
            found.append("model.dtype: fp16 overflows in training (its largest number is 65,504); use bf16 or fp32")
        elif value is not None and value not in known:
            hint = did_you_mean(_ELSEWHERE.get(value, value), known)
            found.append(f"{key}: expected one of {', '.join(known)}, got {shown(value)}{hint}")
    return found


def _not_finite(value: Any, key: str = "") -> list[str]:
    """A line for each number anywhere in a config, a recipe's own keys included, that cannot be computed with."""
    if isinstance(value, dict):
        return [line for name, inner in value.items() for line in _not_finite(inner, f"{key}.{name}".lstrip("."))]
    if isinstance(value, list | tuple):
        return [line for inner in value for line in _not_finite(inner, key)]
    if isinstance(value, float) and not math.isfinite(value):
        return [f"{key}: must be a finite number, got {value}; write a decimal number such as 0.1"]
    if isinstance(value, int | float) and abs(value) > _LARGEST:
        return [f"{key}: must be a number that fp32 can hold, up to 3e38, got {shown(value)}"]
    return []


def _out_of_bounds(plain: dict[str, Any]) -> list[str]:
    found = []
    for key, (least, most) in _BOUNDS.items():
        value = _look_up(plain, key)
        if value is None or least <= value <= most:
            continue
        if least in (1e-3, 1e-9, 1e-30) and value < least:
            bound = "positive" if value <= 0 else f"at least {least:g}"
        else:
            bound = f"at least {least:,}" if value < least else f"at most {most:,.16g}"
        if key == "seed" and value > most:
            bound = "below 2^64, torch's range"
        unset = f"; null: {_UNSET[key]}" if key in _UNSET else ""
        unset = "; null means what -1 means elsewhere" if key == "max_steps" and value == -1 else unset
        found.append(f"{key}: must be {bound}, got {shown(value)}{unset}")
    for name, rank in (_look_up(plain, "adapter.rank_pattern") or {}).items():
        least, most = _BOUNDS["adapter.rank"]
        if not least <= rank <= most:
            found.append(f"adapter.rank_pattern.{name}: must be at least {least} and at most {most:,}, got {rank}")
    for key in _BELOW_ONE:
        value = _look_up(plain, key)
        for share in value if isinstance(value, list) else [] if value is None else [value]:
            if not 0 <= share < 1:
                found.append(f"{key}: must be at least 0 and below 1, got {share}")
    return found


def _look_up(plain: dict[str, Any], key: str) -> Any:
    section, dot, name = key.partition(".")
    return (plain.get(section) or {}).get(name) if dot else plain.get(section)


def _wrong_rows(config: RunConfig) -> list[str]:
    found = []
    for key, sources in (("data.train", config.data.train), ("data.eval", config.data.eval)):
        if isinstance(sources, str | list | dict) and not sources:
            found.append(f"{key}: names no source; give a file of rows: {key}=rows.jsonl")
        if key == "data.eval" and named_sets(sources):
            found += _wrong_sets(sources)
            continue
        for name, weight in sources.items() if isinstance(sources, dict) else ():
            if not isinstance(weight, int | float) or isinstance(weight, bool) or not weight > 0:
                cure = f"; write '{name.partition(':')[0]}: 1', with a space" if ":" in name and weight is None else ""
                found.append(f"{key}: the weight of {name!r} must be a positive number, got {shown(weight)}{cure}")
    share = config.data.eval
    if re.fullmatch(r"[\d.]+ *%", str(share)):
        found.append(f"data.eval: a share is written 0.05, not {share!r}")
    elif isinstance(share, int | float) and not isinstance(share, bool) and not 0 < share < 1:
        found.append(f"data.eval: a share must be between 0 and 1, got {share}; 5 % is 0.05")
    return found


def _wrong_sets(sets: dict[str, Any]) -> list[str]:
    """Names that no figure can have, and a mapping that is neither names nor weights."""
    found = []
    for name, source in sets.items():
        if isinstance(source, int | float) and not isinstance(source, bool):
            found.append(
                f"data.eval: {name!r} has the number {shown(source)}, other names have sources; write all as "
                "{news: a.jsonl} (named sets) or all as {a.jsonl: 0.7} (one mix by weights)"
            )
        elif not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,39}", name):
            found.append(
                f"data.eval: {name!r} is not the name of a set: up to 40 letters, digits and _, such as "
                "{news: a.jsonl}; weights of a mix are numbers, as in {a.jsonl: 0.7}"
            )
        elif not isinstance(source, str | list) or not source or not all(isinstance(each, str) for each in source):
            found.append(f"data.eval.{name}: expected a source, such as a file or a list of files, got {shown(source)}")
    return found


def _wrong_checkpointing(value: Any) -> list[str]:
    if isinstance(value, bool) or value in ("full", "selective") or (isinstance(value, int) and value >= 1):
        return []
    known = "false, true, full, selective, or n for every n-th block"
    return [f"activation_checkpointing: expected one of {known}; got {shown(value)}"]
