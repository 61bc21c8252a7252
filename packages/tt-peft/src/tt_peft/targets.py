"""Which modules a list of names and expressions means."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from torch import nn

V = TypeVar("V")

_EXPRESSION = re.compile(r"[*+?\[\](){}|^$\\]")


def matches(target: str, name: str) -> bool:
    """Whether ``target``, a name or an expression, means the dotted ``name`` or its last whole parts."""
    if _EXPRESSION.search(target):
        return re.fullmatch(rf"(?:.*\.)?(?:{target})", name) is not None
    return name == target or name.endswith("." + target)


def check_expression(target: str) -> None:
    try:
        re.compile(target if _EXPRESSION.search(target) else re.escape(target))
    except re.error as error:
        raise ValueError(f"{target!r} is not a valid regular expression: {error}") from None


def select(targets: Sequence[str], names: Sequence[str], *, what: str) -> list[str]:
    """Those of ``names`` that ``targets`` mean, in the order of ``names``. A target that means none is a ValueError."""
    for target in targets:
        check_expression(target)
        if not any(matches(target, name) for name in names):
            raise ValueError(f"{what}: {target!r} matches no module{nearest(target, names)}")
    return [name for name in names if any(matches(target, name) for target in targets)]


def nearest(target: str, names: Iterable[str], *, limit: int = 12) -> str:
    """The tail of an error message: the closest of the names, or of their last parts, and what there is."""
    names = list(names)
    leaves = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
    close = difflib.get_close_matches(target, leaves, n=1, cutoff=0.5) or difflib.get_close_matches(
        target, names, n=1, cutoff=0.5
    )
    listed = ", ".join(leaves[:limit]) + (", ..." if len(leaves) > limit else "")
    return (f"; did you mean {close[0]!r}?" if close else "") + f" (there are: {listed or 'none'})"


def first_match(patterns: Mapping[str, V], name: str, default: V) -> V:
    """The value of the first pattern that means ``name``."""
    return next((value for pattern, value in patterns.items() if matches(pattern, name)), default)


def plain_linear(module: nn.Module) -> bool:
    """A linear layer whose forward is torch's own; a subclass that computes something else cannot be adapted."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def output_projection_names(model: nn.Module) -> list[str]:
    """Names of the output projection: ``lm_head``, or what ``get_output_embeddings()`` gives."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return [
        n for n, m in model.named_modules() if n.rsplit(".", 1)[-1] == "lm_head" or (head is not None and m is head)
    ]


def in_layers(name: str, layers: Sequence[int] | None) -> bool:
    """Whether the first number in a dotted name is one of ``layers`` (None: all)."""
    if layers is None:
        return True
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return number is not None and int(number.group(1)) in layers
