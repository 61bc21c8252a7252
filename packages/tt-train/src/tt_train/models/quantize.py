"""The weights of a run or model in 8 or 4 bits, as a directory that tt, transformers and vLLM load."""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tt_ckpt
import tt_data
import tt_models
from tt_ckpt.hf.base_tensors import base_tensors, split_sources
from tt_ckpt.hf.save import choose_layout, save_weights
from tt_ckpt.hf.weights import Weights, in_pieces
from tt_ckpt.safetensors_file import spec_of
from tt_ckpt.shown import format_size, plain
from tt_models.limits import weight_bytes
from tt_train.errors import ConfigError, TrainingError, shell_word
from tt_train.models.load import load_quantized, model_config
from tt_train.models.merge import beside_model, merged_model, refuse_full, refuse_small
from tt_train.models.origin import Base, Origin, find_origin, load_tokenizer
from tt_train.models.quality import TEXT, Row, facts, measure, rows_of, same_next_token
from tt_train.models.quantization_plan import Plan, chosen, plan_of, trained_for
from tt_train.quantized.stored import QuantizedLinear, is_torchao, metadata_of, store_
from tt_train.quantized.torchao import as_dict, config_of, dense, quantized
from tt_train.quantized.trial import format_problem

REPORT, SHARD = "quantization.json", "5GB"
LONGEST_ROW = 2048  # tokens of a row that is measured


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
    target, say = refuse_full(output), tell or (lambda text: None)
    origin = find_origin(path, base)
    asked = chosen(to, group_size, trained_for(origin), say)
    name = asked.format
    _refuse_quantized(origin)
    rows = (
        rows_of(data, load_tokenizer(origin), longest=LONGEST_ROW) if data is not None else None
    )  # before torchao loads
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if problem := format_problem(name, device):
        raise ConfigError(
            [f"--to {name}: does not run on this machine ({problem}); tt quantize --list shows what does"]
        )
    shape = None if origin.model is None else tt_models.build(model_config(origin.model), device="meta")
    if shape is not None:
        plan = plan_of(shape, asked)
        refuse_small(target, weight_bytes(shape))
        say(str(plan))
    if dry_run:
        return {"path": str(target), "format": name, "dry_run": True}
    model, tokenizer = merged_model(origin, dtype, model=shape, tell=tell), load_tokenizer(origin)
    model = model.to(device, dtype or _most_common(model)).requires_grad_(False)
    if origin.model is None:
        plan = plan_of(model, asked)
        say(str(plan))
    rows = rows or rows_of(None, tokenizer, longest=min(LONGEST_ROW, model.config.max_position_embeddings))
    return _quantize_and_write(model, tokenizer, plan, origin, target, rows, TEXT if data is None else str(data), say)


def _refuse_quantized(origin: Origin) -> None:
    if origin.model is not None and is_torchao(tt_ckpt.read_config(origin.model)):
        raise ConfigError([f"{plain(origin.model)}: is quantized already; give the model that it was made from"])


def _most_common(model: nn.Module) -> torch.dtype:
    sizes: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        sizes[parameter.dtype] += parameter.numel()
    return sizes.most_common(1)[0][0]


def _quantize_and_write(
    model: tt_models.Decoder,
    tokenizer: tt_data.Tokenizer,
    plan: Plan,
    origin: Origin,
    target: Path,
    rows: list[Row],
    source: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    config, beside = beside_model(origin, tokenizer, model)
    before, size_before = measure(model, tokenizer, rows), weight_bytes(model)
    metadata, noise = quantize_(model, plan)
    after = measure(model, tokenizer, rows)
    weights = _weights(model, {**config, "quantization_config": _config(plan)})
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
    files = {**beside, REPORT: json.dumps(report, indent=2) + "\n"}
    layout = choose_layout([], weights.specs, SHARD)
    names = [name for name in weights.specs if name.rpartition(".")[0] not in plan.layers or name.endswith(".bias")]
    every = metadata_of(metadata, names)
    layout = replace(layout, metadata=dict.fromkeys(layout.files, every))
    save_weights(weights, target, layout, source=origin.model, files=files)
    _check_again(model, target, rows)
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
    return Weights(
        specs=specs, get=held.__getitem__, pieces=lambda name: in_pieces(held[name]), config=dict(config),
        format="hf", files=(),
    )  # fmt: skip


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
