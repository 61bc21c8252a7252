"""One definition of each headline figure, on the screen, in the card, in the list and on the page."""

import json

import pytest

from tt_train.report.read import read_run
from tt_train.report.summary import headline, last_part, part_name, step_tokens, tokens_per_second, training_loss
from tt_train.run.listing import list_runs


def make(losses, tokens, *, per_epoch=None, speed=10.0):
    total, rows = 0, []
    for step, (loss, count) in enumerate(zip(losses, tokens, strict=True), start=1):
        total += count
        epoch = None if per_epoch is None else step / per_epoch
        rows.append({"step": step, "epoch": epoch, "loss": loss, "tokens": total, "tokens_per_s": speed})
    return rows


def test_the_training_loss_is_the_last_epoch_s_mean_over_its_tokens():
    rows = make([9.0, 9.0, 9.0, 1.0, 2.0, 8.0], [10, 10, 1, 10, 10, 1], per_epoch=3)
    assert training_loss(rows) == pytest.approx((10 * 1.0 + 10 * 2.0 + 8.0) / 21)
    assert part_name(rows) == "last epoch"


def test_of_one_epoch_the_last_twentieth_counts_but_no_fewer_than_ten_steps():
    for per_epoch in (None, 400):
        rows = make([float(step) for step in range(400)], [5] * 400, per_epoch=per_epoch)
        assert training_loss(rows) == pytest.approx(sum(range(380, 400)) / 20)
        assert part_name(rows) == "last 20 steps"
    few = make([4.0, 1.0], [3, 1], per_epoch=2)
    assert (training_loss(few), part_name(few)) == (pytest.approx(13 / 4), "last 2 steps")
    assert part_name(make([1.0], [1])) == "one step"


def test_steps_that_log_every_left_out_are_not_among_those_that_are_named():
    rows = make([9.0, 9.0, 9.0, 1.0, 2.0, 8.0], [1] * 6, per_epoch=3)
    assert part_name(rows[1::2]) == "2 steps of the last epoch"
    assert part_name(make([1.0] * 6, [1] * 6, per_epoch=6)[1::2]) == "last 3 steps that were written"


def test_the_evaluation_before_step_1_is_no_step():
    before = {"step": 0, "epoch": None, "loss": None, "tokens": 0, "tokens_per_s": None, "eval_loss": 3.0}
    rows = make([4.0, 1.0], [3, 1])
    assert training_loss([before, *rows]) == training_loss(rows)
    assert tokens_per_second([before, *rows]) == tokens_per_second(rows)
    assert part_name([before, *rows]) == "last 2 steps"


def test_gaps_and_lost_rows_do_not_spoil_the_figures():
    rows = make([None, 2.0, 4.0], [1, 1, 3])
    assert training_loss(rows) == pytest.approx(14 / 4)
    assert training_loss([]) is None
    assert training_loss(make([None], [1])) is None
    assert step_tokens([{"step": 10, "tokens": 100}, {"step": 11, "tokens": 104}]) == [10.0, 4.0]
    assert step_tokens([{"step": 1}, {"step": 2}]) == [1.0, 1.0]
    assert len(last_part([{"step": 1, "loss": 1.0}])) == 1


def test_tokens_per_second_is_all_tokens_over_the_time_of_all_steps():
    rows = make([1.0, 1.0], [100, 100])
    rows[0]["tokens_per_s"], rows[1]["tokens_per_s"] = 100.0, 10.0
    assert tokens_per_second(rows) == pytest.approx(200 / 11)
    assert tokens_per_second([]) is None
    assert tokens_per_second([{"step": 1, "tokens": 5, "tokens_per_s": 0.0}]) is None


def test_the_list_and_the_page_show_the_same_training_loss(tmp_path):
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    rows = make([9.0, 3.0, 2.0, 8.0], [10, 1, 10, 1], per_epoch=2)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "config.yaml").write_text("recipe: sft\n")
    (run / "manifest.json").write_text('{"state": "finished"}')
    page, (listed,) = headline(read_run(run, name="one")), list_runs(tmp_path / "runs")
    assert page.loss_last == listed["loss"] == training_loss(rows) == pytest.approx((20 + 8) / 11)
    assert page.tokens_per_s == tokens_per_second(rows)


@pytest.mark.parametrize("cut", range(0, 41))
def test_the_last_bytes_of_a_file_give_its_last_whole_lines(tmp_path, cut):
    from tt_train.records.run_files import read_rows

    lines = [json.dumps({"step": step}) + "\n" for step in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    size = len("".join(lines))
    whole, total = 0, 0
    for line in reversed(lines):
        total += len(line)
        whole += total <= size - cut
    rows = list(read_rows(tmp_path / "metrics.jsonl", last_bytes=size - cut))
    assert [row["step"] for row in rows] == list(range(6 - whole, 6))


def test_a_list_of_runs_reads_the_end_of_long_metrics_and_the_summary_of_a_finished_run(tmp_path, monkeypatch):
    run = tmp_path / "runs" / "long"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("recipe: sft\n")
    rows = [{"step": step, "epoch": 1.0, "loss": 5.0 if step < 900 else 2.0, "tokens": step} for step in range(1, 1001)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "manifest.json").write_text(json.dumps({"state": "stopped"}))
    assert list_runs(tmp_path / "runs")[0]["loss"] == 2.0
    monkeypatch.setattr("tt_train.run.listing._LAST_BYTES", 2000)
    (listed,) = list_runs(tmp_path / "runs")
    assert (listed["step"], listed["loss"]) == (1000, 2.0)
    (run / "manifest.json").write_text(json.dumps({"state": "finished", "summary": {"steps": 1000, "loss_last": 2.5}}))
    assert list_runs(tmp_path / "runs")[0]["loss"] == 2.5  # the summary has the mean over all rows that count
