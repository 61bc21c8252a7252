import re
import sys

import pytest
import torch
from torch import nn

import tt_peft
from tt_peft.names import Patterns, known, named

NAMES = [f"model.layers.{i}.{part}" for i in range(12) for part in ("self_attn.q_proj", "mlp.up_proj")]


def slow(patterns, name):
    """As PEFT reads the keys: one after the other."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name)), None)


@pytest.mark.parametrize(
    "patterns",
    [
        {"q_proj": 1, "up_proj": 2},
        {"layers.1.self_attn.q_proj": 1, "q_proj": 2},
        {r"model\.layers\.1\.mlp\.up_proj": 1, r".*\.1\..*": 2, "up_proj": 3},
        {"(q|up)_proj": 1, "q_proj": 2},
        {"q_proj": 2, "(q|up)_proj": 1},
        {r"layers\.(1|2)\.": 1, r"(?!.*layers\.3).*_proj": 2},
        {"proj": 1, "_proj": 2, "mlp": 3},
    ],
)
def test_the_first_pattern_that_peft_would_use_is_found(patterns):
    table = Patterns(patterns)
    assert [table.get(name, None) for name in NAMES] == [patterns.get(slow(patterns, name)) for name in NAMES]
    assert table.get("nothing", 7) == patterns.get(slow(patterns, "nothing"), 7)
    assert set(table.meaning(NAMES)) == {p for p in patterns if any(slow({p: 0}, name) for name in NAMES)}


def test_names_are_whole_parts_from_the_right():
    assert named(["1.mlp.up_proj", "3.self_attn.q_proj"], NAMES) == [NAMES[3], NAMES[6]]
    assert known(["q_proj", "proj", "layers.11.mlp.up_proj", "layers.12.mlp.up_proj"], NAMES) == [
        "q_proj",
        "layers.11.mlp.up_proj",
    ]


class Stacks(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.zeros(2, 4, 4)), nn.Parameter(torch.zeros(2, 4, 4))


def calls_of(action):
    """How many functions ``action`` calls: its time, without that of this machine."""
    count = 0

    def counted(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counted)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("kind", ["full names", "patterns", "saved and excluded", "stacked", "skipped"])
def test_the_work_grows_with_the_number_of_modules_and_not_with_its_square(kind):
    def adapt(number):
        layers = [
            nn.ModuleDict({"q": nn.Linear(4, 4), "v": nn.Linear(4, 4), "experts": Stacks()}) for _ in range(number)
        ]
        model = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        q, v = ([f"layers.{at}.{name}" for at in range(number)] for name in "qv")
        stacks = [f"layers.{at}.experts.{name}" for at in range(number) for name in ("up", "down")]
        config = {
            "full names": {"target_modules": q + v},
            "patterns": {
                "target_modules": ("q", "v"),
                "rank_pattern": dict.fromkeys(q, 2),
                "alpha_pattern": dict.fromkeys(v, 3),
            },
            "saved and excluded": {"target_modules": q + v, "modules_to_save": v, "exclude_modules": v},
            "stacked": {"target_modules": (), "target_parameters": stacks},
            "skipped": {"target_modules": q, "quantize_base": True, "quantize_skip": q + v},
        }[kind]
        asked = tt_peft.LoRAConfig(**{"rank": 1, "target_modules": ("q", "v"), **config})
        return calls_of(lambda: tt_peft.apply_lora_(model, asked))

    adapt(2)
    assert adapt(160) < 4.5 * adapt(40)
