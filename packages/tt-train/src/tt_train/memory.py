"""Memory and speed, one verb each, in place on a built model."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tt_train.errors import TrainingError


@contextmanager
def explaining_memory(batches: Sequence[dict[str, Tensor]], peak_gib: Callable[[], float]) -> Iterator[None]:
    """Where memory runs out inside, say what was asked of it and which three keys ask for less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        ours = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not ours and "allocate memory" not in str(error):
            raise
        shapes = [tuple(batch["input_ids"].shape) for batch in batches]
        rows, length = max(shapes, key=math.prod)
        raise TrainingError(
            f"out of memory with {rows} sequences of {length} tokens at a time, {peak_gib():.2f} GiB at most; lower "
            "micro_batch_size, set activation_checkpointing=true, or lower data.max_seq_len"
        ) from error


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
