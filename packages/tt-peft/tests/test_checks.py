"""What an adapter file remembers of its base: sampled at exact places, whatever the size."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tt_peft
from tt_peft.adapter_files.checks import fingerprint


def _expanded(*shape: int) -> nn.Parameter:
    """A parameter of any size over one value of memory."""
    return nn.Parameter(torch.full((1,), 0.5, dtype=torch.bfloat16).expand(*shape), requires_grad=False)


def _lm(rows: int) -> nn.ModuleDict:
    model = nn.ModuleDict({"embed_tokens": nn.Embedding(4, 1024), "up_proj": nn.Linear(8, 8)})
    model["embed_tokens"].weight = _expanded(rows, 1024)
    return model


@pytest.mark.parametrize("rows", [2**14 + 1, 2**21 + 1], ids=["above 2**24", "above 2**31"])
def test_an_adapter_is_saved_and_loaded_beside_a_tensor_of_any_size(tmp_path: Path, rows: int) -> None:
    model = _lm(rows)
    tt_peft.apply_lora_(model, tt_peft.LoRAConfig(rank=2, target_modules=("up_proj",)))
    tt_peft.save_adapter(model, tmp_path / "adapter", base_model="x")
    other = _lm(rows)
    other["up_proj"].load_state_dict({k: v for k, v in model["up_proj"].state_dict().items() if "adapters" not in k})
    tt_peft.load_adapter(other, tmp_path / "adapter")
    assert fingerprint(other)["parameters"] == rows * 1024 + 72


def test_the_first_and_the_last_value_are_sampled_and_a_small_base_keeps_its_fingerprint() -> None:
    large = torch.zeros(2**24 + 3, dtype=torch.bfloat16)
    large[0], large[-1] = 3, 7
    assert _values(large.view(1, -1))[::15] == [3, 7]
    every_other = [0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29, 32]
    assert _values(torch.arange(33.0).view(3, 11)) == every_other
    transposed = torch.arange(33.0).view(11, 3).T
    assert _values(transposed) == transposed.flatten()[every_other].tolist()
    assert _values(torch.tensor(2.0)) == [2]
    assert _values(torch.zeros(0, 3)) == []


def _values(weight: Tensor) -> list[float]:
    model = nn.Module()
    model.weight = nn.Parameter(weight)
    return list(fingerprint(model)["values"]["weight"])
