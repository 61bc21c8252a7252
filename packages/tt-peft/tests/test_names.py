import re

import pytest

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
