"""The memory and the arithmetic of a step, without its numbers: its code runs on tensors that have shapes alone.

``tt_train.models.plan`` is the only user; the trace is a file because it knows torch and no config.
"""

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from tt_models.cpu.blocks import shapes_alone
from tt_peft.nf4_linear import NF4Base
from tt_train.losses.cross_entropy import Batch, CausalLM, Objective

aten = torch.ops.aten
_MASKED = (aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten.index_put_.default,
           aten._index_put_impl_.default)  # fmt: skip
_FROM_THE_HEAP = 2**25 - 2**16  # bytes: glibc maps a larger tensor, and unmaps it when it is freed
_SCATTERED = 0.047  # of all that comes and goes in the heap in a step, fitted to benchmarks/plan_memory.py
_PASSING = ("activations", "logits")
_LIBRARIES = 60 * 2**20  # bytes: code and buffers that a first step loads, measured
_NF4_BYTES = 0.5 + 1 / 64 + 4 / 2**14  # of a weight: its code, its block's scale, and the scale of the scales


class _Piece(NamedTuple):
    size: int
    part: str


@dataclass(frozen=True)
class Peak:
    """Bytes by part, at the moment of the step when most are in use, and the step's floating-point operations."""

    parts: dict[str, int]
    flops: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass
class _Live:
    """The tensors' memory that is in use, as it comes and goes."""

    now: int = 0
    peak: int = 0
    peak_at: int = 0
    events: list[tuple[int, bool]] = field(default_factory=list)  # (piece, whether it came)
    pieces: list[_Piece] = field(default_factory=list)
    known: dict[int, tuple[int, Any]] = field(default_factory=dict)  # storage -> (piece, weak reference)

    def add(self, tensor: Tensor, part: str, *, size: int | None = None) -> None:
        storage = tensor.untyped_storage()
        place = storage._cdata
        if place in self.known:
            return
        piece = len(self.pieces)
        self.pieces.append(_Piece(storage.nbytes() if size is None else size, part))
        self.known[place] = piece, weakref.ref(storage, lambda _: self._free(place, piece))
        self.events.append((piece, True))
        self.now += self.pieces[piece].size
        if self.now > self.peak:
            self.peak, self.peak_at = self.now, len(self.events)

    def _free(self, place: int, piece: int) -> None:
        self.known.pop(place, None)
        self.events.append((piece, False))
        self.now -= self.pieces[piece].size

    def name(self, tensor: Tensor, part: str) -> None:
        """What this tensor is, which was not known when it came."""
        piece = self.known[tensor.untyped_storage()._cdata][0]
        self.pieces[piece] = self.pieces[piece]._replace(part=part)

    def most_at_once(self, counts: Callable[[_Piece], bool]) -> int:
        """The most bytes of such pieces that were in use at one moment."""
        now = most = 0
        for index, came in self.events:
            if counts(piece := self.pieces[index]):
                now += piece.size if came else -piece.size
                most = max(most, now)
        return most

    def at_peak(self) -> list[_Piece]:
        alive: set[int] = set()
        for piece, came in self.events[: self.peak_at]:
            (alive.add if came else alive.discard)(piece)
        return [self.pieces[piece] for piece in alive]


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts memory and arithmetic. A number is asked for only to decide something that changes no shape."""

    def __init__(self, live: _Live) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live, self.part, self.flops = live, "activations", 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0 if args[0].dtype.is_floating_point else 1
        if func is aten.equal.default and any(isinstance(arg, FakeTensor) for arg in args):
            return True
        if func in _MASKED:  # a mask of real numbers decides the shape: count them here
            args = (args[0], [place for index in args[1] for place in _places(index)], *args[2:])
        out = func(*args, **kwargs)
        self.flops += _flops(func, args, kwargs, out)
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self.live.add(tensor, self.part)
        return out


def _places(index: Tensor | None) -> list[Tensor | None]:
    if index is None or index.dtype != torch.bool or isinstance(index, FakeTensor):
        return [index]
    return list(index.nonzero(as_tuple=True))


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    if func._overloadpacket in flop_registry:
        return int(flop_registry[func._overloadpacket](*args, **kwargs, out_val=out))
    if func is aten._scaled_dot_product_flash_attention_for_cpu.default:
        return int(sdpa_flop_count(*(arg.shape for arg in args[:3])))  # type: ignore[no-untyped-call]
    if func is aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
        return int(sdpa_backward_flop_count(*(arg.shape for arg in args[:4])))  # type: ignore[no-untyped-call]
    if func in (torch.ops.tt_models.attention.default, torch.ops.tt_models.attention_backward.default):
        backward = func is torch.ops.tt_models.attention_backward.default
        q, k = args[backward : backward + 2]
        every = (*q.shape[:2], *k.shape[2:])  # as above, where each query head has keys of its own
        shapes = (q.shape, q.shape, every, every) if backward else (q.shape, every, every)
        return int((sdpa_backward_flop_count if backward else sdpa_flop_count)(*shapes))
    return 0


def trace_step(
    model: nn.Module,
    batch: Batch,
    objective: Objective,
    *,
    prepare: Callable[[Sequence[Batch]], Sequence[Batch]],
    frozen: Sequence[nn.Module],
    narrow: bool,
    state_bytes: float,
    accumulates: bool,
    drops_gradients: bool,
    scratch: Callable[[Sequence[nn.Parameter]], int],
    cpu: bool,
) -> Peak:
    """What the second and every later step of training ``model``, which is on the meta device, needs.

    batch: a real micro-batch. accumulates: whether others came before it in the step, so that there are gradients.
    prepare: what the recipe does to micro-batches first. frozen: further models, on the meta device, that the objective
    or ``prepare`` uses. narrow: fp32 weights are kept as bf16 and the bits that it lacks. state_bytes: of the
    optimizer, for each trained weight. drops_gradients: the optimizer runs in the backward. scratch: bytes that the
    optimizer takes while it runs, of these parameters. cpu: the blocks compute as on a CPU, which keeps less than their
    formulas.
    """
    live, mode = _Live(), FakeTensorMode(allow_non_fake_inputs=True)
    trained = _give_shapes_(model, live, mode, narrow=narrow)
    for other in frozen:
        _give_shapes_(other, live, mode, narrow=False)
    state = round(sum(p.numel() * (state_bytes + 2 * (p.dtype == torch.bfloat16)) for p in trained))
    watch = _Watch(live)
    if drops_gradients:
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(_drop_gradient)  # type: ignore[no-untyped-call]
    for parameter in trained if accumulates else ():
        parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
        live.add(parameter.grad, "gradients")
    with shapes_alone(FakeTensor if cpu else None), watch:
        (made,) = prepare([batch])
        loss = objective(cast(CausalLM, _Marked(model, watch)), made).loss
        watch.part = "activations"
        loss.backward()  # type: ignore[no-untyped-call]
        for parameter in trained:
            if parameter.grad is not None:
                live.name(parameter.grad, "gradients")
    parts = Counter({"weights": 0, "gradients": 0, "optimizer": state, "activations": 0, "logits": 0, "allocator": 0})
    weights, gradients = sum(p.size for p in live.pieces if p.part == "weights"), sum(4 * p.numel() for p in trained)
    update = scratch(trained)
    if not drops_gradients and weights + gradients + update > live.peak:  # the optimizer's step takes the most
        parts.update({"weights": weights, "gradients": gradients, "optimizer": update})
    else:
        for piece in live.at_peak():
            parts[piece.part] += piece.size
    if cpu and sys.platform == "linux":
        parts["allocator"] = _held_back(live)
    return Peak(dict(parts), watch.flops)


def _held_back(live: _Live) -> int:
    """What a process on Linux keeps beyond the tensors in use.

    glibc maps large tensors, and takes smaller ones from its heap, which does not shrink: its largest size counts, and
    the holes that no other tensor fits into. These become more with each tensor that comes and goes.
    """
    heap = live.most_at_once(lambda piece: piece.size < _FROM_THE_HEAP)
    mapped = live.most_at_once(lambda piece: piece.size >= _FROM_THE_HEAP)
    small = (piece.size for piece in live.pieces if piece.size < _FROM_THE_HEAP and piece.part in _PASSING)
    return heap + mapped - live.peak + round(_SCATTERED * sum(small)) + _LIBRARIES


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class _Marked:
    """The model, whose hidden states are activations; what follows them belongs to the loss."""

    def __init__(self, model: Any, watch: _Watch) -> None:
        self._model, self._watch = model, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def hidden_states(self, *args: Any, **kwargs: Any) -> Tensor:
        self._watch.part = "activations"
        hidden: Tensor = self._model.hidden_states(*args, **kwargs)
        self._watch.part = "logits"
        return hidden


def _give_shapes_(model: nn.Module, live: _Live, mode: FakeTensorMode, *, narrow: bool) -> list[nn.Parameter]:
    """Put a shape without numbers in the place of every parameter. Returns those that train."""
    made: dict[int, nn.Parameter] = {}
    cpu = torch.device("cpu")
    for module in model.modules():
        quantized = {"weight"} if isinstance(module, NF4Base) else set()
        for name, old in module._parameters.items():
            if old is None:
                continue
            if id(old) not in made:
                train = old.requires_grad
                is_narrow = train and narrow and old.dtype == torch.float32
                dtype = torch.bfloat16 if is_narrow else old.dtype
                shape = FakeTensor(mode, torch.empty(old.shape, dtype=dtype, device="meta"), cpu)
                made[id(old)] = nn.Parameter(shape, requires_grad=train)
                if train and dtype == torch.bfloat16:
                    made[id(old)].grad_dtype = torch.float32
                size = round(old.numel() * _NF4_BYTES) if name in quantized else None
                live.add(made[id(old)], "weights", size=size)
            module._parameters[name] = made[id(old)]
    return [parameter for parameter in made.values() if parameter.requires_grad]
