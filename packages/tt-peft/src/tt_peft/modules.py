"""Which modules a list of names, or an expression, means: read as PEFT reads them."""

import difflib
import re
from collections.abc import Iterable, Sequence

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from tt_peft.expressions import matches
from tt_peft.lora import LoRAEmbedding, LoRALinear
from tt_peft.lowrank import AdapterModule
from tt_peft.names import known, named
from tt_peft.nf4_linear import NF4Linear
from tt_peft.shown import shown
from tt_peft.switch import clean_name, unwrapped

_EXPRESSION = re.compile(r"[*+?\[\](){}|^$\\]")
_LONGEST_NAME = 200  # characters that are compared to find what may have been meant


def select(targets: Sequence[str] | str, names: Sequence[str], *, what: str) -> list[str]:
    """Those of ``names`` that ``targets`` mean, in the order of ``names``.

    A string is an expression for whole names (as in PEFT) or, if it matches none, a name. A list contains names only. A
    target that means nothing is a ValueError.
    """
    if isinstance(targets, str):
        chosen = full_matches(targets, names)
        if chosen:
            return chosen
    given = (targets,) if isinstance(targets, str) else targets
    meant = set(known(given, names))
    unknown = next((target for target in given if target not in meant), None)
    if unknown is not None:
        raise ValueError(f"{what}: {shown(unknown)} matches no module{_hint(targets, unknown, names)}")
    return named(given, names)


def full_matches(expression: str, names: Iterable[str]) -> list[str]:
    """The names that ``expression`` matches as a whole."""
    names = list(names)
    return [names[place] for place in matches([expression], names)[0]]


def _hint(targets: Sequence[str] | str, target: str, names: Sequence[str]) -> str:
    """What may have been meant by a target that means nothing."""
    if not _EXPRESSION.search(target):
        return nearest(target, names)
    if not isinstance(targets, str):
        return f": a list contains names; write an expression as one text for whole names{nearest(target, names)}"
    ending = rf".*\.({target})"
    if full_matches(ending, names):
        return f"; write {shown(ending)}: it must match a whole name"
    return nearest(target, names)


def nearest(target: str, names: Iterable[str], *, limit: int = 12) -> str:
    """The tail of an error message: the closest of the names, or of their last parts, and what there is."""
    names, target = list(names), target[:_LONGEST_NAME]
    leaves = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
    found = (difflib.get_close_matches(target, among, n=1, cutoff=0.5) for among in (leaves, names))
    close = next(filter(None, found), [])
    listed = ", ".join(leaves[:limit]) + (", ..." if len(leaves) > limit else "")
    return (f"; did you mean {close[0]!r}?" if close else "") + f" (there are: {listed or 'none'})"


def is_linear(module: nn.Module) -> bool:
    """A linear layer that computes what torch's does, or one of ours.

    Not the output projection of ``nn.MultiheadAttention``, which is never called: an adapter there would do nothing.
    """
    if isinstance(module, LoRALinear | NF4Linear):
        return True
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return plain and not isinstance(module, NonDynamicallyQuantizableLinear)


def check_plain_weight(name: str, module: nn.Module) -> None:
    """ValueError if a weight or bias is computed from others (parametrizations, weight norm, pruning).

    The class of the layer, which computes it, would be changed.
    """
    for part in ("weight",) if isinstance(module, nn.Embedding) else ("weight", "bias"):
        if part not in module._parameters:
            kinds = [type(p).__name__ for p in getattr(getattr(module, "parametrizations", None), part, ())]
            how = ", ".join(kinds) or "a hook"
            raise ValueError(
                f"{name}.{part} is computed by {how}: an adapter needs a plain {part}; use "
                "torch.nn.utils.parametrize.remove_parametrizations (or what removes the hook) first, or leave it out "
                "by exclude_modules"
            )


def is_embedding(module: nn.Module) -> bool:
    """An embedding that computes what torch's does (some models' scale what they look up), or ours."""
    plain = isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward
    return plain or isinstance(module, LoRAEmbedding)


def own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules but the root and what adapters added, by name; those of a wrapped model are inside it."""
    added = {id(part) for m in model.modules() if isinstance(m, AdapterModule) for part in m.adapters.modules()}
    named = ((clean_name(name), module) for name, module in unwrapped(model).named_modules())
    return {name: module for name, module in named if name and id(module) not in added}


def all_modules(model: nn.Module) -> dict[str, nn.Module]:
    """``own_modules``, and the root under the empty name."""
    return {"": unwrapped(model), **own_modules(model)}


def select_modules(model: nn.Module, targets: Sequence[str] | str, *, what: str) -> list[str]:
    """Names of the modules that ``targets`` mean; ``"all-linear"``: all but the output projection and routers."""
    modules = own_modules(model)
    if targets != "all-linear":
        names = [targets] if isinstance(targets, str) else targets
        head = next((name for name in names if name.rpartition(".")[2] == "lm_head"), None)
        if head is not None and not known([head], modules) and (tied := tied_embedding(model)) is not None:
            raise ValueError(f"{what}: {head!r} matches no module: {untie(tied)}")
        return select(targets, list(modules), what=what)
    left_out = {*output_projection_names(model), *router_names(model)}
    chosen = [name for name, module in modules.items() if is_linear(module) and name not in left_out]
    if not chosen:
        raise ValueError(f"{what}: the model has no linear layer for 'all-linear'")
    return chosen


def output_projection_names(model: nn.Module) -> list[str]:
    """Names of the output projection: ``lm_head``, or what ``get_output_embeddings()`` gives."""
    getter = getattr(unwrapped(model), "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return [n for n, m in own_modules(model).items() if n.rsplit(".", 1)[-1] == "lm_head" or m is head]


def tied_embedding(model: nn.Module) -> str | None:
    """The name of the embedding that shares its weight with the output projection; None if there is none."""
    modules, heads = own_modules(model), output_projection_names(model)
    flagged = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    for name, module in modules.items():
        if isinstance(module, nn.Embedding):
            shared = any(getattr(modules[head], "weight", None) is module.weight for head in heads)
            if shared or (flagged and not heads):
                return name
    return None


def untie(tied: str) -> str:
    """The end of an error message: the output projection is tied, and how to untie it."""
    return (
        f"the model ties its output projection to {tied} (tie_word_embeddings): give the base a separate one "
        f"(tie_word_embeddings=false in config.json, a copy of {tied}.weight as lm_head.weight in the weights)"
    )


def router_names(model: nn.Module) -> list[str]:
    """Names of the layers that choose experts: ``gate`` or ``router`` beside ``experts``."""
    parents = {n: m for n, m in all_modules(model).items() if isinstance(getattr(m, "experts", None), nn.Module)}
    names = [(n, local) for n, m in parents.items() for local in ("gate", "router") if hasattr(m, local)]
    return [f"{n}.{local}" if n else local for n, local in names]
