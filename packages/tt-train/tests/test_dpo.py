"""The recipe dpo from rows to a result."""

import json
import math

import pytest
import torch

from tt_train import compose
from tt_train.recipes import dpo
from tt_train.run_files import read_rows

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau".split()


def prompt(index):
    return "say " + " ".join(WORDS[(index * step + step) % len(WORDS)] for step in range(1, 3 + index % 3))


def pair(index):
    """The chosen answer says good, the rejected one bad, with two words of the question."""
    words = prompt(index).split()[1:3]
    return {"prompt": prompt(index), "chosen": f"alpha {words[0]}", "rejected": f"beta {words[1]} {words[0]}"}


def judged(index):
    good = index % 2 == 0
    return {"prompt": prompt(index), "completion": pair(index)["chosen" if good else "rejected"], "label": good}


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair(index)) + "\n" for index in range(24)))
    return file


@pytest.fixture(scope="session")
def judged_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("judged") / "judged.jsonl"
    file.write_text("".join(json.dumps(judged(index)) + "\n" for index in range(24)))
    return file


@pytest.fixture
def run(words, pairs_file, judged_file, tmp_path):
    """``run("loss.name=hinge", ...)``: the rows of metrics.jsonl of a run on pairs, or judged rows for kto."""

    def made(*more, name="run", resume=None):
        rows = judged_file if "loss.name=kto" in more else pairs_file
        overrides = [*words, f"data.train={rows}", "samples.num=0", f"output_dir={tmp_path / name}", *more]
        made.path = dpo.main(compose("dpo", overrides=overrides), resume=resume)
        return list(read_rows(made.path / "metrics.jsonl"))

    return made


LN_2 = torch.tensor(math.log(2)).item()  # as fp32 has it


@pytest.mark.parametrize("method", [(), ("adapter.rank=4",), ("adapter.rank=4", "adapter.use_dora=true"),
                                    ("adapter.rank=4", "adapter.quantize_base=true"), ("data.packing=true",),
                                    ("adapter.rank=4", "adapter.dropout=0.5"), ("model.dtype=bf16",),
                                    ("adapter.rank=4", "model.dtype=bf16"), ("activation_checkpointing=true",),
                                    ("adapter.rank=4", "adapter.target_modules=all-linear")])  # fmt: skip
def test_the_first_loss_is_ln_2_with_rewards_of_exactly_0_and_the_last_one_is_lower(run, method):
    rows = run(*method)
    assert rows[0]["loss"] == pytest.approx(LN_2, rel=1e-6)  # a sum of pairs in fp32
    assert rows[0]["rewards_chosen"] == rows[0]["rewards_rejected"] == 0.0
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["rewards_margin"] > 0
