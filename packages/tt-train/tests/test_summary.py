"""What a finished run says of itself: the manifest, the card, the list and the page agree."""

import json

import pytest

from tt_train import compose
from tt_train.recipes import sft
from tt_train.report.read import read_run
from tt_train.report.summary import headline, tokens_per_second, training_loss
from tt_train.run.console import Console


class Quiet(Console):
    def note(self, text):
        pass

    warn = note

    def end(self, summary):
        self.summary = summary


def run(path, model_dir, rows_file, *more):
    words = [f"model.path={model_dir}", f"data.train={rows_file}", "model.dtype=fp32", "adapter.rank=2"]
    console = Quiet()
    sft.main(compose("sft", overrides=[*words, f"output_dir={path}", *more]), console=console)
    return console.summary, json.loads((path / "manifest.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_dir, rows_file):
    path = tmp_path_factory.mktemp("runs") / "one"
    more = ["epochs=2", "batch_size=8", "data.eval=0.1", "samples.num=1", "samples.max_new_tokens=2"]
    return path, *run(path, model_dir, rows_file, *more)


def test_screen_manifest_card_and_page_show_the_mean_of_the_last_epoch(finished):
    path, summary, manifest = finished
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    page = headline(read_run(path, name="one"))
    assert summary["loss_last"] == manifest["summary"]["loss_last"] == page.loss_last == training_loss(rows)
    assert summary["loss_last"] != rows[-1]["loss"]  # the last batch is a partial one
    assert summary["tokens_per_s"] == page.tokens_per_s == tokens_per_second(rows)
    card = (path / "README.md").read_text()
    assert f"| training loss | {summary['loss_last']:.4f} (last epoch; {summary['loss_first']:.4f} at first) |" in card
    assert f"| trained tokens per second | {summary['tokens_per_s']:,.0f} |" in card


def test_the_manifest_says_when_on_what_and_with_which_tokenizer(finished):
    path, _, manifest = finished
    assert manifest["started"][:2] == "20"
    assert manifest["device"] == "cpu"
    assert manifest["environment"]["cpu"]
    assert len(manifest["tokenizer"]) == 64
    assert f"<span>{manifest['environment']['cpu']}</span>" in (path / "report.html").read_text()


def test_samples_have_their_turns_and_say_whether_the_row_is_held_out(finished, tmp_path, model_dir, rows_file):
    path, *_ = finished
    samples = [json.loads(line) for line in (path / "samples.jsonl").read_text().splitlines()]
    assert {sample["held_out"] for sample in samples} == {True}
    assert samples[0]["turns"][0]["role"] == "user"
    assert samples[0]["turns"][0]["content"].startswith("say ")
    run(tmp_path / "two", model_dir, rows_file, "max_steps=1", "samples.num=1", "samples.max_new_tokens=2")
    assert json.loads((tmp_path / "two" / "samples.jsonl").read_text().splitlines()[0])["held_out"] is False


@pytest.mark.parametrize("held_out", ["null", "0.5"])
def test_packed_rows_are_counted_as_rows(tmp_path, model_dir, rows_file, held_out):
    more = ["data.packing=true", "data.max_seq_len=64", "max_steps=1", "samples.num=0", f"data.eval={held_out}"]
    _, manifest = run(tmp_path / "run", model_dir, rows_file, *more)
    data = manifest["data"]
    assert data["report"]["packs"] < 37
    assert data["rows"] + data["held_out_rows"] == data["report"]["rows"] == 37
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"| rows | {data['rows']} " in card
