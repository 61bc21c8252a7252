"""A config, a model and weights that do not fit each other: what is wrong, in one line with the cause."""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from tt_ckpt.shown import counted, plain, quoted

_SHOWN = 3
_ONE = "use the weights and the config.json of one model"
_SAVED = "use the config.json that was saved with these weights"
Shapes = Mapping[str, tuple[int, ...]]
WRAPPERS = ("_orig_mod.", "module.", "_fsdp_wrapped_module.", "base_model.model.")  # torch.compile, DDP, FSDP, peft
# which config field gives which dimension of which weight
_FIELDS = (
    ("embed_tokens.weight", 0, "vocab_size", "embedding rows"),
    ("lm_head.weight", 0, "vocab_size", "output rows"),
    ("embed_tokens.weight", 1, "hidden_size", "embedding width"),
    ("norm.weight", 0, "hidden_size", "norm width"),
    ("gate_proj.weight", 0, "intermediate_size", "gate_proj rows"),
    ("up_proj.weight", 0, "intermediate_size", "up_proj rows"),
)


def refuse_quantized(directory: Path, config: Mapping[str, Any]) -> None:
    settings = config.get("quantization_config") or config.get("quantization")  # the second is MLX's
    if settings and not (isinstance(settings, dict) and _is_unused(settings)):
        unnamed = "MLX" if "quantization" in config else "unknown"
        method = settings.get("quant_method", unnamed) if isinstance(settings, dict) else settings
        raise ValueError(
            f"{directory / 'config.json'}: quantization_config: {plain(method)}; only unquantized weights can be "
            "loaded: use the original model (and quantize_base for QLoRA)"
        )


def _is_unused(settings: Mapping[str, Any]) -> bool:
    """Whether bitsandbytes is configured with both of its ways off, as some tools leave it behind."""
    bits = [settings.get(name) for name in ("load_in_4bit", "load_in_8bit")]
    return settings.get("quant_method") in (None, "bitsandbytes") and bits == [False, False]


def describe_mismatch(
    directory: Path,
    model: nn.Module,
    missing: list[str],
    unexpected: list[str],
    shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]],
) -> str:
    """One line: how many tensors are missing, unexpected or of another shape, which ones, and why if that is clear."""
    parts = []
    if missing:
        parts.append(f"{counted(len(missing), 'tensor')} missing ({_grouped(missing)})")
    if unexpected:
        parts.append(f"{len(unexpected)} unexpected ({_grouped(unexpected)})")
    if shapes:
        first = shapes[:_SHOWN]
        shown = ", ".join(f"{key}: the model has {list(ours)}, the file {list(theirs)}" for key, ours, theirs in first)
        parts.append(f"{len(shapes)} of another shape ({shown}{', ...' if len(shapes) > _SHOWN else ''})")
    cause = _cause(directory, model, missing, unexpected, shapes)
    return f"{directory}: the weights do not fit the model: {'; '.join(parts)}; {cause or _ONE}"


def describe_tie(where: Path, kept: str, other: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> str:
    """One line: two tensors that should be one, their sizes, and the cure."""
    sizes = f"{list(shapes[0])} and {list(shapes[1])}" if shapes[0] != shapes[1] else f"both {list(shapes[0])}"
    cure = "if both were trained, set tie_word_embeddings to false in config.json"
    if shapes[0] != shapes[1]:
        cure += "; if the vocabulary was resized, save the model again so that both are"
    return f"{where}: {kept} and {other} differ ({sizes}), but the model ties them: {cure}"


def _grouped(keys: Iterable[str]) -> str:
    """``layers.1.*: 9 tensors`` for the tensors of a layer, ``layers.*.x`` for one of each layer, else the name."""
    parts = {key: re.fullmatch(r"(.*?\blayers)\.(\d+)\.(.*)", key) for key in keys}
    few = len({match[3] for match in parts.values() if match}) < _SHOWN
    groups: dict[str, list[str]] = {}
    for key, match in parts.items():
        name = key if match is None else f"{match[1]}.*.{match[3]}" if few else f"{match[1]}.{match[2]}.*"
        groups.setdefault(name, []).append(key)
    words = [held[0] if len(held) == 1 else f"{name}: {len(held)} tensors" for name, held in groups.items()]
    return ", ".join(words[:_SHOWN]) + (f" and {len(words) - _SHOWN} more groups" if len(words) > _SHOWN else "")


def _cause(
    directory: Path,
    model: nn.Module,
    missing: list[str],
    unexpected: list[str],
    shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]],
) -> str:
    config = getattr(model, "config", None)
    if shapes:
        return "; ".join(dict.fromkeys(filter(None, (_shape_cause(config, *shape) for shape in shapes))))
    if missing and unexpected:
        for prefix in (*WRAPPERS, "model.", "transformer.", "language_model.", "model.language_model."):
            longer, shorter = {prefix + key for key in unexpected}, {prefix + key for key in missing}
            if prefix in WRAPPERS and all(key.startswith(prefix) for key in unexpected):
                wrapper = f"all names begin with {prefix!r}, from a wrapper that was saved with the model"
                return f"{wrapper}: tt convert {directory} DEST"
            if longer & set(missing) or shorter & set(unexpected):
                return f"names differ by the prefix {prefix!r}: saved from another class of model"
        close = difflib.get_close_matches(missing[0], unexpected, 1, 0.8)
        return f"is {close[0]} meant to be {missing[0]}?" if close else ""
    ours, extra = _layers(missing), _layers(unexpected)
    layers = getattr(config, "num_hidden_layers", None)
    if layers is not None and not extra and min(ours, default=0) > 0 and ours == {*range(min(ours), layers)}:
        return f"config.num_hidden_layers={layers}, the files contain {min(ours)} whole layers"
    if layers is not None and extra and min(extra) >= layers and not ours:
        return f"config.num_hidden_layers={layers}, the files contain {max(extra) + 1}"
    if missing == ["lm_head.weight"]:
        return "is tie_word_embeddings meant to be true? If the output is the embedding, set it in config.json"
    return ""


def _layers(keys: list[str]) -> set[int]:
    return {int(match[1]) for key in keys if (match := re.search(r"\blayers\.(\d+)\.", key))}


def _resized(config: Any, name: str, size: int) -> str:
    """The cure if the vocabulary was resized in the weights or in the config only."""
    if name != "vocab_size":
        return ""
    tied = ", which lm_head shares (tie_word_embeddings)" if getattr(config, "tie_word_embeddings", False) else ""
    return f"{tied}: set vocab_size to {size} in config.json, or use the weights that were saved with this config"


def _shape_cause(config: Any, key: str, ours: tuple[int, ...], theirs: tuple[int, ...]) -> str:
    if len(ours) != len(theirs):
        return ""
    for suffix, dim, name, what in _FIELDS:
        if key.endswith(suffix) and ours[dim] != theirs[dim] and getattr(config, name, None) == ours[dim]:
            return f"config.{name}={ours[dim]} vs {what} {theirs[dim]}{_resized(config, name, theirs[dim])}"
    heads, kv_heads = getattr(config, "num_attention_heads", 0), getattr(config, "num_key_value_heads", 0)
    for projections, name, count in (
        (("q_proj.weight",), "num_attention_heads", heads),
        (("k_proj.weight", "v_proj.weight"), "num_key_value_heads", kv_heads),
    ):
        if key.endswith(projections) and count and ours[0] % count == 0:
            width = ours[0] // count
            if ours[0] != theirs[0] and theirs[0] % width == 0:
                return f"config.{name}={count} vs {theirs[0] // width} in the file, at {width} per head"
    return ""


# ---- sizes that a config states, compared with the weights before anything of such a size is allocated ---------------


def num_layers(shapes: Shapes) -> int:
    """One more than the highest layer number in the names."""
    found = (re.search(r"\blayers\.(\d{1,9})\.", name) for name in shapes)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def _num_experts(shapes: Shapes) -> int:
    apart = [int(match[1]) for name in shapes if (match := re.search(r"\.experts\.(\d{1,9})\.", name))]
    stacked = [shape[0] for name, shape in shapes.items() if ".experts." in name and len(shape) == 3]
    return max([1 + number for number in apart] + stacked, default=0)


def _rows(*endings: str) -> Callable[[Shapes], int]:
    return lambda shapes: max((s[0] for name, s in shapes.items() if name.endswith(endings) and len(s) == 2), default=0)


def _width(shapes: Shapes) -> int:
    return max((s[1] for name, s in shapes.items() if name.endswith("embed_tokens.weight") and len(s) == 2), default=0)


# key -> a size larger than in any published model, how to count it in the weights, and what it counts
SIZES = {
    "num_hidden_layers": (512, num_layers, "layers"),
    "vocab_size": (1 << 21, _rows("embed_tokens.weight"), "embedding rows"),
    "hidden_size": (1 << 16, _width, "numbers in an embedding"),
    "intermediate_size": (1 << 19, _rows("up_proj.weight", ".w1.weight"), "rows in up_proj"),
    "moe_intermediate_size": (1 << 19, _rows("up_proj.weight", ".w1.weight"), "rows in up_proj"),
    "num_attention_heads": (1 << 12, _rows("q_proj.weight", "qkv_proj.weight"), "rows in q_proj"),
    "num_key_value_heads": (1 << 12, _rows("k_proj.weight", "qkv_proj.weight"), "rows in k_proj"),
    "head_dim": (1 << 13, _rows("q_proj.weight", "qkv_proj.weight"), "rows in q_proj"),
    "num_local_experts": (1 << 12, _num_experts, "experts"),
    "num_experts": (1 << 12, _num_experts, "experts"),
}


def refuse_far(file: Path, config: Mapping[str, Any], shapes: Shapes) -> None:
    """ValueError for the first size in the config that no published model has, and that the weights do not have."""
    for key, (limit, count, what) in SIZES.items():
        stated = config.get(key)
        if type(stated) is int and stated > limit and 0 < (found := count(shapes)) < stated:
            raise ValueError(f"{file}: {key} {quoted(stated)}, but the weights have {found} {what}; {_SAVED}")


def refuse_missing_layers(file: Path, config: Mapping[str, Any], shapes: Shapes) -> None:
    """ValueError if the config states more layers than the weights have."""
    stated, found = config.get("num_hidden_layers"), num_layers(shapes)
    if type(stated) is int and 0 < found < stated:
        raise ValueError(f"{file}: num_hidden_layers {quoted(stated)}, but the weights have {found} layers; {_SAVED}")
