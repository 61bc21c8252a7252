"""``tt plan``: what a run will need, before it is started."""

import json

import pytest


def config(model_dir, rows_file, *more):
    return ["sft", f"model.path={model_dir}", f"data.train={rows_file}", "max_steps=3", "data.max_seq_len=64", *more]


def test_a_plan_shows_memory_by_part_steps_and_time(tt, model_dir, rows_file):
    found = tt("plan", *config(model_dir, rows_file), "--memory", "100GiB", "--flops", "1T")
    assert found.code == 0, found.err
    for words in ("parameters", "weights of the model", "in all", "what would save memory", "3 steps", "time: about"):
        assert words in found.out
    assert "is the largest that fits into 100 GiB" in found.out


def test_a_plan_as_json_adds_up(tt, model_dir, rows_file):
    found = tt("plan", *config(model_dir, rows_file, "adapter.rank=4"), "--json")
    answer = json.loads(found.out)
    parts = dict(answer["memory"])
    assert parts.pop("total") == sum(parts.values())
    assert 0 < answer["trained"] < answer["parameters"]
    assert answer["steps"] == 3


def test_measured_steps_give_the_time(tt, model_dir, rows_file):
    found = tt("plan", *config(model_dir, rows_file), "--measure", "--json")
    answer = json.loads(found.out)
    assert answer["seconds"] == 3 * answer["measured"]["seconds"] > 0


def test_a_size_or_a_rate_that_is_none_is_refused(tt, model_dir, rows_file):
    for text in ("much", "24", "24G", "0GB", "24 gbit"):  # not 24 bytes; G may mean either
        found = tt("plan", *config(model_dir, rows_file), "--memory", text)
        assert found.code == 2
        assert f"expected a size with a unit, such as 24GiB (2**30) or 80GB (10**9), got '{text}'" in found.err
    found = tt("plan", *config(model_dir, rows_file), "--flops", "0")
    assert found.code == 2
    assert "expected operations per second" in found.err


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GB", 80 * 10**9), ("80 GiB", 80 * 2**30), ("1.5tib", 3 * 2**39), ("500MB", 500 * 10**6), ("64kb", 64_000)],
)
def test_gb_are_powers_of_ten_and_gib_of_two(text, size):
    from tt_cli.verbs.plan import _bytes

    assert _bytes(None, None, text) == size


def test_a_config_of_torchtune_is_planned_with_the_batch_of_all_processes(tt, model_dir, rows_file):
    words = ["--config", "llama2/7B_full", *config(model_dir, rows_file)[1:3], "epochs=1", "max_steps=null"]
    found = tt("plan", "full_finetune_distributed", *words, "device=cpu", "--nproc", "2", "--json")
    assert found.code == 0, found.err
    assert found.json["steps"] == len(rows_file.read_text().splitlines()) // (2 * 2)  # torchtune's 2 on each of 2


def test_processes_that_cannot_share_the_weights_are_named_as_in_a_run(tt, model_dir, rows_file):
    words = ["parallel.shard=2", "batch_size=6", "micro_batch_size=1"]
    found = tt("plan", *config(model_dir, rows_file, *words), "--nproc", "3")
    assert found.code == 2
    assert "parallel: shard 2 does not divide the 3 processes; take one of 1, 3" in found.err


def test_a_mistake_in_the_config_is_that_of_validate(tt, model_dir, rows_file):
    found = tt("plan", *config(model_dir, rows_file, "adapter.rnak=4"))
    assert found.code == 2
    assert "did you mean 'adapter.rank'" in found.err


def test_what_one_process_cannot_measure_is_refused(tt, model_dir, rows_file):
    found = tt("plan", *config(model_dir, rows_file), "--measure", "--nproc", "2")
    assert found.code == 2
    assert "leave out --nproc" in found.err
