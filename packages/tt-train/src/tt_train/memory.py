"""Memory and speed, one verb each, in place on a built model."""

import functools
import math
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tt_train.errors import TrainingError, counted
from tt_train.losses import Batch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}  # by the names that configs use


@contextmanager
def explaining_memory(batches: Sequence[Batch], device: torch.device) -> Iterator[None]:
    """If memory runs out inside, say what was asked of it and which three keys ask for less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        ours = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not ours and "allocate memory" not in str(error):
            raise
        shapes = [tuple(batch["input_ids"].shape) for batch in batches]
        rows, length = max(shapes, key=math.prod)
        asked = f"{counted(rows, 'sequence')} of {counted(length, 'token')} at a time"
        raise TrainingError(
            f"out of memory with {asked}, {peak_memory_gib(device):.2f} GiB at most; lower micro_batch_size, set "
            "activation_checkpointing=true, or lower data.max_seq_len"
        ) from error


def peak_memory_gib(device: torch.device) -> float:
    """The most memory that was in use so far, in GiB: on the GPU, or resident in this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


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
