"""Which tensors of a module a checkpoint holds."""

import torch
from torch import nn

from tt_ckpt.hf.base_tensors import base_tensors


class Adapted(nn.Linear):
    """A linear layer that owns an adapter one level down."""

    def __init__(self):
        super().__init__(2, 2, bias=False)
        self.adapters = nn.ModuleDict({"default": nn.Linear(2, 2, bias=False)})

    def adapter_params(self):
        return ["adapters.default.weight"]


def test_what_adapters_own_is_left_out_however_deep_it_is():
    model = nn.Sequential(Adapted(), nn.Linear(2, 1))
    assert [base.names[0] for base in base_tensors(model)] == ["0.weight", "1.weight", "1.bias"]
    model[0].adapter_params = list
    assert "0.adapters.default.weight" in [base.names[0] for base in base_tensors(model)]


def test_a_tied_tensor_is_one_base_tensor_with_two_names():
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    model["b"].weight = model["a"].weight
    (base,) = base_tensors(model)
    assert base.names == ["a.weight", "b.weight"]
    base.put(torch.ones(2, 2))
    assert model["a"].weight is model["b"].weight
