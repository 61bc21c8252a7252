import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tt_peft
from tt_peft import LoRAConfig, apply_lora_, nf4
from tt_peft.nf4 import check_size, dequantize, frozen_linear, nf4_tensor_class, to_nf4

INNER = ("quantized_data", "scaler_mean", "quantization_factor", "quantized_scalers", "nf4")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(128, 256), (64, 64), (1, 64), (96, 160)])
def test_codes_scales_and_values_are_those_of_torchao(dtype, shape, monkeypatch):
    monkeypatch.setattr(nf4, "_PART", 100)
    monkeypatch.setattr(nf4, "_TILE", 256)
    torch.manual_seed(0)
    weight = (torch.randn(shape) * torch.rand(shape[0], 1)).to(dtype)
    ours = to_nf4(weight)
    theirs = nf4_tensor_class().from_tensor(weight, 64, ours.scaler_block_size)
    for name in INNER:
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert torch.equal(dequantize(ours), theirs.get_original_weight())
    assert ours.shape == weight.shape
    assert ours.dtype == dtype
    relative = (dequantize(ours).float() - weight.float()).norm() / weight.float().norm()
    assert 0.05 < relative < 0.15


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_of_zeros_stay_zero(dtype):
    weight = torch.randn(4, 64)
    weight[1] = 0
    assert not dequantize(to_nf4(weight.to(dtype)))[1].any()
    assert not dequantize(to_nf4(torch.zeros(2, 64, dtype=dtype))).any()
    ones = torch.ones(4, 64, dtype=dtype)
    assert torch.equal(dequantize(to_nf4(ones)), ones)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_lookup_of_every_code_equals_the_arithmetic_for_the_compiler(dtype, monkeypatch):
    weight = to_nf4(torch.randn(64, 256, dtype=dtype))
    looked_up = dequantize(weight)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(dequantize(weight), looked_up)


def test_the_large_groups_of_torchao_are_used_where_they_fit():
    assert to_nf4(torch.randn(128, 256)).scaler_block_size == 256
    assert to_nf4(torch.randn(64, 64)).scaler_block_size == 64
    assert to_nf4(torch.randn(3, 64)).scaler_block_size == 1


def test_a_size_that_does_not_fit_and_broken_values_are_refused_by_name(make_lm):
    with pytest.raises(
        ValueError, match=r"weight \[5, 7\] cannot be NF4: its size is not a multiple of 64; put it in quant"
    ):
        to_nf4(torch.randn(5, 7))
    with pytest.raises(ValueError, match="not a multiple of 64"):
        check_size(torch.randn(5, 7), "x")
    model = nn.ModuleDict({"up": nn.Linear(8, 8), "odd": nn.Linear(5, 7)})
    with pytest.raises(ValueError, match=r"odd.weight \[7, 5\] cannot be NF4"):
        apply_lora_(model, LoRAConfig(rank=2, target_modules="up", quantize_base=True))
    assert type(model["up"]) is nn.Linear
    apply_lora_(model, LoRAConfig(rank=2, target_modules="up", quantize_base=True, quantize_skip=("odd",)))
    broken = make_lm()
    broken.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.weight has NaN or infinite values"):
        tt_peft.quantize_nf4_(broken)


@pytest.mark.parametrize("bias", [True, False])
def test_the_linear_layer_and_its_gradients_are_those_of_the_dequantized_weight(bias):
    torch.manual_seed(0)
    weight, b = to_nf4(torch.randn(32, 64)), torch.randn(32, requires_grad=True) if bias else None
    x = torch.randn(2, 3, 64, requires_grad=True)
    y = frozen_linear(x, weight, b)
    y.square().sum().backward()
    found = [x.grad, b.grad if bias else None]
    x2, b2 = x.detach().requires_grad_(), b.detach().requires_grad_() if bias else None
    expected = F.linear(x2, dequantize(weight), b2)
    expected.square().sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(found[0], x2.grad)
    if bias:
        torch.testing.assert_close(found[1], b2.grad)


def test_it_equals_torchao_s_linear():
    weight, x = to_nf4(torch.randn(128, 256)), torch.randn(4, 256)
    torch.testing.assert_close(frozen_linear(x, weight), F.linear(x, weight))  # torchao takes over F.linear


def test_only_codes_are_kept_for_the_backward():
    weight = to_nf4(torch.randn(64, 64))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = frozen_linear(torch.randn(3, 64, requires_grad=True), weight)
    assert saved == []
    y.sum().backward()


def test_autocast_casts_forward_and_gradient():
    weight, x = to_nf4(torch.randn(64, 64)), torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = frozen_linear(x, weight)
    y.float().sum().backward()
    assert (y.dtype, x.grad.dtype) == (torch.bfloat16, torch.float32)


def test_torchao_is_imported_in_one_module_and_only_when_something_is_quantized():
    folder = Path(tt_peft.__file__).parent
    importers = [p.name for p in folder.glob("*.py") if "torchao." in p.read_text()]
    assert importers == ["nf4.py"]
    code = (
        "import sys, torch, tt_peft; from torch import nn; m = nn.Sequential(nn.Linear(8, 8));"
        "tt_peft.apply_lora_(m, tt_peft.LoRAConfig(rank=2, target_modules='all-linear')); m(torch.randn(1, 8));"
        "assert 'torchao' not in sys.modules; tt_peft.quantize_nf4_(m); assert 'torchao' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_old_and_a_new_place_of_nf4_are_found(monkeypatch):
    import importlib

    real = nf4_tensor_class()
    places = []

    def import_module(name):
        places.append(name)
        if name == "torchao.dtypes.nf4tensor":
            return type("module", (), {"NF4Tensor": real})
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", import_module)
    nf4_tensor_class.cache_clear()
    assert nf4_tensor_class() is real
    assert places == ["torchao.quantization", "torchao.dtypes.nf4tensor"]
    nf4_tensor_class.cache_clear()
    monkeypatch.setattr(importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    with pytest.raises(ImportError, match=r"this torchao has no NF4Tensor; quantize_base needs torchao >= 0.15"):
        nf4_tensor_class()
    monkeypatch.undo()
    nf4_tensor_class.cache_clear()


def _saved(weight):
    torch.save(weight, stream := io.BytesIO())
    stream.seek(0)
    return torch.load(stream, weights_only=False)


COPIES = {
    "clone": torch.clone,
    "deepcopy": copy.deepcopy,
    "to": lambda w: w.to("cpu", copy=True),
    "pickle": lambda w: pickle.loads(pickle.dumps(w)),
    "save": _saved,
}
SAME = {"detach": torch.Tensor.detach, "copy": copy.copy, "data": lambda w: w.data, "to": lambda w: w.to("cpu")}


@pytest.mark.parametrize("parameter", [True, False])
@pytest.mark.parametrize("shape", [(128, 256), (64, 64), (3, 64)])
def test_a_copied_nf4_weight_has_the_same_codes_in_memory_of_its_own(shape, parameter):
    torch.manual_seed(0)
    weight = to_nf4(torch.randn(shape, dtype=torch.bfloat16))
    weight = nn.Parameter(weight, requires_grad=False) if parameter else weight
    for how in (*COPIES.values(), *SAME.values()):
        made = how(weight)
        assert torch.equal(dequantize(made), dequantize(weight))
        assert all(torch.equal(getattr(made, name), getattr(weight, name)) for name in INNER)
        shared = made.quantized_data.data_ptr() == weight.quantized_data.data_ptr()
        assert shared == (how in SAME.values())
    assert torch.equal(weight.to(torch.float32), dequantize(weight).float())
    clone = weight.clone()
    clone.quantized_data.zero_()
    assert not torch.equal(dequantize(clone), dequantize(weight))


def test_a_pickled_nf4_layer_can_be_cloned_in_another_process(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    tt_peft.quantize_nf4_(model)
    (tmp_path / "model").write_bytes(pickle.dumps(model))
    code = (
        "import pickle, sys, torch; model = pickle.load(open(sys.argv[1], 'rb')); weight = model[0].weight;"
        "assert torch.equal(weight.clone().get_original_weight(), weight.get_original_weight())"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "model")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_matrix_above_2_24_values_is_quantized_to_its_last_block_and_one_above_2_31_is_counted(monkeypatch):
    weight = torch.full((1, 1), 0.5, dtype=torch.bfloat16).expand(2**14 + 4, 1024).contiguous()
    weight[-1] = torch.linspace(-1, 1, 1024)
    quantized = to_nf4(weight)
    assert torch.equal(dequantize(quantized)[-1], dequantize(to_nf4(weight[-4:]))[-1])
    assert torch.equal(dequantize(quantized)[:-1].unique(), torch.tensor([0.5], dtype=torch.bfloat16))
    monkeypatch.setattr(nf4, "_PART", 2**22)
    cls, blocks = nf4_tensor_class(), torch.empty(2**25 + 1, 64, device="meta", dtype=torch.bfloat16)
    packed, absmax = nf4._pack(cls, blocks, nf4._levels(cls, blocks.dtype, blocks.device))
    assert (packed.numel(), absmax.numel()) == (2**30 + 32, 2**25 + 1)
    check_size(torch.empty(2**21 + 1, 1024, device="meta"), "x")
