"""A small description of a base model, kept in adapter files: whose adapter this is."""

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from tt_peft.lowrank import AdapterModule
from tt_peft.switch import clean_name, unwrapped

_SAMPLES = 16  # values of one tensor
_TENSORS = 12


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Shapes of the base and a few of its values: ``{"shapes", "parameters", "tensors", "values"}``.

    ``shapes`` is a digest of all names and shapes. ``values`` samples dense tensors, rounded to bfloat16, so that the
    same base is recognised in another dtype or with other layers in NF4. The meta device and shards are not sampled.
    """
    base = base_parameters(model)
    listing = "\n".join(f"{name} {list(p.shape)}" for name, p in sorted(base.items()))
    return {
        "shapes": hashlib.sha256(listing.encode()).hexdigest(),
        "parameters": sum(p.numel() for p in base.values()),
        "tensors": len(base),
        "values": _samples(base),
    }


def base_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that belong to the base, by clean name; tied ones once."""
    model = unwrapped(model)
    added = {
        f"{prefix}.{local}" if prefix else local
        for prefix, module in model.named_modules()
        if isinstance(module, AdapterModule)
        for local in module.adapter_params()
    }
    return {clean_name(name): p for name, p in model.named_parameters() if name not in added}


def _samples(base: dict[str, Tensor]) -> dict[str, list[float]]:
    """Evenly spaced values of evenly spaced tensors; of plain local tensors only."""
    plain = [
        n for n, p in sorted(base.items()) if type(p.detach()) is Tensor and not p.is_meta and p.is_floating_point()
    ]
    chosen = plain[:: max(1, len(plain) // _TENSORS)][:_TENSORS]
    return {name: _sample(base[name]) for name in chosen}


@torch.no_grad()
def _sample(tensor: Tensor) -> list[float]:
    """Evenly spaced values, counted in whole numbers: float32 has no place above 2**24 of its own."""
    last, count = tensor.numel() - 1, min(_SAMPLES, tensor.numel())
    places = torch.tensor([i * last // max(1, count - 1) for i in range(count)], dtype=torch.long, device=tensor.device)
    chosen = tensor.detach()[torch.unravel_index(places, tensor.shape)]  # no flat copy of a transposed weight
    return [float(v) for v in chosen.reshape(-1).to(torch.bfloat16).tolist()]


def difference(saved: dict[str, Any], model: nn.Module) -> str | None:
    """What tells this model from the base that an adapter was trained on, in words; None when nothing does."""
    own, counts = fingerprint(model), [saved.get(key, 0) for key in ("parameters", "tensors")]
    if not all(type(count) is int and 0 <= count < 2**63 for count in counts):
        raise ValueError("counts must be whole numbers")
    if saved.get("shapes") != own["shapes"]:
        return (
            f"names or shapes differ (here: {own['parameters']:,} parameters in {own['tensors']} tensors; "
            f"the adapter's base: {counts[0]:,} in {counts[1]})"
        )
    base = base_parameters(model)
    outside = total = 0
    for name, values in saved.get("values", {}).items():
        tensor = base.get(name)
        if tensor is None or tensor.is_meta or type(tensor.detach()) is not Tensor:
            continue
        here = _sample(tensor)
        total += len(values)
        largest = max(map(abs, values), default=0.0)
        outside += sum(abs(a - b) > 0.01 * abs(a) + 1e-6 * largest for a, b in zip(values, here, strict=True))
    if outside > 0.05 * total:
        return f"the values of its weights differ ({outside} of {total} compared)"
    return None


def encode(saved: dict[str, Any]) -> str:
    return json.dumps(saved, separators=(",", ":"), sort_keys=True)
