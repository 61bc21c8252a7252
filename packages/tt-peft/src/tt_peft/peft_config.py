"""``adapter_config.json`` of PEFT, from and to :class:`LoRAConfig`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tt_peft.apply import spec_of
from tt_peft.config import LoRAConfig

# Keys that need no support while they hold one of these values; with any other value they change what is computed.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "layer_replication": (None,),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "use_bdlora": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "megatron_config": (None,),
}
# Keys that only say how training began or how PEFT goes about it; what they did is in the tensors.
_IGNORED = frozenset(
    {
        "alora_invocation_tokens",
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "inference_mode",
        "loftq_config",
        "lora_ga_config",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    }
)
# Starting points after which the base is what it was, and PiSSA, whose change of the base we can repeat.
_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "pissa")
_READ = frozenset(
    {
        "r",
        "lora_alpha",
        "lora_dropout",
        "init_lora_weights",
        "target_modules",
        "exclude_modules",
        "modules_to_save",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "use_dora",
        "target_parameters",
        "trainable_token_indices",  # tt_peft.embeddings: they are whole layers here
    }
)


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
    growth = 2 if config.init == "pissa" else 1  # the file holds what training started from as further rank
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
    """Only where a module differs, under full names: PEFT reads the keys as expressions, so dots are escaped."""
    return {name.replace(".", r"\."): _number(value) for name, value in values.items() if value != default}


def _number(value: float) -> float:
    """16 rather than 16.0: some readers of these files want whole numbers."""
    return int(value) if float(value).is_integer() else value


def compact_names(names: Sequence[str], all_names: Sequence[str]) -> list[str]:
    """The last parts of ``names`` where these mean the same modules, else ``names`` themselves."""
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
    """Read PEFT's JSON object; whatever we do not compute is a ValueError that names it."""
    kind = settings.get("peft_type")
    if kind is None:
        held = ", ".join(sorted(settings)[:6]) or "nothing"
        raise ValueError(
            f"{file} has no peft_type: not an adapter that PEFT wrote (it holds: {held}); convert it to PEFT's"
        )
    if kind != "LORA":
        raise ValueError(f"{file}: peft_type is {kind!r}; only 'LORA' is supported")
    for key, accepted in _NEUTRAL.items():
        if key in settings and settings[key] not in accepted:
            raise ValueError(f"{file}: {key}={settings[key]!r} is not supported (only {accepted[0]!r})")
    for key in settings.keys() - _NEUTRAL.keys() - _IGNORED - _READ:
        if settings[key]:
            raise ValueError(f"{file}: {key}={settings[key]!r} is not known to tt_peft and may change the result")
    start = settings.get("init_lora_weights", True)
    if start not in _STARTS:
        raise ValueError(
            f"{file}: init_lora_weights={start!r} is not supported: the adapter counts from a base that this start "
            "changed; save it in PEFT with path_initial_model_for_weight_conversion"
        )
    try:
        return LoRAConfig(
            rank=settings.get("r", 8),
            alpha=settings.get("lora_alpha", 8),
            dropout=settings.get("lora_dropout", 0.0),
            target_modules=settings.get("target_modules") or (),
            exclude_modules=settings.get("exclude_modules") or (),
            target_parameters=tuple(settings.get("target_parameters") or ()),
            modules_to_save=tuple(settings.get("modules_to_save") or ()),
            layers_to_transform=settings.get("layers_to_transform"),
            layers_pattern=settings.get("layers_pattern") or (),
            rank_pattern=settings.get("rank_pattern") or {},
            alpha_pattern=settings.get("alpha_pattern") or {},
            use_rslora=settings.get("use_rslora", False),
            use_dora=settings.get("use_dora", False),
            init="pissa" if start == "pissa" else "kaiming",
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from None
