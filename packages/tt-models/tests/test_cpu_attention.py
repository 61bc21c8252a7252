"""Attention in tiles of scores against fp64, and when it is used."""

import functools
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import tt_models
from tt_models.attention import attend
from tt_models.cpu import attention, tiles
from tt_models.cpu.attention import attend_in_tiles, faster_in
from tt_models.cpu.blocks import shapes_alone
from tt_models.cpu.tiles import pieces
from tt_models.masks import Intervals


def drawn(heads=4, kv_heads=2, queries=200, keys=None, dim=16, batch=2, dtype=torch.float32, mean=0.0):
    """Queries, keys and values as a projection gives them, [B, S, heads, D] in memory, and a gradient of the result."""
    shapes = [(queries, heads, 0.0), (keys or queries, kv_heads, mean), (keys or queries, kv_heads, mean)]
    made = [(torch.randn(batch, s, h, dim) + m).to(dtype).transpose(1, 2) for s, h, m in [*shapes, (queries, heads, 0)]]
    return made[:3], made[3]


def documents(batch, queries, ahead=0, share=0.02):
    begins = (torch.rand(batch, queries) < share).long() * (torch.arange(queries) + ahead)
    return begins.cummax(1).values


def in_fp64(q, k, v, sinks=None, *, seen, scale, softcap=None):
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen.dense(q.shape[2], k.shape[2], q.device), -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None, None].expand(*scores.shape[:3], 1)), -1)
    return scores.softmax(-1)[..., : k.shape[2]] @ v.repeat_interleave(group, 1)


def by_torch(q, k, v, sinks=None, *, seen, scale, softcap=None):
    """The formula of ``attend`` under a dense mask."""
    mask = seen.dense(q.shape[2], k.shape[2], q.device)
    return attend(q, k, v, mask=mask, scale=scale, softcap=softcap, sinks=sinks)


def in_tiles(q, k, v, sinks=None, **how):
    return attend_in_tiles(q, k, v, how.pop("seen"), sinks=sinks, **how)


def with_gradients(function, inputs, grad, **how):
    leaves = [x.detach().requires_grad_() for x in inputs]
    mixed = function(*leaves, **how)
    return [mixed.detach(), *torch.autograd.grad(mixed, leaves, grad.to(mixed.dtype))]


def assert_as_exact_as_torch(inputs, grad, **how):
    """The error of each result against fp64 is at most twice that of torch's own attention, plus a rounding.

    The gradient of a sink is one sum over all rows, whose terms cancel: some roundings more.
    """
    exact = with_gradients(in_fp64, [x.double() for x in inputs], grad, **how)
    ours, theirs = (with_gradients(function, inputs, grad, **how) for function in (in_tiles, by_torch))
    for index, (found, reference, right) in enumerate(zip(ours, theirs, exact, strict=True)):
        rounding = (4 if index == 4 else 0.25) * torch.finfo(found.dtype).eps * right.norm()
        assert found.dtype == reference.dtype
        assert (found.double() - right).norm() <= 2 * (reference.double() - right).norm() + rounding


CASES = {
    "causal": {},
    "causal of grouped heads, values with a mean": {"kv_heads": 1, "mean": 2.0},
    "of many tiles": {"queries": 700, "batch": 1},
    "of one token": {"queries": 1, "keys": 9},
    "of a few tokens": {"queries": 5},
    "after a cache": {"queries": 100, "keys": 333},
    "wide heads": {"dim": 80, "batch": 1},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_tiles_are_as_exact_as_torch(case, dtype):
    inputs, grad = drawn(dtype=dtype, **CASES[case])
    assert_as_exact_as_torch(inputs, grad, seen=Intervals(None, None), scale=inputs[0].shape[-1] ** -0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 2, 37, 150])
@pytest.mark.parametrize("ahead", [0, 133])
@pytest.mark.parametrize("share", [0, 0.01, 0.4])
def test_windows_and_documents_of_any_length_are_seen_as_under_a_mask(share, ahead, window, dtype):
    inputs, grad = drawn(queries=230, keys=230 + ahead, dtype=dtype, dim=8)
    starts = documents(2, 230, ahead, share) if share else None
    assert_as_exact_as_torch(inputs, grad, seen=Intervals(starts, window), scale=0.4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("softcap", "has_sinks"), [(2.0, False), (None, True), (3.0, True)])
@pytest.mark.parametrize("window", [None, 40])
def test_bounded_scores_and_sinks_are_as_exact_as_the_formula(window, softcap, has_sinks, dtype):
    inputs, grad = drawn(queries=150, dtype=dtype)
    if has_sinks:
        inputs.append(torch.randn(4).to(dtype))
    seen = Intervals(documents(2, 150), window)
    assert_as_exact_as_torch(inputs, grad, seen=seen, scale=0.3, softcap=softcap)


def test_large_scores_in_bf16_are_as_exact_as_torch():
    (q, k, v), grad = drawn(dtype=torch.bfloat16, dim=64)
    assert_as_exact_as_torch([q * 6, k * 6, v], grad, seen=Intervals(None, None), scale=0.125)


def test_pieces_are_documents_and_short_ones_together(monkeypatch):
    monkeypatch.setattr(tiles, "SHORT", 3)
    starts = torch.tensor([2, 2, 5, 6, 6, 8, 8, 8, 8, 12, 12])  # the queries are in columns 3 to 13
    assert list(pieces(starts, 11, 14, None)) == [
        (slice(0, 3), slice(2, 6), [0, 0, 3]),
        (slice(3, 9), slice(6, 12), [0, 0, 2, 2, 2, 2]),
        (slice(9, 11), slice(12, 14), None),
    ]
    assert list(pieces(None, 3, 5, 2)) == [(slice(0, 3), slice(1, 5), [0, 1, 2])]
    assert list(pieces(None, 3, 3, None)) == [(slice(0, 3), slice(0, 3), None)]


def test_tiles_can_be_differentiated_twice():
    inputs, _ = drawn(heads=2, kv_heads=1, queries=5, dim=2, batch=1, dtype=torch.float64)
    inputs = [x.detach().requires_grad_() for x in [*inputs, torch.randn(2, dtype=torch.float64)]]
    how = {"seen": Intervals(torch.tensor([[0, 0, 2, 2, 2]]), 2), "scale": 0.5, "softcap": 2.0}
    assert torch.autograd.gradcheck(lambda *x: in_tiles(*x, **how), inputs)
    assert torch.autograd.gradgradcheck(lambda *x: in_tiles(*x, **how), inputs)


def test_autocast_computes_in_its_dtype_with_scores_in_fp32():
    inputs, grad = drawn(queries=90)
    how = {"seen": Intervals(None, None), "scale": 0.25}
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(in_tiles, inputs, grad, **how)
    expected = with_gradients(in_tiles, [x.bfloat16() for x in inputs], grad, **how)
    assert found[0].dtype == torch.bfloat16
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.equal(theirs.to(ours.dtype))


def test_under_torch_func_the_formula_is_used():
    (q, k, v), _ = drawn(queries=70, batch=3)
    how = {"mask": None, "scale": 0.25, "softcap": 2.0}
    expected = attend(q, k, v, **how)
    found = torch.func.vmap(lambda q, k, v: attend(q[None], k[None], v[None], **how)[0])(q, k, v)
    assert torch.allclose(found, expected, atol=1e-5)


def operators(action):
    """How often each operator ran inside ``action()``, and the largest number of elements that one returned."""
    calls, largest = Counter(), 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            nonlocal largest
            found = op(*args, **(kwargs or {}))
            calls[op._opname] += 1
            for x in found if isinstance(found, tuple | list) else (found,):
                largest = max(largest, x.numel() if isinstance(x, torch.Tensor) else 0)
            return found

    with Watch():
        action()
    return calls, largest


@pytest.mark.parametrize(("kernel", "faster"), [("avx512_bf16", True), ("amx", False), ("other", False)])
def test_tiles_take_the_place_of_torch_only_in_bf16_on_a_cpu_and_at_lengths_that_gain(kernel, faster, monkeypatch):
    monkeypatch.setattr(attention, "FASTER_IN", faster_in(kernel))
    for dtype in (torch.bfloat16, torch.float32):
        for heads, queries, gains in ((8, 256, True), (8, 255, False), (2, 511, False), (2, 512, True)):
            inputs, _ = drawn(heads, 1, queries=queries, dim=8, batch=1, dtype=dtype)
            calls, _ = operators(functools.partial(attend, *inputs, mask=None, scale=0.25))
            assert calls["attention"] == (faster and gains and dtype == torch.bfloat16)


@pytest.mark.parametrize(("dim", "longest"), [(16, 512), (63, 512), (64, 4096), (256, 4096)])
def test_narrow_heads_are_computed_in_tiles_up_to_shorter_lengths_and_only_with_gradients(dim, longest, monkeypatch):
    monkeypatch.setattr(attention, "FASTER_IN", {torch.bfloat16})
    rows = torch.empty(1, 2, longest + 1, dim, dtype=torch.bfloat16, device="meta")
    assert not attention.is_faster(rows)
    assert attention.is_faster(rows[:, :, :-1])
    with torch.no_grad():
        assert attention.is_faster(rows[:, :, :512]) == (dim >= 64)
        assert not attention.is_faster(rows[:, :, :511])
        assert not attention.is_faster(rows[:, :, :512], documents=True)


@pytest.mark.parametrize("faster", [set(), {torch.float32}])
@pytest.mark.parametrize("model_type", ["mistral", "gemma2", "gemma3_text", "gpt_oss"])
def test_no_layer_with_a_window_makes_scores_or_a_mask_of_tokens_by_tokens(model_type, faster, small, monkeypatch):
    monkeypatch.setattr(attention, "FASTER_IN", faster)
    more = {} if model_type == "mistral" else {"layer_types": ["sliding_attention"] * 2}
    length, sizes = 600, {"num_hidden_layers": 2, "sliding_window": 20, "max_position_embeddings": 1000}
    model = small(model_type, 1, **sizes, **more)
    ids = torch.randint(4, 60, (1, length))
    padded = torch.cat([torch.zeros(150), torch.arange(450)])[None].long()
    packed = torch.cat([torch.arange(200), torch.arange(400)])[None]
    for positions in (None, padded, packed):
        _, largest = operators(lambda: model(ids, positions).sum().backward())  # noqa: B023
        assert largest < length * length
    cache = tt_models.KVCache(model.config, batch_size=1, max_seq_len=length)
    with torch.no_grad():
        model(ids[:, :300], cache=cache)
        _, largest = operators(lambda: model(ids[:, 300:], cache=cache))
    assert largest < length * length / 4


def test_a_plan_of_memory_sees_what_tiles_keep(monkeypatch):
    mode = FakeTensorMode()
    q, k, v = (
        FakeTensor(mode, torch.empty(1, heads, 128, 16, device="meta"), torch.device("cpu")).requires_grad_()
        for heads in (4, 2, 2)
    )
    kept = []
    with shapes_alone(FakeTensor), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        attend(q, k, v, mask=Intervals(None, 8), scale=1.0)
    assert sorted(x.numel() for x in kept) == sorted([q.numel(), q.numel(), k.numel(), v.numel(), 4 * 128])


NARROW = """
import sys, torch
from tt_models.cpu.attention import FASTER_IN
from tt_models.cpu.attention import attend_in_tiles
from tt_models.masks import Intervals
q, k, v = (torch.randn(1, 130, h, 32).to(torch.bfloat16).transpose(1, 2).requires_grad_() for h in (4, 2, 2))
found = attend_in_tiles(q, k, v, Intervals(None, None), scale=0.2)
q64, k64, v64 = (x.detach().double().requires_grad_() for x in (q, k, v))
right = torch.nn.functional.scaled_dot_product_attention(q64, k64, v64, is_causal=True, scale=0.2, enable_gqa=True)
found.sum().backward(), right.sum().backward()
for ours, exact in ((found, right), (q.grad, q64.grad), (k.grad, k64.grad), (v.grad, v64.grad)):
    assert (ours.double() - exact).norm() / exact.norm() < 0.01
assert "torch._dynamo" not in sys.modules
assert not FASTER_IN
"""


@pytest.mark.parametrize(
    "narrow", [{"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}]
)
def test_tiles_compute_the_same_on_a_narrower_cpu_are_not_chosen_there_and_do_not_load_the_compiler(narrow):
    subprocess.run([sys.executable, "-c", NARROW], env={**os.environ, **narrow}, check=True)


def test_one_compiled_graph_serves_all_lengths_of_windows_and_packed_rows(small):
    torch._dynamo.reset()
    model, graphs = small("mistral", sliding_window=5, max_position_embeddings=200), []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=counting, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for length in (70, 90, 130):
            ids, positions = torch.randint(4, 60, (2, length)), torch.arange(length)[None] % 66
            assert torch.allclose(compiled(ids, positions), model(ids, positions), atol=1e-5)
    assert len(graphs) == 1
    assert any("attention" in str(node.target) for node in graphs[0].graph.nodes)


def test_an_exported_model_has_no_operator_of_ours(small, monkeypatch):
    monkeypatch.setattr(attention, "FASTER_IN", {torch.float32})
    model, lengths = small(), torch.export.Dim("s", min=2, max=100)
    exported = torch.export.export(model, (torch.ones(1, 80).long(),), dynamic_shapes={"input_ids": {1: lengths}})
    assert not [node for node in exported.graph.nodes if "tt_models" in str(node.target)]
    ids = torch.randint(4, 60, (1, 97))
    assert torch.allclose(exported.module()(ids), model(ids), atol=1e-5)


def test_a_compiled_function_may_use_the_gradients_of_torch_func():
    torch._dynamo.reset()
    (q, k, v), _ = drawn(queries=80)

    def loss(q):
        return attend(q, k, v, mask=Intervals(None, 7), scale=0.3).square().sum()

    gradient = torch.func.grad(loss)
    found = torch.compile(gradient, backend="eager", fullgraph=True)(q)
    assert torch.allclose(found, gradient(q), atol=1e-5)
