"""``tt run dpo`` on two ranks: the curve of one process, with every way to keep the reference and the weights."""

import json

import pytest

from tt_train import compose
from tt_train.recipes import dpo

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu".split()
CASES = {
    "full": ["parallel.shard=2"],  # the frozen copy is sharded too
    "lora": ["adapter.rank=4"],
    "qlora": ["adapter.rank=4", "adapter.quantize_base=true", "parallel.shard=2"],
    "packed": ["adapter.rank=4", "data.packing=true", "data.max_seq_len=64"],
    "kto": ["loss.name=kto", "adapter.rank=4", "parallel.shard=2"],
}


def run(words):
    dpo.main(compose("dpo", overrides=words))


@pytest.fixture
def preferences(tmp_path):
    """A file of pairs, and one of judged answers; answers of one to three words."""

    def row(index, judged):
        first, second = WORDS[index % 13], WORDS[(index * 5 + 2) % 13]
        chosen, rejected = f"{first} {second}" if index % 3 else first, f"{second} mu {first}"
        if judged:
            return {"prompt": f"say {second}", "completion": chosen if index % 2 else rejected, "label": index % 2 == 1}
        return {"prompt": f"say {second}", "chosen": chosen, "rejected": rejected}

    for name in ("pairs", "judged"):
        rows = [json.dumps(row(index, name == "judged")) + "\n" for index in range(22)]  # the last step is uneven
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    return tmp_path


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_prefer_as_one_process_does(case, words, preferences, ranks, monkeypatch):
    monkeypatch.setattr("tt_train.run.finish.write_report", lambda runs, **more: ("", ""))  # it takes longest
    rows = preferences / ("judged.jsonl" if case == "kto" else "pairs.jsonl")
    size = [] if case == "packed" else ["micro_batch_size=2"]
    words = [*words, *CASES[case], f"data.train={rows}", "samples.num=0", "loss.beta=0.5", *size, "save_last=false"]
    words = [*words, "batch_size=2", "micro_batch_size=1"] if case == "packed" else words
    found = {}
    for ways in (1, 2):
        ranks(ways, run, [*words, f"output_dir={preferences / str(ways)}"])
        lines = (preferences / str(ways) / "metrics.jsonl").read_text().splitlines()
        found[ways] = [json.loads(line) for line in lines]
    assert len(found[1]) == 6
    assert found[1][0]["rewards_margin"] == 0.0
    for step, (one, two) in enumerate(zip(found[1], found[2], strict=True)):
        assert list(one) == list(two)  # in the same order
        for key, value in one.items():
            if key in ("loss", "grad_norm", "tokens") or key.startswith(("rewards", "log")):
                assert two[key] == pytest.approx(value, rel=1e-4 if step else 1e-5, abs=2e-5), (step, key)
