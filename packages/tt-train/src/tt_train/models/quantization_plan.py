"""What ``tt quantize`` is asked for, and which layers that means; beside it, so that both can be read at once."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

import tt_models
from tt_ckpt.shown import listed, plain, quoted
from tt_peft.modules import output_projection_names, router_names
from tt_train.config import QuantizationSection
from tt_train.errors import ConfigError
from tt_train.models.origin import Origin
from tt_train.quantized.formats import FORMATS, GROUP_SIZES, find_format


@dataclass(frozen=True, kw_only=True)
class Asked:
    """``as_trained``: the rounding of a ``qat`` run; then a ``group_size`` of None is a scale for each row."""

    format: str
    group_size: int | None = None
    as_trained: bool = False


@dataclass(frozen=True, kw_only=True)
class Plan(Asked):
    """What is done to which layers. ``skipped``: name -> why."""

    layers: list[str]
    skipped: dict[str, str]

    def __str__(self) -> str:
        group = f", groups of {self.group_size}" if self.group_size is not None else ""
        said = f"{self.format}{group}: {len(self.layers)} linear layers"
        for why, count in Counter(self.skipped.values()).items():
            names = [name for name, reason in self.skipped.items() if reason == why]
            said += f"; {count} left as {'it is' if count == 1 else 'they are'} ({listed(names, 3)}: {why})"
        return said


def trained_for(origin: Origin) -> QuantizationSection | None:
    """The rounding that a ``qat`` run was trained with, from the record of its config."""
    found = {} if origin.run is None else origin.run.section("quantization")
    if not found:
        return None
    words: dict[str, Any] = {key: found.get(key) for key in ("weights", "group_size", "activations")}
    section = QuantizationSection(**words)
    sizes = section.group_size is None or (type(section.group_size) is int and 0 < section.group_size < 1 << 20)
    if section.weights not in ("int4", "int8") or section.activations not in (None, "int8") or not sizes:
        assert origin.run is not None
        manifest = plain(origin.run.path / "manifest.json")
        raise ConfigError([f"{manifest}: config.quantization: not as a run writes it ({quoted(found)})"])
    return section


def chosen(
    to: str | None, group_size: int | None, trained: QuantizationSection | None, say: Callable[[str], None]
) -> Asked:
    """What the words mean for this run."""
    if to is None and trained is None:
        raise ConfigError([f"--to: which format? known: {', '.join(FORMATS)} (tt quantize --list)"])
    exact = None if trained is None else _trained_format(trained)
    name = find_format(to).name if to is not None else str(exact)
    if group_size is not None and not FORMATS[name].grouped:
        grouped = ", ".join(found.name for found in FORMATS.values() if found.grouped)
        raise ConfigError([f"--group-size: {name} has a scale for each row; formats with groups: {grouped}"])
    if name == "int4" and group_size not in (None, 256, *GROUP_SIZES):
        raise ConfigError([f"--group-size {group_size}: int4 has kernels for 32, 64, 128 and 256"])
    if trained is None or exact is None:
        return Asked(format=name, group_size=group_size)
    same_values = {exact, "int4-unpacked"} if exact == "int4" else {exact}
    if name in same_values and group_size in (None, trained.group_size):
        return Asked(format=name, group_size=trained.group_size, as_trained=True)
    groups = "" if trained.group_size is None else f" in groups of {trained.group_size}"
    say(f"the run was trained for {exact}{groups}, not for {name}: expect less accuracy than in training")
    return Asked(format=name, group_size=group_size)


def _trained_format(trained: QuantizationSection) -> str:
    """The format with the values of a ``qat`` run; two in a byte if torch has kernels for its groups."""
    if trained.activations is not None:
        return "int8-dynamic-int4" if trained.weights == "int4" else "int8-dynamic-grouped"
    if trained.weights == "int8":
        return "int8-grouped"
    return "int4" if trained.group_size in (256, *GROUP_SIZES) else "int4-unpacked"


def plan_of(model: tt_models.Decoder, asked: Asked) -> Plan:
    """Which linear layers of ``model``, which may be on the meta device, are quantized, and which are not and why."""
    name, group_size = asked.format, asked.group_size
    layers = {key: layer for key, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    heads, routers = set(output_projection_names(model)), set(router_names(model))
    skipped = dict.fromkeys(sorted(heads), "the output projection, which other programs read unquantized")
    if model.config.tie_word_embeddings:
        skipped = {"lm_head": "tied to the embedding"}
    skipped |= dict.fromkeys(sorted(routers & layers.keys()), "chooses experts")
    skipped |= {
        key: "stacked experts, which are not linear layers" for key, one in model.named_parameters() if one.dim() > 2
    }
    left = {key: layer for key, layer in layers.items() if key not in skipped}
    if FORMATS[name].grouped and group_size is None and not asked.as_trained:
        group_size = _fitting(left)
    for key, layer in left.items():
        if group_size is not None and layer.in_features % group_size:
            skipped[key] = f"{layer.in_features} inputs, not a multiple of {group_size}"
        elif name == "int4" and layer.out_features % 16:
            skipped[key] = f"{layer.out_features} outputs, not a multiple of 16"
    chosen = [key for key in left if key not in skipped]
    if not chosen:
        fitting = f" (--group-size {_fitting(left)} may)" if group_size is not None else ""
        raise ConfigError([f"--to {name}: fits none of the {len(left)} linear layers{fitting}"])
    return Plan(format=name, group_size=group_size, as_trained=asked.as_trained, layers=chosen, skipped=skipped)


def _fitting(layers: Mapping[str, nn.Linear]) -> int:
    """The largest usual group size that divides the inputs of the most layers."""
    return max(GROUP_SIZES, key=lambda size: (sum(layer.in_features % size == 0 for layer in layers.values()), size))
