"""``adapter_config.json`` of PEFT, from and to :class:`LoRAConfig`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tt_peft.config import LoRAConfig
from tt_peft.targets import first_match

# Keys that need no support while they hold one of these values; with any other value they change what is computed.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "layer_replication": (None,),
    "lora_bias": (False,),
    "trainable_token_indices": (None,),
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
    "alora_invocation_tokens auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config "
    "inference_mode init_lora_weights layers_pattern loftq_config lora_ga_config megatron_core peft_type peft_version "
    "qalora_group_size revision runtime_config task_type".split()
)
_READ = frozenset(
    "r lora_alpha lora_dropout target_modules exclude_modules modules_to_save layers_to_transform rank_pattern "
    "alpha_pattern use_rslora use_dora target_parameters".split()
)


def config_to_peft(
    config: LoRAConfig, names: Sequence[str], all_names: Sequence[str], base_model: str | None
) -> dict[str, Any]:
    """The JSON object for an adapter on the modules ``names`` of a model with the modules ``all_names``."""
    return {
        "alpha_pattern": _by_name(
            names, {n: first_match(config.alpha_pattern, n, config.alpha) for n in names}, config.alpha
        ),
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
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": config.rank,
        "rank_pattern": _by_name(
            names, {n: first_match(config.rank_pattern, n, config.rank) for n in names}, config.rank
        ),
        "revision": None,
        "target_modules": compact_names(names, all_names),
        "task_type": "CAUSAL_LM",
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
    }


def _by_name(names: Sequence[str], values: dict[str, Any], default: Any) -> dict[str, Any]:
    """Only where a module differs; full names, with dots escaped since PEFT reads the keys as expressions."""
    return {n.replace(".", r"\."): values[n] for n in names if values[n] != default}


def compact_names(names: Sequence[str], all_names: Sequence[str]) -> list[str]:
    """The last parts of ``names`` where these mean the same modules, else ``names`` themselves."""
    leaves = sorted({n.rsplit(".", 1)[-1] for n in names})
    meant = {n for n in all_names if n.rsplit(".", 1)[-1] in leaves}
    return leaves if meant == set(names) else sorted(names)


def config_from_peft(settings: dict[str, Any], file: Path) -> LoRAConfig:
    """Read PEFT's JSON object; whatever we do not compute is a ValueError that names it."""
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{file}: peft_type is {kind!r}; only 'LORA' is supported")
    for key, accepted in _NEUTRAL.items():
        if key in settings and settings[key] not in accepted:
            raise ValueError(f"{file}: {key}={settings[key]!r} is not supported (only {accepted[0]!r})")
    for key in settings.keys() - _NEUTRAL.keys() - _IGNORED - _READ:
        if settings[key]:
            raise ValueError(f"{file}: {key}={settings[key]!r} is not known to tt_peft and may change the result")
    targets = settings.get("target_modules") or ()
    try:
        return LoRAConfig(
            rank=settings.get("r", 8),
            alpha=settings.get("lora_alpha", 8),
            dropout=settings.get("lora_dropout", 0.0),
            target_modules=targets
            if targets == "all-linear"
            else (targets,)
            if isinstance(targets, str)
            else tuple(targets),
            exclude_modules=settings.get("exclude_modules") or (),
            target_parameters=tuple(settings.get("target_parameters") or ()),
            modules_to_save=tuple(settings.get("modules_to_save") or ()),
            layers_to_transform=settings.get("layers_to_transform"),
            rank_pattern=settings.get("rank_pattern") or {},
            alpha_pattern=settings.get("alpha_pattern") or {},
            use_rslora=settings.get("use_rslora", False),
            use_dora=settings.get("use_dora", False),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from None
