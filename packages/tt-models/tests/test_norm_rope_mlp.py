"""The small blocks: roundings, gradients, and each argument."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tt_models.cpu import blocks, elementwise, products
from tt_models.cpu.elementwise import rotate
from tt_models.cpu.products import linear, weight_left
from tt_models.mlp import ACTIVATIONS, MLP
from tt_models.moe import Experts
from tt_models.norm import LateRoundingRMSNorm, OffsetRMSNorm, RMSNorm, normalized
from tt_models.rope import Rope, amplitude, check_rope_scaling

DTYPES = [torch.float32, torch.bfloat16]


def away_from_neutral(norm):
    with torch.no_grad():
        norm.weight.add_(torch.randn_like(norm.weight) * 0.3)
    return norm


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_and_its_gradients_are_the_bits_of_the_formula(dtype):
    norm = away_from_neutral(RMSNorm(24, eps=1e-3).to(dtype))
    x, upstream = torch.randn(2, 5, 24, dtype=dtype, requires_grad=True), torch.randn(2, 5, 24, dtype=dtype)
    expected = norm.weight * normalized(x, 1e-3).to(dtype)
    gradients = torch.autograd.grad(expected, (x, norm.weight), upstream)
    found = norm(x)
    assert found.equal(expected)
    for one, other in zip(torch.autograd.grad(found, (x, norm.weight), upstream), gradients, strict=True):
        assert one.equal(other)
    with torch.no_grad():
        assert norm(x).equal(expected)


def test_norm_with_weights_of_another_dtype_promotes_like_the_formula():
    norm, x = away_from_neutral(RMSNorm(8)), torch.randn(3, 8).bfloat16()
    expected = norm.weight * normalized(x, norm.eps).bfloat16()
    assert norm(x).dtype == torch.float32
    assert norm(x).equal(expected)
    with torch.no_grad():
        assert norm(x).equal(expected)


def test_norm_gives_no_gradient_that_nobody_wants():
    norm = RMSNorm(8)
    norm.weight.requires_grad_(False)
    x = torch.randn(3, 8, requires_grad=True)
    norm(x).sum().backward()
    assert norm.weight.grad is None
    assert x.grad is not None
    norm.weight.requires_grad_(True)
    norm(x.detach()).sum().backward()
    assert norm.weight.grad is not None


def test_norms_differ_by_where_they_round_and_where_they_begin(close):
    x = torch.randn(64, 32, dtype=torch.bfloat16)
    early, late = (away_from_neutral(kind(32)) for kind in (RMSNorm, LateRoundingRMSNorm))
    late.load_state_dict(early.state_dict())
    close(early(x.float()), late(x.float()))
    early, late = early.bfloat16(), late.bfloat16()
    assert not early(x).equal(late(x))
    assert OffsetRMSNorm(4).weight.eq(0).all()
    assert RMSNorm(4).weight.eq(1).all()
    close(OffsetRMSNorm(32)(x.float()), RMSNorm(32)(x.float()))


def test_norms_compute_in_fp32_and_epsilon_counts():
    x = torch.full((1, 4), 1e-3)
    assert RMSNorm(4, eps=1e-6)(x)[0, 0].item() == pytest.approx(0.5**0.5, rel=1e-5)
    assert RMSNorm(4, eps=0.0)(x)[0, 0].item() == pytest.approx(1.0, rel=1e-5)
    large = torch.full((1, 4), 1e20, dtype=torch.bfloat16)  # its square is beyond fp16, not beyond fp32's mean
    assert RMSNorm(4)(large * 1e-2).float().isfinite().all()
    assert "eps=0.5" in repr(RMSNorm(4, eps=0.5))


def test_rotation_is_that_of_complex_numbers(close):
    rope = Rope(6, theta=50.0)
    positions, x = torch.tensor([[0, 3, 11]]), torch.randn(1, 2, 3, 6)
    found = rotate(x, *rope.tables(positions, torch.float32))
    turns = torch.polar(torch.ones(3, 3), positions[0, :, None] * 50.0 ** -(torch.arange(3) / 3))
    expected = torch.complex(x[..., :3], x[..., 3:]) * turns
    close(found, torch.cat((expected.real, expected.imag), -1))
    assert found[:, :, 0].equal(x[:, :, 0])


def test_a_part_of_the_head_may_be_rotated():
    rope = Rope(4, theta=50.0)
    x, tables = torch.randn(1, 2, 3, 10), rope.tables(torch.arange(3)[None], torch.float32)
    found = rotate(x, *tables)
    assert found[..., 4:].equal(x[..., 4:])
    assert found[..., :4].equal(rotate(x[..., :4].contiguous(), *tables))


def test_tables_are_computed_in_fp32_and_then_rounded():
    rope, far = Rope(8, theta=1e4), torch.tensor([[100_001]])
    exact, rounded = rope.tables(far, torch.float32), rope.tables(far, torch.bfloat16)
    for one, other in zip(exact, rounded, strict=True):
        assert one.bfloat16().equal(other)


@pytest.mark.parametrize("dim", [0, 3])
def test_only_pairs_can_be_rotated(dim):
    with pytest.raises(ValueError, match="even and positive"):
        Rope(dim, theta=1.0)


def test_longrope_needs_a_factor_per_pair():
    scaling = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0, 2.0]}
    with pytest.raises(ValueError, match="short_factor has 1 numbers, 2 are needed"):
        Rope(4, theta=1.0, scaling=scaling | {"original_max_position_embeddings": 8})


def test_longrope_treats_each_document_by_its_own_length(close):
    scaling = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [3.0]}
    rope = Rope(2, theta=1.0, scaling=scaling | {"original_max_position_embeddings": 4}, max_position_embeddings=16)
    positions, lengths = torch.tensor([[0, 1, 2, 0, 1]]), torch.tensor([[3, 3, 3, 9, 9]])
    cos = rope.tables(positions, torch.float32, lengths)[0][0, 0, :, 0] / rope.amplitude
    close(cos, torch.tensor([0.0, 1.0, 2.0, 0.0, 1 / 3]).cos())


def test_amplitudes():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
    assert amplitude({}, 8) == 1.0
    assert amplitude(yarn, 8) == pytest.approx(1.1386294)
    assert amplitude(yarn | {"attention_factor": 0.5}, 8) == 0.5
    assert amplitude(yarn | {"mscale": 1.0, "mscale_all_dim": 1.0}, 8) == 1.0
    longrope = {"rope_type": "longrope", "original_max_position_embeddings": 16}
    assert amplitude(longrope, 16) == 1.0
    assert amplitude(longrope, 64) == pytest.approx(1.2247449)
    assert amplitude(longrope | {"factor": 256.0}, 64) == pytest.approx(3**0.5)


def test_older_spellings_of_scalings():
    assert check_rope_scaling({"type": "linear", "factor": 2}) == {"rope_type": "linear", "factor": 2}
    linear = {"type": "linear", "factor": 2}
    assert check_rope_scaling({"rope_type": None} | linear) == check_rope_scaling(linear)
    published = {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096, "finetuned": True}
    assert "finetuned" not in check_rope_scaling(published)  # Yarn-Llama-2, Yarn-Mistral
    assert check_rope_scaling({"rope_type": "default"}) is None
    assert check_rope_scaling(None) is None
    with pytest.raises(ValueError, match="takes no numbers, got factor"):
        check_rope_scaling({"rope_type": "default", "factor": 2.0})


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_is_its_formula(activation, close):
    mlp, x = MLP(6, 10, activation=activation, bias=True), torch.randn(2, 3, 6)
    expected = mlp.down_proj(ACTIVATIONS[activation](mlp.gate_proj(x)) * mlp.up_proj(x))
    close(mlp(x), expected)
    assert all(parameter.shape[0] in (6, 10) for parameter in mlp.parameters())
    assert len(list(MLP(6, 10).parameters())) == 3


@pytest.mark.parametrize("rows", [1, 2, 7, 16])
@pytest.mark.parametrize("bias", [False, True])
def test_few_rows_are_the_same_product(bias, rows, close):
    layer, x = nn.Linear(32, 48, bias=bias).bfloat16(), torch.randn(rows, 1, 32).bfloat16()
    with torch.no_grad():
        found = linear(layer, x)
        assert found.shape == (rows, 1, 48)
        close(found, layer(x))
        close(weight_left(x.float(), layer.weight.float()), x.float() @ layer.weight.float().T)


@pytest.mark.skipif(products.kernel() != "avx512_bf16", reason="no weight is packed here")
@pytest.mark.parametrize("rows", [1, 2, 16, 40])
def test_a_packed_weight_multiplies_to_the_same_bits(rows):
    layers = [nn.Linear(1200, width, bias=False).bfloat16() for width in (48, 16, 33)]
    biased, x = nn.Linear(1200, 40).bfloat16(), torch.randn(rows, 1, 1200).bfloat16()
    packed = products.Packed(nn.ModuleList(layers))
    with torch.no_grad():
        expected = [layer(x) for layer in (*layers, biased)]
        for _ in range(2):
            with products.reading(packed):
                found = [*products.linears(layers, x), linear(biased, x)]
            assert all(a.equal(b) for a, b in zip(found, expected, strict=True))
    assert [copy is not None for _, _, copy in packed.copies.values()] == [True, True]  # three in one, and one


@pytest.mark.skipif(products.kernel() != "avx512_bf16", reason="no weight is packed here")
def test_a_weight_that_changed_is_not_read_from_its_copy():
    layer, x = nn.Linear(64, 8, bias=False).bfloat16(), torch.ones(1, 64).bfloat16()
    packed = products.Packed(layer)
    with torch.no_grad(), products.reading(packed):
        linear(layer, x)
        layer.weight.fill_(1.0)
        assert linear(layer, x).eq(64).all()
        layer.weight = nn.Parameter(torch.full_like(layer.weight, 2.0))
        assert linear(layer, x).eq(128).all()


@pytest.mark.skipif(products.kernel() != "avx512_bf16", reason="no weight is packed here")
@pytest.mark.parametrize("how", ["fused step", "data"])
def test_a_weight_that_changed_without_a_new_version_is_not_read_from_its_copy(how):
    layer, x = nn.Linear(64, 8, bias=False).bfloat16(), torch.ones(1, 64).bfloat16()
    packed = products.Packed(layer)
    with torch.no_grad(), products.reading(packed):
        linear(layer, x)
        if how == "data":
            layer.weight.data = torch.ones(8, 64).bfloat16()
        else:
            layer.weight.grad = torch.ones_like(layer.weight)
            torch.optim.SGD(layer.parameters(), lr=1.0, fused=True).step()
        assert linear(layer, x).equal(nn.functional.linear(x, layer.weight))


def test_no_more_weights_are_packed_than_fit_in_half_of_the_memory(monkeypatch):
    monkeypatch.setattr(products, "kernel", lambda: "avx512_bf16")
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda weight, _: weight)
    first, second = (nn.Parameter(torch.ones(8, 64).bfloat16()) for _ in range(2))
    monkeypatch.setattr(products, "total_memory", lambda _: 2 * 3 * first.nbytes)  # two weights and one copy
    packed = products.Packed(nn.ParameterList([first, second]))
    assert packed.copy_of(first) is not None
    assert packed.copy_of(second) is None
    monkeypatch.setattr(products, "total_memory", lambda _: None)
    assert products.Packed(nn.ParameterList([first])).copy_of(first) is None


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 64, 200])
def test_a_product_in_fp32_is_as_exact_by_onednn_and_by_a_copy_as_by_torch(rows, bias, monkeypatch):
    monkeypatch.setattr(products, "BY_ONEDNN", {torch.float32})
    monkeypatch.setattr(products, "WORTH", 0)
    called, inner = [], products.by_onednn
    monkeypatch.setattr(products, "by_onednn", lambda *words: called.append(words[1]) or inner(*words))
    layer, x = nn.Linear(300, 70, bias=bias), torch.randn(rows, 1, 300)
    exact = nn.functional.linear(x.double(), *(p.double() for p in layer.parameters()))
    with torch.no_grad():
        most = 2 * float((layer(x) - exact).abs().max()) + 1e-6
        for packed in (None, products.Packed(layer)):
            with products.reading(packed):
                assert (linear(layer, x) - exact).abs().max() <= most
    copied = 3 <= rows <= products.MOST_PACKED_ROWS
    assert [weight is layer.weight for weight in called] == ([] if rows == 2 else [True, not copied])
    called.clear()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(layer, x).dtype == torch.bfloat16
    assert not called


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize("frozen", ["nothing", "weight", "bias", "input"])
def test_gradients_in_fp32_are_as_exact_by_onednn_as_by_torch(frozen, monkeypatch):
    monkeypatch.setattr(products, "BY_ONEDNN", {torch.float32})
    monkeypatch.setattr(products, "WORTH", 0)
    layer, x = nn.Linear(300, 70), torch.randn(3, 40, 300, requires_grad=True)
    tensors = {"input": x, "weight": layer.weight, "bias": layer.bias}
    if frozen in tensors:
        tensors.pop(frozen).requires_grad_(False)
    exact = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in (x, layer.weight, layer.bias)]
    upstream = torch.randn(40, 3, 70).transpose(0, 1)

    def derivatives(y, inputs):
        first = torch.autograd.grad(y, inputs, upstream.to(y.dtype), create_graph=True)
        total = sum(g.square().sum() for g in first)
        second = torch.autograd.grad(total, inputs, allow_unused=True) if total.requires_grad else ()
        return [*torch.autograd.grad(y, inputs, upstream.to(y.dtype)), *first, *(g for g in second if g is not None)]

    y = linear(layer, x)
    assert "ByOneDNN" in type(y.grad_fn).__name__
    mine = derivatives(y, [*tensors.values()])
    expected = derivatives(nn.functional.linear(*exact), [tensor for tensor in exact if tensor.requires_grad])
    theirs = derivatives(nn.functional.linear(x, layer.weight, layer.bias), [*tensors.values()])
    assert len(mine) == len(expected) >= 2 * len(tensors)
    for found, reference, plain in zip(mine, expected, theirs, strict=True):
        assert (found - reference).norm() <= 2 * (plain - reference).norm() + 1e-6 * reference.norm()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize("add", [False, True])
def test_matrices_are_multiplied_into_another_part_by_part(add, monkeypatch):
    monkeypatch.setattr(products, "BY_ONEDNN", {torch.float32})
    monkeypatch.setattr(products, "WORTH", 0)
    monkeypatch.setattr(products, "BUFFER", 70 * 8)
    a, b, out = torch.randn(96, 30).T, torch.randn(70, 96).T, torch.randn(30, 70)
    expected = a.double() @ b.double() + out.double() * add
    assert products.multiply_(out, a, b, add=add) is out
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("cpu", "narrowed", "expected"),
    [
        ({"avx512_f": True, "cpu_name": "AMD EPYC"}, None, True),
        ({"avx512_f": True, "cpu_name": "AMD EPYC"}, "avx512_core", True),
        ({"avx512_f": True, "cpu_name": "AMD EPYC"}, "AVX2", False),
        ({"avx512_f": False, "cpu_name": "AMD EPYC"}, None, False),
        ({"avx512_f": True, "cpu_name": "Intel Xeon"}, None, False),
        ({"avx512_f": True}, None, False),
        ({}, None, False),
    ],
)
def test_fp32_is_multiplied_by_onednn_if_only_mkl_leaves_avx512_unused(cpu, narrowed, expected, monkeypatch):
    monkeypatch.setattr(torch._C, "has_mkl", True)
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    if narrowed:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", narrowed)
    assert products.fp32_by_onednn(cpu) == (expected and torch._C._has_mkldnn)


@pytest.mark.parametrize(
    ("narrowed", "amx", "bf16", "expected"),
    [
        (None, True, True, "amx"),
        ("AVX512_CORE_AMX", True, True, "amx"),
        ("AVX512_CORE_BF16", True, True, "avx512_bf16"),
        ("AVX512_CORE", True, True, "other"),
        ("avx2", False, True, "other"),
        ("", False, True, "avx512_bf16"),
        (None, False, False, "other"),
    ],
)
def test_the_kernel_of_a_few_rows_follows_from_the_cpu(narrowed, amx, bf16, expected, monkeypatch):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    if narrowed is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", narrowed)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    assert products.kernel.__wrapped__() == expected
    layer, x = nn.Linear(32, 48).bfloat16(), torch.randn(3, 32).bfloat16()
    monkeypatch.setattr(products, "kernel", lambda: expected)
    with torch.no_grad():
        left = products.weight_left(x, layer.weight, layer.bias)
        assert linear(layer, x).equal(left if expected == "amx" else layer(x))


def test_linear_calls_the_layer_wherever_somebody_may_be_watching():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    x, seen = torch.randn(1, 8).bfloat16(), []
    with torch.no_grad():
        layer = Doubled(8, 4).bfloat16()
        assert linear(layer, x).equal(layer(x))
        plain = nn.Linear(8, 4).bfloat16()
        plain.register_forward_hook(lambda *_: seen.append(1))
        linear(plain, x)
    assert seen
    trained = nn.Linear(8, 4).bfloat16()
    linear(trained, x).sum().backward()
    assert trained.weight.grad is not None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [RMSNorm, LateRoundingRMSNorm, OffsetRMSNorm])
def test_norms_in_blocks_are_norms(kind, dtype, in_small_blocks, close):
    norm = away_from_neutral(kind(24)).to(dtype)
    x, upstream = torch.randn(3, 5, 24, dtype=dtype, requires_grad=True), torch.randn(3, 5, 24, dtype=dtype)
    with torch.no_grad():
        expected = norm(x)
    gradients = torch.autograd.grad(norm(x), (x, norm.weight), upstream)
    in_small_blocks(100)  # 4 rows
    with torch.no_grad():
        assert norm(x).equal(expected)
    found = torch.autograd.grad(norm(x), (x, norm.weight), upstream)
    assert found[0].equal(gradients[0])
    close(found[1], gradients[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gating_in_blocks_is_gating_with_the_same_gradients(dtype, in_small_blocks):
    act = ACTIVATIONS["silu"]
    gate, up = (torch.randn(3, 7, 16, dtype=dtype, requires_grad=True) for _ in range(2))
    expected, upstream = act(gate) * up, torch.randn(3, 7, 16, dtype=dtype)
    gradients = torch.autograd.grad(expected, (gate, up), upstream)
    in_small_blocks(64)
    found = elementwise.gated(act, gate, up)
    assert found.grad_fn.name() == "GatedSiluBackward"
    assert found.equal(expected)
    for one, other in zip(torch.autograd.grad(found, (gate, up), upstream), gradients, strict=True):
        assert one.equal(other)
    with torch.no_grad():
        assert elementwise.gated(act, gate, up).equal(expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_in_place_and_its_gradient_are_the_bits_of_the_formula(dtype, in_small_blocks, close):
    in_small_blocks(60)
    x, upstream = (torch.randn(2, 3, 5, 8, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(2))
    cos, sin = Rope(8, theta=100.0).tables(torch.arange(3)[None], dtype)
    expected = x * cos + x.roll(4, -1) * sin
    found = rotate(x, cos, sin)
    assert found.grad_fn.name() == "RotateBackward"
    assert found.equal(expected)
    for one, other in zip(
        torch.autograd.grad(found, x, upstream), torch.autograd.grad(expected, x, upstream), strict=True
    ):
        close(one, other)
    with torch.no_grad():
        assert rotate(x, cos, sin).equal(expected)


def test_small_tensors_take_the_formulas_and_so_do_gates_that_are_not_mapped_anew(monkeypatch):
    for elements, kernels in ((64, False), (72, True)):
        monkeypatch.setattr(elementwise, "NORMED", 64)
        monkeypatch.setattr(elementwise, "ROTATED", 64)
        monkeypatch.setattr(blocks, "KEPT", 64 * 4)
        x = torch.randn(elements // 8, 8, requires_grad=True)
        cos, sin = Rope(8, theta=100.0).tables(torch.arange(len(x))[None], torch.float32)
        found = RMSNorm(8)(x), rotate(x[None, None], cos, sin), elementwise.gated(F.silu, x, x)
        names = [y.grad_fn.name() for y in found]
        assert (names == ["NormAndWeightBackward", "RotateBackward", "GatedSiluBackward"]) == kernels
        assert any(name.removesuffix("Backward") in vars(elementwise) for name in names) == kernels
        assert elementwise.gated(F.gelu, x, x).grad_fn.name() == "MulBackward0"


def test_a_compiled_graph_does_not_compile_again_where_kernels_begin(in_small_blocks, monkeypatch):
    torch._dynamo.reset()
    layers, graphs = nn.Sequential(RMSNorm(8), MLP(8, 16)), []

    def both(x, cos, sin):
        return rotate(layers(x)[None, None], cos, sin)

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    in_small_blocks(8)
    monkeypatch.setattr(elementwise, "NORMED", 99)
    monkeypatch.setattr(elementwise, "ROTATED", 99)
    compiled = torch.compile(both, backend=counting, dynamic=True)
    for length in (10, 12, 14, 40):
        x = torch.randn(length, 8)
        tables = Rope(8, theta=100.0).tables(torch.arange(length)[None], torch.float32)
        assert compiled(x, *tables).allclose(both(x, *tables), atol=1e-6)
        with torch.no_grad():
            assert compiled(x, *tables).allclose(both(x, *tables), atol=1e-6)
    assert len(graphs) == 2  # with gradients, and without


def test_a_rotation_with_tables_of_another_dtype_promotes_like_the_formula(in_small_blocks):
    cos, sin = Rope(8, theta=100.0).tables(torch.arange(6)[None], torch.float32)
    x = torch.randn(1, 2, 6, 8).bfloat16()
    expected = rotate(x, cos, sin)
    in_small_blocks(8)
    assert rotate(x, cos, sin).equal(expected)
    assert expected.dtype == torch.float32


def test_a_block_fills_the_cache_of_a_core_within_bounds(tmp_path):
    assert blocks.core_cache(tmp_path / "missing") == 2**20
    for index, (level, size) in enumerate([("1", "48K"), ("2", "512K"), ("3", "32768K")]):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "level").write_text(f"{level}\n")
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert blocks.core_cache(tmp_path) == 2**19
    (tmp_path / "index1" / "size").write_text("half a megabyte\n")
    assert blocks.core_cache(tmp_path) == 2**20
    assert [blocks.block_size(2**bits) for bits in (10, 18, 19, 20, 21, 30)] == [2**16, 2**16, 2**17] + 3 * [2**18]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_of_one_row_is_that_of_many(dtype, close):
    norm, x = away_from_neutral(RMSNorm(24, eps=1e-3)).to(dtype), torch.randn(1, 2, 24, dtype=dtype)
    with torch.no_grad():
        found = norm(x[:, :1])
    close(found, norm(x)[:, :1])
    bare, nothing = RMSNorm(24, eps=0.0).to(dtype), torch.zeros(1, 24, dtype=dtype)
    with torch.no_grad():
        assert bare(nothing).isnan().all()
    assert bare(nothing).isnan().all()


def test_gradients_per_sample_go_through_every_block(in_small_blocks, close):
    in_small_blocks(8)
    layers = nn.Sequential(away_from_neutral(RMSNorm(8)), MLP(8, 16))
    parameters, x = dict(layers.named_parameters()), torch.randn(3, 4, 8)
    cos, sin = Rope(8, theta=100.0).tables(torch.arange(4)[None], torch.float32)

    def loss(parameters, x):
        y = torch.func.functional_call(layers, parameters, (x,))
        return rotate(y[None, None], cos, sin).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for index in range(3):
        expected = torch.autograd.grad(loss(parameters, x[index]), list(parameters.values()))
        for name, gradient in zip(parameters, expected, strict=True):
            close(found[name][index], gradient)


@pytest.mark.parametrize("create_graph", [False, True])
def test_second_derivatives_are_those_of_the_formulas(create_graph, monkeypatch, in_small_blocks, close):
    in_small_blocks(8)
    layers = nn.Sequential(away_from_neutral(RMSNorm(8)), MLP(8, 16))
    x = torch.randn(3, 4, 8, requires_grad=True)
    cos, sin = Rope(8, theta=100.0).tables(torch.arange(4)[None], torch.float32)
    inputs = [x, *layers.parameters()]
    directions = [torch.randn_like(one) for one in inputs]

    def product_with_the_hessian():
        loss = rotate(layers(x)[None], cos, sin).square().sum()
        slopes = torch.autograd.grad(loss, inputs, create_graph=True)
        along = sum((slope * direction).sum() for slope, direction in zip(slopes, directions, strict=True))
        return torch.autograd.grad(along, inputs, create_graph=create_graph)

    assert layers[0](x).grad_fn.name() == "NormAndWeightBackward"
    found = product_with_the_hessian()
    for module in (blocks, elementwise):
        monkeypatch.setattr(module, "is_eager", lambda _: False)
    assert layers[0](x).grad_fn.name() != "NormAndWeightBackward"
    for one, other in zip(found, product_with_the_hessian(), strict=True):
        close(one, other, 256)


def test_gradients_with_a_graph_are_wanted_for_some_inputs_only(in_small_blocks, close):
    in_small_blocks(8)
    gate, up = torch.randn(3, 16, requires_grad=True), torch.randn(3, 16)
    (slope,) = torch.autograd.grad(elementwise.gated(F.silu, gate, up).sum(), gate, create_graph=True)
    s = gate.sigmoid()
    d = s * (1 - s)
    close(slope, (s + gate * d) * up)
    close(torch.autograd.grad(slope.sum(), gate)[0], d * (2 + gate * (1 - 2 * s)) * up)
    (slope,) = torch.autograd.grad(elementwise.gated(F.silu, gate, gate * 2).sum(), gate, create_graph=True)
    close(slope, 2 * gate * (s + gate * d) + 2 * gate * s)  # each factor counted once


def test_norm_with_weights_of_another_dtype_promotes_however_many_rows_there_are(in_small_blocks):
    norm, x = away_from_neutral(RMSNorm(8)), torch.randn(30, 8).bfloat16()
    expected = norm(x)
    in_small_blocks(100)
    with torch.no_grad():
        assert norm(x).equal(expected)
        assert norm(x).dtype == torch.float32


def test_backward_hooks_and_patched_forwards_of_a_layer_are_called():
    layer, x, seen = nn.Linear(8, 4), torch.randn(2, 8, requires_grad=True), []
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    linear(layer, x).sum().backward()
    layer.register_full_backward_pre_hook(lambda *_: seen.append("before"))
    linear(layer, x).sum().backward()
    assert seen == ["backward", "before", "backward"]
    patched = nn.Linear(8, 4)
    patched.forward = lambda x: x * 2
    assert linear(patched, x).equal(x * 2)
    flat = nn.Linear(8, 4)
    expected, weight = flat(x), flat.weight.detach()
    del flat.weight
    flat.weight = weight  # a view of a flat parameter, as in FSDP 1
    assert linear(flat, x).equal(expected)


@pytest.mark.parametrize("build", [lambda: MLP(4, 8, activation="siluu"), lambda: Experts(2, 4, 8, activation="siluu")])
def test_an_unknown_activation_is_named_with_the_known_ones(build):
    with pytest.raises(ValueError, match=r"activation: expected one of silu, .*, got 'siluu'"):
        build()
