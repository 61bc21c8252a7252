"""Sizes that a config.json states, held against the weights, before anything of such a size is made."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tt_ckpt.shown import quoted

Shapes = Mapping[str, tuple[int, ...]]
_TAKE = "take the config.json that was saved with these weights"


def num_layers(shapes: Shapes) -> int:
    """One more than the highest number of a layer in the names."""
    return 1 + max(
        (int(match[1]) for name in shapes if (match := re.search(r"\blayers\.(\d{1,9})\.", name))), default=-1
    )


def _num_experts(shapes: Shapes) -> int:
    apart = [int(match[1]) for name in shapes if (match := re.search(r"\.experts\.(\d{1,9})\.", name))]
    stacked = [shape[0] for name, shape in shapes.items() if ".experts." in name and len(shape) == 3]
    return max([1 + number for number in apart] + stacked, default=0)


def _rows(*endings: str) -> Callable[[Shapes], int]:
    return lambda shapes: max((s[0] for name, s in shapes.items() if name.endswith(endings) and len(s) == 2), default=0)


def _width(shapes: Shapes) -> int:
    return max((s[1] for name, s in shapes.items() if name.endswith("embed_tokens.weight") and len(s) == 2), default=0)


# key -> larger than in any published model, and what the weights have of it
_FAR = {
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


def is_far(config: Mapping[str, Any]) -> bool:
    """Whether a size is beyond those of published models, so that it is worth to read what the weights say."""
    return any(type(value := config.get(key)) is int and value > limit for key, (limit, _, _) in _FAR.items())


def refuse_far(file: Path, config: Mapping[str, Any], shapes: Shapes) -> None:
    """ValueError for the first size far beyond those of published models that the weights do not have."""
    for key, (limit, count, what) in _FAR.items():
        stated = config.get(key)
        if type(stated) is int and stated > limit and 0 < (held := count(shapes)) < stated:
            raise ValueError(f"{file}: {key} {quoted(stated)}, but the weights have {held} {what}; {_TAKE}")


def refuse_missing_layers(file: Path, config: Mapping[str, Any], shapes: Shapes) -> None:
    """ValueError if the config states more layers than the weights have."""
    stated, held = config.get("num_hidden_layers"), num_layers(shapes)
    if type(stated) is int and 0 < held < stated:
        raise ValueError(f"{file}: num_hidden_layers {quoted(stated)}, but the weights have {held} layers; {_TAKE}")
