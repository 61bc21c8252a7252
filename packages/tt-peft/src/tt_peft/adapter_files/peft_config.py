"""``adapter_config.json`` of PEFT, from and to :class:`LoRAConfig`."""

import difflib
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tt_peft.config import MOST_ALPHA, MOST_RANK, LoRAConfig, is_alpha
from tt_peft.lowrank import spec_of
from tt_peft.shown import listed, plain, shown

# Keys that need no support if they have one of these values; any other value changes the computation.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    **dict.fromkeys(("fan_in_fan_out", "lora_bias", "use_qalora"), (False,)),
    **dict.fromkeys(("layer_replication", "alora_invocation_tokens", "arrow_config", "use_bdlora", "kasa_config",
                     "velora_config", "monteclora_config", "megatron_config"), (None,)),
}  # fmt: skip
# Keys that only say how training began or how PEFT works; their effect is in the tensors.
_IGNORED = frozenset({
    "alora_invocation_tokens", "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "inference_mode",
    "loftq_config", "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type",
})  # fmt: skip
# Starting values that leave the base unchanged, and PiSSA, whose change of the base we can repeat.
_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "pissa")
_MERGE = "merge the adapter in PEFT (merge_and_unload) and use the result"


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


# What is read: key -> what its value must be, unless it is null or absent. Ranges are those of LoRAConfig.
_READ: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "base_model_name_or_path": ("a name or a path", lambda value: isinstance(value, str)),
    "r": (f"a whole number from 1 to {MOST_RANK}", lambda value: type(value) is int and 0 < value <= MOST_RANK),
    "lora_alpha": (f"a positive number up to {MOST_ALPHA}", is_alpha),
    "lora_dropout": ("a number from 0 to below 1", lambda value: type(value) in (int, float) and 0 <= value < 1),
    "init_lora_weights": ("true, false or a name", lambda value: isinstance(value, bool | str)),
    "target_modules": ("a list of names, or an expression", lambda value: isinstance(value, str) or _is_names(value)),
    "exclude_modules": ("a list of names, or an expression", lambda value: isinstance(value, str) or _is_names(value)),
    "modules_to_save": ("a list of names", _is_names),
    "target_parameters": ("a list of names", _is_names),
    "layers_to_transform": (
        "a whole number or a list of them",
        lambda value: type(value) is int or (isinstance(value, list) and all(type(one) is int for one in value)),
    ),
    "layers_pattern": ("a name or a list of names", lambda value: isinstance(value, str) or _is_names(value)),
    "rank_pattern": (
        f"names with whole numbers from 1 to {MOST_RANK}",
        lambda value: isinstance(value, dict) and all(type(n) is int and 0 < n <= MOST_RANK for n in value.values()),
    ),
    "alpha_pattern": (
        f"names with positive numbers up to {MOST_ALPHA}",
        lambda value: isinstance(value, dict) and all(map(is_alpha, value.values())),
    ),
    "use_rslora": ("true or false", lambda value: isinstance(value, bool)),
    "use_dora": ("true or false", lambda value: isinstance(value, bool)),
    # tt_peft.adapter_files.embeddings: they are whole layers here
    "trainable_token_indices": ("a list of token ids, or one by layer", lambda value: isinstance(value, list | dict)),
}
# fields of LoRAConfig under the same name
_SAME = frozenset({
    "exclude_modules", "modules_to_save", "target_parameters", "layers_to_transform", "layers_pattern", "rank_pattern",
    "alpha_pattern", "use_rslora", "use_dora",
})  # fmt: skip


@dataclass(frozen=True)
class Members:
    """Names of what an adapter changes, and of all modules of the base; whether that is a language model."""

    linear: list[str]
    stacked: list[str]
    saved: list[str]
    everything: list[str]
    causal_lm: bool


def config_to_peft(config: LoRAConfig, members: Members, base_model: str | None) -> dict[str, Any]:
    """The JSON object of an adapter. The names are those that were adapted, so that no pattern is read differently."""
    growth = 2 if config.init == "pissa" else 1  # the start of training is further rank in the file
    names = members.linear + members.stacked
    specs = {name: spec_of(name, config) for name in names}
    ranks = {name: spec.rank * growth for name, spec in specs.items()}
    stretch = math.sqrt(growth) if config.use_rslora else growth
    alphas = {name: spec.alpha * stretch for name, spec in specs.items()}
    settings = {
        "alpha_pattern": _exceptions(alphas, config.alpha * stretch),
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": _number(config.alpha * stretch),
        "lora_bias": False,
        "lora_dropout": config.dropout,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": _endings(members.saved, members.everything) or None,
        "peft_type": "LORA",
        "r": config.rank * growth,
        "rank_pattern": _exceptions(ranks, config.rank * growth),
        "revision": None,
        "target_modules": compact_names(members.linear, members.everything),
        "task_type": "CAUSAL_LM" if members.causal_lm else None,
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
    }
    if members.stacked:
        settings["target_parameters"] = members.stacked
    return settings


def _exceptions(values: dict[str, Any], default: Any) -> dict[str, Any]:
    """Only modules that differ, under full names: PEFT reads the keys as expressions, so dots are escaped."""
    return {name.replace(".", r"\."): _number(value) for name, value in values.items() if value != default}


def _number(value: float) -> float:
    """16 rather than 16.0: some readers of these files want whole numbers."""
    return int(value) if float(value).is_integer() else value


def compact_names(names: Sequence[str], all_names: Sequence[str]) -> list[str]:
    """The last parts of ``names`` if they mean the same modules, else ``names`` themselves."""
    if not names:
        return []
    leaves = sorted({n.rsplit(".", 1)[-1] for n in names})
    meant = {n for n in all_names if n.rsplit(".", 1)[-1] in leaves}
    return leaves if meant == set(names) else sorted(names)


def _endings(names: Sequence[str], all_names: Sequence[str]) -> list[str]:
    """For ``modules_to_save``, which PEFT reads as endings and not as whole parts."""
    leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
    meant = {name for name in all_names if name.endswith(tuple(leaves))}
    return leaves if names and meant == set(names) else sorted(names)


def config_from_peft(settings: dict[str, Any], file: Path) -> LoRAConfig:
    """Read PEFT's JSON object; a feature that we do not compute is a ValueError that names it."""
    place = plain(file)
    kind = settings.get("peft_type")
    if kind is None:
        raise ValueError(
            f"{place} has no peft_type: not an adapter that PEFT wrote "
            f"(it contains: {listed(settings, 6) or 'nothing'}); convert it to PEFT's"
        )
    if kind != "LORA":
        raise ValueError(f"{place}: peft_type is {shown(kind)}; only 'LORA' is supported; {_MERGE}")
    for key, accepted in _NEUTRAL.items():
        if key in settings and settings[key] not in accepted:
            only = f"only {json.dumps(accepted[0])}"
            raise ValueError(f"{place}: {key}={shown(settings[key])} is not supported ({only}); {_MERGE}")
    for key in sorted(settings.keys() - _NEUTRAL.keys() - _IGNORED - _READ.keys()):
        if settings[key]:
            near = difflib.get_close_matches(key[:80], [*_READ, *_NEUTRAL, *_IGNORED], 1, 0.8)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(
                f"{place}: {plain(key)}={shown(settings[key])} is not known to tt_peft{hint} and may change the "
                f"result; remove the key if it does not, else {_MERGE}"
            )
    for key, (expected, is_right) in _READ.items():
        if settings.get(key) is not None and not is_right(settings[key]):
            found = f"{shown(settings[key])}{_instead(settings[key])}"
            raise ValueError(f"{place}: {key}: expected {expected}, found {found}")
    start = settings.get("init_lora_weights", True)
    if start not in _STARTS:
        raise ValueError(
            f"{place}: init_lora_weights={shown(start)} is not supported: the adapter counts from a base that this "
            "start changed; save it in PEFT with path_initial_model_for_weight_conversion"
        )
    given = {key: value for key, value in settings.items() if value is not None}
    try:
        return LoRAConfig(
            rank=given.get("r", 8),
            alpha=given.get("lora_alpha", 8),
            dropout=given.get("lora_dropout", 0.0),
            init="pissa" if start == "pissa" else "kaiming",
            target_modules=given.get("target_modules", ()),
            **{key: given[key] for key in _SAME & given.keys()},
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from None


def _instead(value: Any) -> str:
    """The closest valid value, if only the type is wrong."""
    text = value.strip() if isinstance(value, str) else repr(value) if isinstance(value, float) else ""
    whole = re.fullmatch(r"(\d{1,9})(\.0)?", text)
    return f"; write {int(whole[1])}" if whole else "; correct it, or save the adapter again"
