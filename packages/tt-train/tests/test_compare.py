"""A run that repeats another says so, and one that does not says where it differs first."""

import json

import pytest
import torch

import tt_data
from tt_train import ConfigError, compose
from tt_train.recipes import sft
from tt_train.records.run_files import read_json, read_rows
from tt_train.run.compare import check_comparable, compare, digest_of
from tt_train.run.console import Console


class Silent(Console):
    def note(self, text):
        pass

    warn = note


@pytest.fixture
def train(words, monkeypatch):
    monkeypatch.setattr("tt_train.run.finish.write_report", lambda runs, **more: ("", ""))

    def run(path, *more, **kwargs):
        config = compose("sft", overrides=[*words, "samples.num=0", f"output_dir={path}", *more])
        return sft.main(config, console=Silent(), **kwargs)

    return run


def rows(*lengths, pad=0):
    made = []
    for number, length in enumerate(lengths, 1):
        ids = [(7 * number + i) % 50 + 1 for i in range(length)]
        made.append({"input_ids": ids, "labels": [-100, *ids[1:]]})
    return made


def batch(*some, pad=0):
    return tt_data.collate(list(some), pad_id=pad)


def test_the_digest_of_a_step_does_not_depend_on_padding_micro_batches_order_or_ranks():
    a, b, c = rows(3, 9, 5)
    whole = digest_of([batch(a, b, c)], pad_id=0)
    assert digest_of([batch(c), batch(b, a)], pad_id=0) == whole
    first, second = digest_of([batch(c, b)], pad_id=0), digest_of([batch(a)], pad_id=0)
    assert first + second == whole
    empty = {"input_ids": torch.zeros(1, 4, dtype=torch.int64), "labels": torch.full((1, 4), -100)}
    assert digest_of([batch(a, b, c), empty], pad_id=0) == whole, "what fills up a rank is no row"


def test_the_digest_changes_with_a_token_and_with_what_is_trained():
    [row] = rows(6)
    before = digest_of([batch(row)], pad_id=0)
    assert digest_of([batch({**row, "input_ids": [9, *row["input_ids"][1:]]})], pad_id=0) != before
    assert digest_of([batch({**row, "labels": [-100, -100, *row["labels"][2:]]})], pad_id=0) != before
    ends_with_pad = {"input_ids": [1, 2, 0], "labels": [-100, 2, 0]}  # pad as the end of a turn, and trained
    assert digest_of([batch(ends_with_pad)], pad_id=0) != digest_of([batch(rows(2)[0])], pad_id=0)


def test_a_run_that_is_repeated_is_the_same_and_one_with_another_rate_differs_from_its_first_step(train, tmp_path):
    first = train(tmp_path / "first", "max_steps=4", "adapter.rank=2")
    again = train(tmp_path / "again", "max_steps=4", "adapter.rank=2")
    same, [line] = compare(again, first)
    assert same
    assert line == f"the same as {first} in all 4 steps that both have, with the same result"
    other = train(tmp_path / "other", "max_steps=4", "adapter.rank=2", "optimizer.lr=1e-3")
    same, lines = compare(other, first)
    assert not same
    assert lines[0].startswith(f"the first step that differs from {first} is 1: lr 0.000333")
    assert lines[0].endswith("its rows are the same")
    assert lines[1:] == ["optimizer.lr: 0.001 here, 0.005 there"]


def test_other_rows_are_told_from_other_numbers(train, tmp_path, rows_file):
    first = train(tmp_path / "first", "max_steps=3", "adapter.rank=2")
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(rows_file.read_text().splitlines(keepends=True)[:20]))
    same, lines = compare(train(tmp_path / "other", "max_steps=3", "adapter.rank=2", f"data.train={fewer}"), first)
    assert not same
    assert lines[0].endswith("its rows are different")


def test_the_digest_of_all_tokens_is_in_the_manifest_and_that_of_a_resumed_run_is_the_same(train, tmp_path):
    whole = train(tmp_path / "whole", "max_steps=4", "save_every=2", "adapter.rank=2")
    parts = train(tmp_path / "parts", "max_steps=2", "adapter.rank=2", "schedule.name=constant")
    train(parts, "max_steps=4", "adapter.rank=2", "schedule.name=constant", resume="auto")
    manifests = [read_json(path / "manifest.json") for path in (whole, parts)]
    assert manifests[0]["token_stream"] == manifests[1]["token_stream"]
    assert [row["token_stream"] for row in read_rows(whole / "metrics.jsonl") if row["step"] == 4] == [
        manifests[0]["token_stream"]
    ]
    assert len(manifests[0]["base_model_sha256"]) == 64


def test_a_base_with_another_weight_has_another_hash(train, tmp_path, model_dir):
    import shutil

    from tt_train.references.reference_cache import weights_of

    other = tmp_path / "model"
    shutil.copytree(model_dir, other)
    [file] = other.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert weights_of(other) != weights_of(model_dir)


def test_a_checkpoint_from_before_the_digest_resumes_and_leaves_it_open(train, tmp_path):
    import tt_ckpt
    from tt_ckpt import commit

    run = train(tmp_path / "run", "max_steps=2", "adapter.rank=2")
    [checkpoint] = (run / "checkpoints").iterdir()
    state = json.loads((checkpoint / "state.json").read_text())
    del state["token_stream"]
    (checkpoint / "state.json").write_text(json.dumps(state))
    facts = {k: v for k, v in json.loads((checkpoint / commit.MANIFEST_NAME).read_text()).items()
             if k not in ("files", "sha256")}  # fmt: skip
    (checkpoint / commit.MANIFEST_NAME).unlink()
    commit.write_manifest(checkpoint, facts, {})
    assert tt_ckpt.TrainCheckpoint(run / "checkpoints").latest() == checkpoint
    train(run, "max_steps=3", "adapter.rank=2", resume="auto")
    assert read_json(run / "manifest.json")["token_stream"] is None


def test_what_cannot_be_compared_is_refused_before_training(tmp_path):
    with pytest.raises(ConfigError, match="is not a run directory"):
        check_comparable(tmp_path)
