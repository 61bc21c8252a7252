"""``tt run sft`` on several ranks: the run directory of one process, checkpoints that any number of ranks continue."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tt_train import compose
from tt_train.recipes import sft

METHODS = {"full": [], "bf16": ["model.dtype=bf16"], "lora": ["adapter.rank=4", "adapter.dropout=0.1"],
           "sharded lora": ["adapter.rank=4", "parallel.shard=2"]}  # fmt: skip


def run(words, resume=None):
    sft.main(compose("sft", overrides=words), resume=resume)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    (file,) = [*folder.glob("model/model.safetensors"), *folder.glob("adapter/adapter_model.safetensors")]
    return load_file(file)


def metadata(folder):
    for file in folder.glob("adapter/adapter_model.safetensors"):
        with safe_open(file, "pt") as opened:
            return opened.metadata()


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_write_the_run_of_one_process(method, words, ranks, tmp_path):
    words = [*words, *METHODS[method], "data.eval=0.2", "eval_every=3", "micro_batch_size=2", "adapter.dropout=0.0"]
    words = words if "lora" in method else words[:-1]
    ranks(1, run, [*words, f"output_dir={tmp_path / 'one'}"])
    ranks(2, run, [*words, f"output_dir={tmp_path / 'two'}"])
    close = {"rel": 1e-5} if method != "bf16" else {"rel": 2e-2}
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert one.keys() == two.keys()
        for key in ("step", "epoch", "lr", "tokens"):
            assert one[key] == two[key]
        for key in ("loss", "grad_norm", "eval_loss"):
            assert (two.get(key) is None) == (one.get(key) is None)
            assert one.get(key) is None or two[key] == pytest.approx(one[key], **close)
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("one", "two")]
    assert [name for name in names[1] if name != "logs"] == names[0]
    if method != "bf16":
        expected, found = weights(tmp_path / "one"), weights(tmp_path / "two")
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert tensor.dtype == found[name].dtype
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)
        assert metadata(tmp_path / "two") == metadata(tmp_path / "one")  # of an adapter: which base it belongs to
        samples = [(tmp_path / name / "samples.jsonl").read_text() for name in ("one", "two")]
        assert samples[0] == samples[1]


SMALL_STATE = {"8 bits": ["optimizer.name=adamw8bit"]}


@pytest.mark.parametrize("method", [*METHODS, *SMALL_STATE])
def test_resume_is_bitwise_at_the_same_world_size_and_close_at_another(method, words, ranks, tmp_path, monkeypatch):
    monkeypatch.setattr("tt_train.run.finish.write_report", lambda runs, **more: ("", ""))
    more = (METHODS | SMALL_STATE)[method]
    words = [*words, *more, "save_every=2", "keep_last=9", "micro_batch_size=2", "samples.num=0"]
    ranks(2, run, [*words, f"output_dir={tmp_path / 'two'}"])
    checkpoint = tmp_path / "two" / "checkpoints" / "step-000002"
    ranks(2, run, [*words, f"output_dir={tmp_path / 'again'}"], str(checkpoint))
    expected, again = weights(tmp_path / "two"), weights(tmp_path / "again")
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())
    if "dropout" in str(more):  # which is drawn by rank
        return
    others = [(1, checkpoint)] if method != "full" else [(4, checkpoint), (2, tmp_path / "4/checkpoints/step-000004")]
    for size, where in others:
        ranks(size, run, [*words, f"output_dir={tmp_path / str(size)}"], str(where))
        for one, other in zip(rows(tmp_path / "two"), rows(tmp_path / str(size)), strict=True):
            rel = {"bf16": 2e-2, "8 bits": 1e-3}.get(method, 1e-5)  # a rounded number may flip
            assert other["loss"] == pytest.approx(one["loss"], rel=rel)
            assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=10 * rel)
