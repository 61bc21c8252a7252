"""``tt data show``: rows as the model sees them."""

import json

import pytest


def show(tt, data, model, *words):
    answer = tt("data", "show", str(data), "--tokenizer", str(model), *words)
    assert answer.code == 0, answer.err
    return answer


def test_trained_text_stands_between_marks_in_a_pipe(tt, rows_file, model_dir):
    answer = show(tt, rows_file, model_dir, "-n", "1")
    assert "Repeat the word red.<|im_end|>\n<|im_start|>assistant\n\u27e6red<|im_end|>\u27e7" in answer.out
    assert "8 alpaca rows; dropped: none" in answer.err


def test_trained_text_is_green_where_there_is_colour(tt, rows_file, model_dir, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    answer = show(tt, rows_file, model_dir, "-n", "1")
    assert "\x1b[32mred<|im_end|>\x1b[0m" in answer.out
    assert "\u27e6" not in answer.out


def test_n_and_start_choose_rows(tt, rows_file, model_dir):
    rows = show(tt, rows_file, model_dir, "-n", "2", "--start", "1", "--json").json["shown"]
    assert [row["index"] for row in rows] == [1, 2]
    assert [next(piece["text"] for piece in row["pieces"] if piece["trained"])[:4] for row in rows] == ["blue", "gree"]


def test_json_counts_tokens_and_trained_tokens(tt, rows_file, model_dir):
    row = show(tt, rows_file, model_dir, "--json").json["shown"][0]
    assert 0 < row["trained"] < row["tokens"]


def test_stats_are_over_all_rows(tt, rows_file, model_dir):
    answer = show(tt, rows_file, model_dir, "--stats", "--json").json
    assert answer["rows"] == 8
    stats = answer["stats"]
    assert stats["shortest"] <= stats["median"] <= stats["p95"] <= stats["longest"]
    assert stats["trained_tokens"] < stats["tokens"]
    assert "trained tokens" in show(tt, rows_file, model_dir, "--stats").out


@pytest.mark.parametrize("words", [("--train-on", "all"), ("--max-seq-len", "29"), ("--template", "llama2")])
def test_settings_of_a_run_change_what_is_shown(tt, rows_file, model_dir, words):
    assert show(tt, rows_file, model_dir, *words, "--json").json != show(tt, rows_file, model_dir, "--json").json


def test_packing_puts_rows_together(tt, rows_file, model_dir):
    packed = show(tt, rows_file, model_dir, "--packing", "--max-seq-len", "128", "--stats", "--json").json
    alone = show(tt, rows_file, model_dir, "--stats", "--json").json
    assert packed["stats"]["longest"] > alone["stats"]["longest"]
    assert packed["stats"]["tokens"] == alone["stats"]["tokens"]


def test_columns_are_renamed(tt, model_dir, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"q": "Say red.", "a": "red"}) + "\n")
    words = ["--column", "prompt=q", "--column", "completion=a"]
    assert "red" in show(tt, file, model_dir, *words).out


WRONG = [
    ("rosw.jsonl", [], "rosw.jsonl"),
    ("rows.jsonl", ["--column", "prompt"], "--column prompt: expected OURS=THEIRS"),
    ("rows.jsonl", ["--tokenizer", "nowhere/model"], "nowhere/model"),
    ("rows.jsonl", ["--template", "lama2"], "llama2"),
    ("rows.jsonl", ["--train-on", "asistant"], "did you mean 'assistant'"),
    ("empty.jsonl", [], "empty.jsonl"),
    ("broken.jsonl", [], "broken.jsonl:2"),
]


@pytest.mark.parametrize(("data", "words", "part"), WRONG, ids=lambda value: str(value))
def test_a_mistake_is_one_line_that_names_the_place(tt, rows_file, model_dir, tmp_path, monkeypatch, data, words, part):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "rows.jsonl").write_bytes(rows_file.read_bytes())
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    answer = tt("data", "show", data, "--tokenizer", str(model_dir), *words)
    assert answer.code == 2
    assert answer.out == ""
    assert part in answer.err
    assert answer.err.count("\n") == 1


def test_preference_rows_show_both_answers(tt, model_dir, tmp_path):
    rows = tmp_path / "preference.jsonl"
    rows.write_text(json.dumps({"prompt": "which one", "chosen": "this", "rejected": "that"}) + "\n")
    shown = show(tt, rows, model_dir, "--json").json["shown"][0]
    assert [piece["text"][:4] for piece in shown["pieces"] if piece["trained"]] == ["this", "that"]
    assert shown["tokens"] > shown["trained"] > 2
    assert show(tt, rows, model_dir, "--stats", "--json").json["stats"]["longest"] == shown["tokens"]
