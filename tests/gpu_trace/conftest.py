"""A CUDA device that is not there, as far as training needs it: shapes, dtypes and devices, and no numbers.

FakeTensorMode computes a tensor's shape and device and refuses to mix devices, as a GPU does. Four things need more:

- Numbers. Every number that code asks for is 1, and every mask is True everywhere, so that shapes are known.
- The backward pass, since torch's engine asks the driver for the device. ``backward`` walks the same graph in Python.
- flex_attention, which compiles a kernel. ``flex_by_formula`` computes it with its mask and its bound on scores.
- Streams, of which FSDP2 and offloading ask the driver: an ``Idle`` one, for which nobody waits. Other ranks are those
  of torch's fake process group, which give every collective the shape that it should have.
"""

import importlib
import inspect
import os
from collections import Counter, defaultdict
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from tt_peft.nf4_linear import NF4Base

DEVICE = os.environ.get("TT_TRACE_DEVICE", "cuda")
aten = torch.ops.aten
MASKED = (aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten.index_put_.default,
          aten._index_put_impl_.default)  # fmt: skip


class Answers(TorchDispatchMode):
    """Says 1 to who asks for a number, and True to who asks for a truth."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0 if args[0].dtype.is_floating_point else 1
        if func is aten.equal.default and any(isinstance(arg, FakeTensor) for arg in args[:2]):
            assert args[0].device == args[1].device
            return True
        if func is aten.unique_consecutive.default:  # all differ; only a CPU asks
            return args[0].clone(), args[0].new_empty(0), args[0].new_empty(0)
        if func is aten.nonzero.default and isinstance(args[0], FakeTensor):
            return torch.stack(everywhere(args[0]), dim=1)
        if func in MASKED:
            args = (args[0], [place for index in args[1] for place in everywhere(index)], *args[2:])
        return func(*args, **(kwargs or {}))


def everywhere(index):
    """An index as it is, or the places of a mask that is True everywhere."""
    if index is None or index.dtype != torch.bool:
        return [index]
    place, strides = torch.arange(index.numel(), device=index.device), torch.empty(index.shape, device="meta").stride()
    return [place // stride % size for stride, size in zip(strides, index.shape, strict=True)]


_apply = inspect.getattr_static(torch.autograd.Function, "apply")


@classmethod
def noting_tensors(cls, *args):
    """``Function.apply``, whose node in the graph knows which of its inputs are tensors."""
    made = _apply.__get__(None, cls)(*args)
    for tensor in made if isinstance(made, tuple) else (made,):
        if isinstance(getattr(tensor, "grad_fn", None), torch.autograd.function.BackwardCFunction):
            tensor.grad_fn.tensors = [isinstance(arg, torch.Tensor) for arg in args]
    return made


@pytest.fixture(name="traced")
def traced_fixture(monkeypatch):
    """``with traced(model):`` puts the model on the device. Inside, tensors have shapes and no numbers."""

    @contextmanager
    def traced(*models):
        monkeypatch.setattr(torch.Tensor, "backward", backward)
        monkeypatch.setattr(torch.autograd.Function, "apply", noting_tensors)
        monkeypatch.setattr("tt_models.masks.compiled_flex_attention", lambda: flex_by_formula)
        monkeypatch.setattr("tt_models.limits.total_memory", lambda device: 2**36)
        monkeypatch.setattr("tt_peft.nf4._TABLES", {})  # of numbers
        with FakeTensorMode(allow_non_fake_inputs=True), Answers():
            for model in models:
                put_on_(model)
            yield
        monkeypatch.undo()

    return traced


@pytest.fixture(name="by_hand")
def by_hand_fixture(monkeypatch):
    """``backward`` and ``flex_by_formula`` for tensors with numbers."""
    monkeypatch.setattr(torch.autograd.Function, "apply", noting_tensors)
    return backward, flex_by_formula


class Idle:
    """A stream, or an event on it, of a device that computes nothing, and that device for FSDP2."""

    def __init__(self, *_, **__):
        self.Stream = self.Event = self.current_stream = Idle

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def record_event(self):
        return self

    record = record_event

    def wait_stream(self, _):
        pass

    wait_event = wait_stream

    def stream(self, stream):
        return stream

    def current_device(self):
        return 0


@pytest.fixture(name="idle")
def idle_fixture(monkeypatch):
    """Streams of the device, for code that asks torch.accelerator for them."""
    monkeypatch.setattr(torch, "Stream", Idle)
    monkeypatch.setattr(torch.accelerator, "current_stream", Idle)


@pytest.fixture(name="among")
def among_fixture(monkeypatch, idle):
    """``among(size)``: this process is rank 0 of so many, of which none but this one is there."""

    def among(size):
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
        for name in ("_fsdp_collectives", "_fsdp_init", "_fsdp_param_group", "_fsdp_state"):
            module = importlib.import_module(f"torch.distributed.fsdp._fully_shard.{name}")
            monkeypatch.setattr(module, "_get_device_handle", Idle)
        monkeypatch.setattr("tt_train.devices.sharding.init_device_mesh", with_numbers)
        monkeypatch.setattr("tt_train.step.zlib.crc32", lambda _: 1 / size)  # every sum over the ranks is 1
        monkeypatch.setattr("tt_train.devices.distributed._device", lambda device: torch.device(DEVICE))
        monkeypatch.setattr(torch.Tensor, "register_hook", note_hook)
        monkeypatch.setattr(torch.autograd.Variable, "_execution_engine", Engine)

    yield among
    _AT_THE_END.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def with_numbers(*args, **kwargs):
    with unset_fake_temporarily():
        return init_device_mesh(*args, **kwargs)


def note_hook(tensor, hook):
    """``Tensor.register_hook`` for ``backward``."""
    tensor.grad_fn.metadata.setdefault("hooks", []).append((tensor.output_nr, hook))


_AT_THE_END = []  # of ``backward``: what to call


class Engine:
    queue_callback = _AT_THE_END.append


def put_on_(model):
    """Give a model of the meta device weights on the device, and quantize those that are to be NF4 there."""
    made = {}
    for module in model.modules():
        for name, old in list(module._parameters.items()):
            if old is None:
                continue
            if id(old) not in made:
                new = torch.empty(old.shape, dtype=old.dtype, device=DEVICE)
                made[id(old)] = old, torch.nn.Parameter(new, requires_grad=old.requires_grad)
            module._parameters[name] = made[id(old)][1]
        assert not module._buffers  # no module has any
        if isinstance(module, NF4Base):
            module.load_base_("weight", module.weight.detach())


def flex_by_formula(q, k, v, *, score_mod, block_mask, scale, enable_gqa, return_aux):
    """``flex_attention`` without its kernel."""
    (batch, heads, queries, _), (groups, keys) = q.shape, k.shape[1:3]
    assert block_mask.seq_lengths == (queries, keys)
    assert enable_gqa == (heads != groups)
    for part in (block_mask.kv_num_blocks, block_mask.kv_indices, block_mask.full_kv_num_blocks,
                 block_mask.full_kv_indices):  # fmt: skip
        assert (part.device, part.dtype) == (q.device, torch.int32)
        assert part.shape[0] in (1, batch)
        assert part.shape[1:3] == (1, -(-queries // 128))
    k, v = (each.repeat_interleave(heads // groups, dim=1) for each in (k, v))
    scores = q @ k.transpose(2, 3) * scale
    places = torch.meshgrid(*(torch.arange(size, device=q.device) for size in scores.shape), indexing="ij")
    scores = scores if score_mod is None else score_mod(scores, *places)
    sees = block_mask.mask_mod(*places)
    scores = scores.masked_fill(~sees, -torch.inf).float()
    aux = type("Aux", (), {"lse": scores.logsumexp(-1)})
    return (scores.softmax(-1).to(v.dtype) @ v), aux


def backward(loss):
    """Give every leaf behind ``loss`` its gradient. What a step of the graph gives must be on the device it goes to."""
    waits = waiting(loss.grad_fn)
    given = defaultdict(dict)  # node -> which of its outputs -> gradient
    given[loss.grad_fn][0] = torch.ones_like(loss)
    ready = [loss.grad_fn]
    one_pass = mock.patch("torch._C._current_graph_task_id", return_value=0)  # a checkpoint computes once for each pass
    with torch.no_grad(), one_pass:
        while ready:
            node = ready.pop()
            grads = given.pop(node, {})
            for index, hook in node.metadata.pop("hooks", ()):
                if index in grads and (changed := hook(grads[index])) is not None:
                    grads[index] = changed
            found = run(node, grads) if grads else [None] * len(node.next_functions)
            for (after, index), grad in zip(node.next_functions, found, strict=True):
                if after is None:
                    continue
                if grad is not None:
                    place = after._input_metadata[index]
                    assert grad.device == place.device, f"{node.name()} gives {after.name()} {grad} for {place}"
                    grad = grad.sum_to_size(place.shape).to(place.dtype)  # as the engine does
                    given[after][index] = given[after][index] + grad if index in given[after] else grad
                waits[after] -= 1
                if not waits[after]:
                    ready.append(after)
            ready.sort(key=lambda node: hasattr(node, "variable"))  # leaves first, as the engine does
        while _AT_THE_END:
            _AT_THE_END.pop()()


def waiting(root):
    """How many edges of the graph end in each node."""
    counts, todo, seen = Counter(), [root], {root}
    while todo:
        for after, _ in todo.pop().next_functions:
            if after is not None:
                counts[after] += 1
                if after not in seen:
                    seen.add(after)
                    todo.append(after)
    return counts


def run(node, grads):
    if hasattr(node, "variable"):  # a leaf
        (grad,) = grads.values()
        leaf = node.variable
        grad = grad.to(leaf.grad_dtype or grad.dtype)
        leaf.grad = grad.clone() if leaf.grad is None else leaf.grad + grad
        for hook in (leaf._post_accumulate_grad_hooks or {}).values():
            hook(leaf)
        return []
    every = [grads.get(index) for index in range(len(node._input_metadata))]
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        every = [torch.zeros(place.shape, dtype=place.dtype, device=place.device) if grad is None else grad
                 for grad, place in zip(every, node._input_metadata, strict=True)]  # fmt: skip
        found = node.apply(*every)
        found = found if isinstance(found, tuple) else (found,)
        found = [grad for grad, is_tensor in zip(found, node.tensors, strict=True) if is_tensor]
    else:
        found = node(*every)
    return found if isinstance(found, tuple | list) else [found]
