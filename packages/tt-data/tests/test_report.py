"""What is said of rows: counted notes, and the lines that every verb prints."""

from __future__ import annotations

from typing import Any

from tt_data import load_dataset, summary_lines
from tt_data.examples import BadRowError
from tt_data.report import Tally

NO_END = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"


def test_notes_of_one_kind_add_up_over_tallies_and_name_the_first_row() -> None:
    one, other = Tally(), Tally()
    one.note("reasoning is lost", "a.jsonl:2")
    one.note("the template opens a thought")
    for line in (7, 9):
        other.note("reasoning is lost", f"b.jsonl:{line}")
        other.note("the template opens a thought")
    one.add(other)
    assert one.report("text", 3)["notes"] == [
        "reasoning is lost (3 rows, the first at a.jsonl:2)",
        "the template opens a thought",
    ]


def test_the_summary_has_a_line_for_all_rows_and_one_for_each_thing_to_know(make_model: Any, tmp_path: Any) -> None:
    from tt_data import load_tokenizer

    chatml = load_tokenizer(make_model(tmp_path / "model", ["<e>"], eos_token="<e>"))
    rows = [{"prompt": "the", "completion": f"cat {i}"} for i in range(3)]
    assert summary_lines(load_dataset(rows, chatml).report) == ["3 prompt_completion rows; dropped: none; truncated: 0"]
    bad = [{"prompt": "the", "completion": ""} for _ in range(5)]
    first, *rest = summary_lines(load_dataset(rows + bad, chatml).report)
    assert first == "3 prompt_completion rows; dropped: 5 empty; truncated: 0"
    assert rest[:3] == [f"rows:{i}: column 'completion' is empty" for i in (3, 4, 5)]
    assert rest[3] == "and 2 more rows dropped; tt data show --stats names the first 20"
    assert len(rest) == 4


def test_rows_that_do_not_teach_to_stop_are_in_the_summary(
    chatml_dir: Any, make_model: Any, tmp_path: Any, make_chat_rows: Any
) -> None:
    from tt_data import load_tokenizer

    model = make_model(tmp_path / "model", ["<|endoftext|>"], eos_token="<|endoftext|>", chat_template=NO_END)
    report = load_dataset(make_chat_rows(4), load_tokenizer(model)).report
    assert report["no_end_token"] == 4
    (line,) = [line for line in summary_lines(report) if "no end token" in line]
    assert "of 4 rows: the model does not learn to stop" in line


def test_dropped_rows_are_counted_beyond_the_problems_that_are_kept() -> None:
    tally = Tally()
    for i in range(25):
        tally.drop(f"rows:{i}", BadRowError("empty", "it is empty"))
    lines = summary_lines(tally.report("text", 1))
    assert lines[-1] == "and 22 more rows dropped; tt data show --stats names the first 20"


def test_problems_are_in_the_order_of_the_rows_whatever_is_wrong_with_them(chatml: Any, make_chat_rows: Any) -> None:
    one_turn = {"messages": [{"role": "user", "content": "the"}]}
    empty: dict[str, Any] = {"messages": []}
    report = load_dataset([*make_chat_rows(2), one_turn, empty, one_turn], chatml).report
    assert [problem.partition(": ")[0] for problem in report["problems"]] == ["rows:2", "rows:3", "rows:4"]
    assert report["dropped"] == {"wrong roles": 2, "empty": 1}
