"""Memory and speed, one verb each, in place on a built model."""

import functools
import inspect
import math
import resource
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tt_models.cpu import attention
from tt_train.errors import TrainingError, counted
from tt_train.losses.cross_entropy import Batch

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
    """The most memory that was in use so far, in GiB: on the device, or resident in this process on the CPU."""
    return memory_gib(device)["allocated"]


def memory_gib(device: torch.device) -> dict[str, float]:
    """Peaks so far in GiB: ``allocated`` by tensors, ``active`` (with what waits for a stream) and ``reserved``.

    On the CPU there is one figure, ``allocated``: the most that was resident in this process. The other two are those
    of torch's allocators; MPS has none of them, ``allocated`` is what the driver holds now.
    """
    if device.type == "cpu":
        unit = 1 if sys.platform == "darwin" else 1024
        return {"allocated": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
    if device.type == "mps":
        return {"allocated": torch.mps.driver_allocated_memory() / 2**30}
    stats = torch.accelerator.memory_stats(device)
    kinds = ("active", "allocated", "reserved")
    return {kind: stats.get(f"{kind}_bytes.all.peak", 0) / 2**30 for kind in kinds}


def blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks: what is checkpointed, compiled and sharded one by one."""
    layers = model.get_submodule("model.layers")
    assert isinstance(layers, nn.ModuleList)
    return layers


# ---- activations ----

KEEPS_BY_HOOKS = "respect_saved_tensors_hooks" in inspect.signature(checkpoint).parameters  # torch >= 2.14
# attention is one of these, unless scores are bounded or have sinks and no CPU computes them; see tt_models.attention
_ATTENTION = {getattr(torch.ops.aten, name).default for name in (
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_flash_attention_for_cpu",
)} | {attention.OPERATOR}  # fmt: skip


def checkpoint_activations_(model: nn.Module, how: bool | int | str = True) -> None:
    """Keep only each block's input in the forward, and compute the rest again in the backward (arXiv 1604.06174).

    how: true or ``full`` for every block, n for every n-th, from the first; ``selective`` also keeps what attention
    gives (arXiv 2205.05198). Dropout is the same in both passes. Parameter names stay.
    """
    every = how if isinstance(how, int) else 1
    options: dict[str, Any] = {"use_reentrant": False}
    if KEEPS_BY_HOOKS:  # what selective keeps can be offloaded, too
        options["respect_saved_tensors_hooks"] = True
    if how == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_attention)
    for block in blocks(model)[::every]:
        block.forward = functools.partial(_checkpointed, block, block.forward, options)


def _checkpointed(
    block: nn.Module, forward: Callable[..., Any], options: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    if not block.training:  # evaluation and generation keep nothing, and may carry a cache
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, **options, **kwargs)


def _keep_attention(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE


def offload_activations_(model: nn.Module) -> None:
    """Keep what the backward pass of the decoder needs in CPU memory. Weights and small tensors stay on the device.

    After ``checkpoint_activations_`` that is the input of each checkpointed block, and all of the others.
    """
    stack = model.get_submodule("model")
    stack.forward = functools.partial(_offloaded, Offload(), stack.forward)


def _offloaded(offload: "Offload", forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    offload.settle()
    with torch.autograd.graph.saved_tensors_hooks(offload.pack, offload.unpack):
        return forward(*args, **kwargs)


class Offload:
    """Hooks for saved tensors: copies to pinned memory on a stream of their own, beside the computation.

    A tensor is let go when the stream of the computation has waited for its copy, so that its memory is not used again
    too early; that is when ``IN_FLIGHT`` younger copies are under way, so that memory stays flat.
    """

    SMALLEST = 2**16  # bytes; below, a copy costs more than it saves
    IN_FLIGHT = 4

    def __init__(self) -> None:
        self.stream: torch.Stream | None = None
        self.in_flight: deque[tuple[Tensor, torch.Event]] = deque()

    def pack(self, tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        """A saved tensor, or its copy in CPU memory and the device to bring it back to."""
        is_weight = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
        if is_weight or type(tensor) is not Tensor or tensor.nbytes < self.SMALLEST:
            return tensor
        if tensor.device.type == "cpu":
            return tensor.device, tensor.clone()
        computing = torch.accelerator.current_stream(tensor.device)
        self.stream = self.stream or torch.Stream(tensor.device)
        self.stream.wait_stream(computing)
        copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
        with self.stream:
            copy.copy_(tensor, non_blocking=True)
        self.in_flight.append((tensor, self.stream.record_event()))
        self.settle(but=self.IN_FLIGHT)
        return tensor.device, copy

    def unpack(self, packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        """The tensor that ``pack`` was given."""
        if isinstance(packed, Tensor):
            return packed
        self.settle()
        device, copy = packed
        return copy.to(device, non_blocking=True)

    def settle(self, *, but: int = 0) -> None:
        """Let the computation wait for all copies but the youngest, and let go what they were made from."""
        while len(self.in_flight) > but:
            tensor, copied = self.in_flight.popleft()
            torch.accelerator.current_stream(tensor.device).wait_event(copied)


# ---- compilation ----


def compile_(model: nn.Module) -> None:
    """Compile each block in place, once for all of them and all lengths. Parameter names stay."""
    for block in blocks(model):
        block.compile(dynamic=True)


def compile_seconds() -> float:
    """How long this process has compiled so far."""
    from torch._dynamo.utils import calculate_time_spent

    return float(calculate_time_spent().get("total_wall_time", 0.0))
