"""One parameter from its tensors in the files: read straight into its memory where the file holds it as it will be."""

from typing import Any

import torch
from torch import Tensor, nn

from tt_ckpt.hf.dtensors import like_dtensor, local_part
from tt_ckpt.hf.parameters import Slot, join, meta
from tt_ckpt.hf.shards import OpenShards


@torch.no_grad()
def fill(
    model: nn.Module,
    tensors: OpenShards,
    slot: Slot,
    name: str,
    keys: list[str],
    *,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    copy: bool,
) -> tuple[torch.dtype, Tensor]:
    """Fill ``slot``; returns the dtype in the files, and what the slot holds now (or what its module was given)."""
    old: Any = slot.tensor
    parts = [meta(tensors.shards.spec(key)) for key in keys]
    whole = join(model, name, keys, parts)
    as_stored = whole is parts[0]
    on_meta = old.device.type == "meta"
    spread = hasattr(old, "device_mesh")  # a DTensor: this rank reads its part only
    target_dtype = (dtype or (whole.dtype if on_meta else old.dtype)) if whole.is_floating_point() else whole.dtype
    home = torch.device(old.device_mesh.device_type if spread else "cpu")
    target_device = torch.device(device or (home if on_meta else old.device))
    module, local = slot.places[0]
    if callable(loader := getattr(module, "load_base_", None)):
        tensor = tensors.borrow(keys[0]) if as_stored else join(model, name, keys, [tensors.read(key) for key in keys])
        given = tensor.to(device=target_device, dtype=dtype or tensor.dtype)
        loader(local, given)
        return whole.dtype, given
    source = None
    if spread or (on_meta and not copy):
        source = join(model, name, keys, [tensors[key] for key in keys])
        source = local_part(source, old) if spread else source
    elif not as_stored:
        source = join(model, name, keys, [tensors.read(key) for key in keys])
    fits = not on_meta and old.dtype == target_dtype and old.device == target_device
    if fits:
        new: Tensor = old.to_local() if spread else old.detach()
    elif source is None:
        new = torch.empty(whole.shape, dtype=target_dtype, device=target_device)
    else:
        new = source.to(device=target_device, dtype=target_dtype, copy=copy).contiguous()
    if source is None:
        tensors.read_into(keys[0], new)
    elif fits:
        new.copy_(source)
    if not fits:
        slot.put(like_dtensor(new, old) if spread else new)
    return whole.dtype, new
