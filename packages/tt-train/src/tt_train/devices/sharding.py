"""A model on many devices: its weights sharded by torch's FSDP2, or whole on each and their gradients added up.

Two ways, and a mesh of both. *Sharded* over n processes, each keeps 1/n of every weight, gradient and optimizer state,
and a block's weights are gathered while it computes (https://arxiv.org/abs/2304.11277). *Replicated*, each process
keeps everything, and only gradients travel, once per step: the way of adapters, whose gradients are small and whose
frozen base need not be gathered. ``replicate x shard`` is HSDP: copies of sharded groups.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from tt_ckpt.ranks import is_dtensor
from tt_train.config import RunConfig
from tt_train.devices.distributed import World
from tt_train.memory import blocks

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

_EVERY = "_tt_reduces_every_micro_batch"
_BUCKET = 2**24  # numbers that one reduction of replicated gradients adds up


def ways(config: RunConfig, size: int) -> tuple[int, int]:
    """``(replicate, shard)`` of a run of ``size`` processes; ValueError if the config's numbers do not fit them."""
    shard, replicate = config.parallel.shard, config.parallel.replicate
    if size == 1:
        return 1, 1
    if shard is None and replicate is None:
        return (1, size) if config.adapter is None else (size, 1)
    given = shard or replicate or 1
    if shard is not None and replicate is not None:
        product = shard * replicate
        if product != size:
            raise ValueError(
                f"shard {shard} x replicate {replicate} is {product}, there are {size} processes; leave one of them out"
            )
        return replicate, shard
    if size % given:
        key, near = "shard" if shard is not None else "replicate", [n for n in range(1, size + 1) if size % n == 0]
        raise ValueError(f"{key} {given} does not divide the {size} processes; take one of {', '.join(map(str, near))}")
    return (size // given, given) if shard is not None else (given, size // given)


def shard_(
    model: nn.Module,
    *,
    device: torch.device,
    replicate: int = 1,
    shard: int,
    compute_dtype: torch.dtype | None = None,
    cpu_offload: bool = False,
    reduce_every_micro_batch: bool = False,
) -> None:
    """Shard every block, then what is outside of them, in place. The model may be on the meta device: load it then.

    Call it after adapters, activation checkpointing and compilation. Embedding, final norm and output projection are
    the root group, which stays gathered from the start of ``hidden_states`` to the end of the backward: a loss may use
    ``output_weight`` in between. ``compute_dtype`` is what fp32 weights are gathered in, so that they are updated in
    fp32; None leaves each in its own dtype, as an adapter on a frozen bf16 base needs. Gradients are reduced in fp32.
    Activations are never cast: what a block computes in fp32 (norms, positions) stays so.
    """
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    mesh = init_device_mesh(device.type, (replicate, shard), mesh_dim_names=("replicate", "shard"))
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=device.type != "cpu") if cpu_offload else OffloadPolicy()
    mesh = mesh if replicate > 1 else mesh["shard"]
    layers = list(blocks(model))
    sharded = [fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=offload) for module in (*layers, model)]
    model.hidden_states = functools.partial(_for_backward, model, model.hidden_states)  # type: ignore[assignment, arg-type]
    register_fsdp_forward_method(model, "hidden_states")
    setattr(model, _EVERY, reduce_every_micro_batch)
    for before, after in pairwise(sharded[:-1]):
        before.set_modules_to_forward_prefetch([after])


def _for_backward(model: nn.Module, hidden_states: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """FSDP reduces gradients if what the forward pass gave needs one, also if only the output projection trains.

    A pass outside of training, such as that of a reference, gives what needs none.
    """
    found = hidden_states(*args, **kwargs)
    return found.requires_grad_() if model.training and torch.is_grad_enabled() and not found.requires_grad else found


def is_sharded(model: object) -> "TypeGuard[FSDPModule]":
    """Whether ``shard_`` was called. Then every rank must make the same forward and backward passes."""
    return hasattr(model, "set_requires_gradient_sync")


def reshard_(model: nn.Module) -> None:
    """Free what evaluation or generation has left gathered, so that ``named_parameters`` are the shards again."""
    for module in model.modules():
        if is_sharded(module):
            module.reshard()


# ---- gradients ----


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds; a plain tensor is that part."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def copies(tensor: Tensor, size: int) -> int:
    """How many of ``size`` ranks hold the same part of a tensor as this one."""
    if not is_dtensor(tensor):
        return size
    mesh, placements = tensor.device_mesh, tensor.placements
    return size // prod(mesh.size(dim) for dim, placement in enumerate(placements) if placement.is_shard())


def reduce_gradients_(model: object, *, last: bool) -> None:
    """Let a sharded model reduce its gradients in the next backward, which is the last of a step, or not yet."""
    if is_sharded(model):
        model.set_requires_gradient_sync(last or getattr(model, _EVERY))


def squared_norm(gradients: Sequence[Tensor], size: int) -> float:
    """This rank's share of the squared norm of all gradients: the shares of ``size`` ranks add up to it.

    What several ranks hold (replicas, or a gradient that is not sharded) is counted once.
    """
    if size == 1:
        return float(torch.nn.utils.get_total_norm(gradients, error_if_nonfinite=False)) ** 2
    by_copies: dict[int, list[Tensor]] = {}
    for gradient in gradients:
        by_copies.setdefault(copies(gradient, size), []).append(local(gradient))
    return sum(
        float(torch.stack(torch._foreach_norm(held)).double().square().sum()) / count
        for count, held in by_copies.items()
    )


def add_up_gradients_(parameters: Sequence[nn.Parameter], among: World) -> None:
    """Give every rank the sum of all ranks' gradients, for parameters that are whole on each.

    A parameter that no rank has a gradient for keeps none. The sums are made in fp32.
    """
    for bucket in _buckets(parameters):
        parts = [p.new_zeros(p.numel(), dtype=torch.float32) if p.grad is None else p.grad.reshape(-1).float()
                 for p in bucket]  # fmt: skip
        have = torch.tensor([float(parameter.grad is not None) for parameter in bucket], device=bucket[0].device)
        total = among.sum(torch.cat([*parts, have]))
        *sums, have = torch.split(total, [*map(len, parts), len(bucket)])
        for parameter, part, some in zip(bucket, sums, have.tolist(), strict=True):
            if some and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
            if some and parameter.grad is not None:
                parameter.grad.copy_(part.view(parameter.shape))


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        full = sum(one.numel() for one in bucket) + parameter.numel() > _BUCKET
        if bucket and (full or parameter.device != bucket[0].device):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket
