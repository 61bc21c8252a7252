"""The weights of a run or model in 8 or 4 bits, as a directory that tt, transformers and vLLM load."""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tt_ckpt
import tt_models
from tt_ckpt.hf.base_tensors import base_tensors, split_sources
from tt_ckpt.hf.save import choose_layout, save_weights
from tt_ckpt.hf.weights import Weights
from tt_ckpt.safetensors_file import spec_of
from tt_ckpt.shown import format_size, listed, plain, quoted
from tt_models.limits import weight_bytes
from tt_peft.modules import output_projection_names, router_names
from tt_train.config import QuantizationSection
from tt_train.errors import ConfigError, TrainingError, shell_word
from tt_train.models.load import load_quantized, model_config
from tt_train.models.merge import MergedModel, merged_model, refuse_full, refuse_small
from tt_train.models.origin import Base, Origin, find_origin, load_tokenizer
from tt_train.models.quality import TEXT, Row, facts, measure, rows_of, same_next_token
from tt_train.quantized.formats import FORMATS, GROUP_SIZES, find_format
from tt_train.quantized.stored import QuantizedLinear, is_torchao, metadata_of, store_
from tt_train.quantized.torchao import as_dict, config_of, dense, quantized
from tt_train.quantized.trial import format_problem

REPORT, SHARD = "quantization.json", "5GB"
LONGEST_ROW = 2048  # tokens of a row that is measured


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


def quantize_run(
    path: str | Path,
    output: str | Path,
    *,
    to: str | None = None,
    group_size: int | None = None,
    dtype: torch.dtype | None = None,
    data: str | Path | None = None,
    base: Base = None,
    dry_run: bool = False,
    tell: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Write the model of a run, adapter or directory to ``output`` with quantized linear layers; returns a report.

    Adapters are merged first. What was written is read back and compared. The report is also written beside the
    weights (quantization.json): layers, sizes in bytes, signal-to-noise ratio of the weights in dB, perplexity and
    agreement of greedy answers with the model before.

    Args:
        to: the name of a format (``tt_train.quantized.formats``); of a ``qat`` run, by default what it was trained for.
        group_size: inputs that share a scale, of formats with groups; the largest of 128, 64 and 32 that fits.
        dtype: of the weights that are not quantized, and of the computation; by default that of most of the files.
        data: rows to measure with, as ``data.train`` takes them; by default a small fixed text.
        base: as in ``load``. ``dry_run``: check everything that can be checked before weights are read.

    Raises:
        ConfigError: an unknown format, one that does not run here, or a model that is quantized already.
    """
    target, say = Path(output), tell or (lambda text: None)
    refuse_full(target)
    origin = find_origin(path, base)
    asked = _chosen(to, group_size, _trained_for(origin), say)
    name = asked.format
    _refuse_quantized(origin)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if problem := format_problem(name, device):
        raise ConfigError(
            [f"--to {name}: does not run on this machine ({problem}); tt quantize --list shows what does"]
        )
    shape = None if origin.model is None else tt_models.build(model_config(origin.model), device="meta")
    rows = rows_of(data, load_tokenizer(origin), longest=LONGEST_ROW) if data is not None else None
    if shape is not None:
        plan = plan_of(shape, asked)
        refuse_small(target, weight_bytes(shape))
        say(str(plan))
    if dry_run:
        return {"path": str(target), "format": name, "dry_run": True}
    merged = merged_model(origin, dtype, tell, shape)
    model = merged.model.to(device, dtype or _most_common(merged.model)).requires_grad_(False)
    if origin.model is None:
        plan = plan_of(model, asked)
        say(str(plan))
    rows = rows or rows_of(None, merged.tokenizer, longest=min(LONGEST_ROW, model.config.max_position_embeddings))
    return _quantize_and_write(merged, plan, origin, target, rows, TEXT if data is None else str(data), say)


# ---- what is asked for -----------------------------------------------------------------------------------------------


def _trained_for(origin: Origin) -> QuantizationSection | None:
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


def _chosen(
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


def _refuse_quantized(origin: Origin) -> None:
    if origin.model is not None and is_torchao(tt_ckpt.read_config(origin.model)):
        raise ConfigError([f"{plain(origin.model)}: is quantized already; give the model that it was made from"])


def _most_common(model: nn.Module) -> torch.dtype:
    sizes: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        sizes[parameter.dtype] += parameter.numel()
    return sizes.most_common(1)[0][0]


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


# ---- doing it --------------------------------------------------------------------------------------------------------


def _quantize_and_write(
    merged: MergedModel,
    plan: Plan,
    origin: Origin,
    target: Path,
    rows: list[Row],
    source: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    model, tokenizer = merged.model, merged.tokenizer
    before, size_before = measure(model, tokenizer, rows), weight_bytes(model)
    metadata, noise = quantize_(model, plan)
    after = measure(model, tokenizer, rows)
    weights = _weights(model, {**merged.config, "quantization_config": _config(plan)})
    report = {
        "format": plan.format,
        "group_size": plan.group_size,
        "rounded_as_trained": plan.as_trained,
        "layers": len(plan.layers),
        "skipped": plan.skipped,
        "bytes_before": size_before,
        "bytes_after": weights.nbytes,
        **noise,
        **facts(before, after, source),
        "same_next_token": same_next_token(model, rows, before["answers"]),
        "device": str(model.model.embed_tokens.weight.device),
        "versions": {name: version(name) for name in ("torch", "torchao")},
    }
    files = {**merged.files, REPORT: json.dumps(report, indent=2) + "\n"}
    layout = choose_layout([], weights.specs, SHARD)
    names = [name for name in weights.specs if name.rpartition(".")[0] not in plan.layers or name.endswith(".bias")]
    every = metadata_of(metadata, names)
    layout = replace(layout, metadata=dict.fromkeys(layout.files, every))
    save_weights(weights, target.expanduser(), layout, source=origin.model, files=files)
    _check_again(model, target.expanduser(), rows)
    for line in summary(report):
        say(line)
    return {"path": str(target), "dry_run": False, **report}


@torch.no_grad()
def quantize_(model: nn.Module, plan: Plan) -> tuple[dict[str, str], dict[str, Any]]:
    """Quantize the layers of ``plan``, one at a time and in place. Returns the metadata of each weight for the files,
    and the signal-to-noise ratio of all weights and of the worst layer, in dB: ``10 log10(sum w^2 / sum (w - q)^2)``.
    """
    metadata: dict[str, str] = {}
    signal = noise = 0.0
    worst, lowest = "", math.inf
    for name in plan.layers:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        weight = layer.weight.detach()
        made = quantized(weight, plan.format, plan.group_size, symmetric=plan.as_trained)
        power = float(weight.float().square().sum())
        lost = float((weight.float() - dense(made)).square().sum())
        if not math.isfinite(lost):
            raise ConfigError(
                [f"{name}: its quantized weights are not finite; the weights are too large for the format"]
            )
        signal, noise = signal + power, noise + lost
        if (ratio := _decibels(power, lost)) < lowest:
            worst, lowest = name, ratio
        metadata[f"{name}.weight"] = store_(layer, made)
    figures = {"sqnr_db": _rounded(_decibels(signal, noise)), "worst_layer": worst, "worst_sqnr_db": _rounded(lowest)}
    return metadata, figures


def _decibels(signal: float, noise: float) -> float:
    return 10 * math.log10(signal / noise) if signal and noise else math.inf


def _rounded(ratio: float) -> float | None:
    """For JSON, which has no infinity: None if nothing was lost."""
    return round(ratio, 2) if math.isfinite(ratio) else None


def _config(plan: Plan) -> dict[str, Any]:
    """``quantization_config`` as transformers 5 and vLLM read it: exactly one key ``default``."""
    return {
        "quant_method": "torchao",
        "quant_type": {"default": as_dict(config_of(plan.format, plan.group_size))},
        "modules_to_not_convert": sorted({"lm_head", *plan.skipped}),
        "include_input_output_embeddings": False,
        "untie_embedding_weights": False,
    }


def _weights(model: nn.Module, config: Mapping[str, Any]) -> Weights:
    """The tensors for the files: those of quantized layers are their parts."""
    held: dict[str, Tensor] = {}
    for base in base_tensors(model):
        held |= split_sources(model, base.names[0], base.tensor.detach())
    specs = {name: spec_of(tensor) for name, tensor in held.items()}
    return Weights(specs=specs, get=held.__getitem__, config=dict(config), format="hf", files=())


def _check_again(model: tt_models.Decoder, folder: Path, rows: list[Row]) -> None:
    """TrainingError unless the directory, loaded as ``tt_train.load`` does it, computes the same bits."""
    device = model.model.embed_tokens.weight.device
    again = load_quantized(folder, device=device)
    ids = torch.tensor([rows[0]["input_ids"][:64]], device=device)
    with torch.no_grad():
        if not torch.equal(model(ids), again(ids)):
            raise TrainingError(f"{plain(folder)}: what was read back gives other values; please report it")
    assert any(isinstance(layer, QuantizedLinear) for layer in again.modules())


def summary(report: Mapping[str, Any]) -> list[str]:
    """What people are told of a report, a line for each figure."""
    before, after, same = report["before"], report["after"], report["greedy_agreement"]
    sizes = format_size(report["bytes_before"]), format_size(report["bytes_after"])
    lines = [
        f"size: {sizes[0]} to {sizes[1]} ({report['bytes_after'] / report['bytes_before']:.0%})",
        f"signal-to-noise ratio of the weights: {report['sqnr_db']} dB; the worst layer: {report['worst_sqnr_db']} dB "
        f"({report['worst_layer']})",
        f"perplexity: {_figure(before['perplexity'])} to {_figure(after['perplexity'])}, on {report['measured_on']}",
        f"greedy answers: {same['identical']} of {same['answers']} identical, {same['same_tokens']:.0%} of the tokens "
        f"before the first difference; the same next token after {report['same_next_token']:.1%} of the same texts",
        f"speed of greedy answers here: {before['tokens_per_s']:.1f} to {after['tokens_per_s']:.1f} tokens/s",
    ]
    if after["tokens_per_s"] < before["tokens_per_s"]:
        lines.append("on this machine the format saves memory and costs time")
    return lines


def _figure(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"


def serve_commands(folder: Path) -> list[str]:
    """What to type to use the directory."""
    path = shell_word(folder)
    return [
        f"tt generate {path} 'Hello'",
        f"vllm serve {path} --load-format safetensors --safetensors-load-strategy torchao",
    ]
