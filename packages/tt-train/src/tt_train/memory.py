"""Memory and speed, one verb each, in place on a built model."""

import functools
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks: what is checkpointed, compiled and sharded one by one."""
    layers = model.get_submodule("model.layers")
    assert isinstance(layers, nn.ModuleList)
    return layers


def checkpoint_activations_(model: nn.Module) -> None:
    """Keep only each block's input in the forward and compute the rest again in the backward. Parameter names stay."""
    for block in blocks(model):
        block.forward = functools.partial(_checkpointed, block, block.forward)


def _checkpointed(block: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not block.training:  # evaluation and generation keep nothing, and may carry a cache
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def compile_(model: nn.Module) -> None:
    """Compile each block in place; parameter names stay."""
    for block in blocks(model):
        block.compile(dynamic=True)
