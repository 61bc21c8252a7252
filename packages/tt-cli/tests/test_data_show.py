"""``tt data show``: rows as the model sees them."""

import json
import os

import pytest


def show(tt, data, model, *words):
    answer = tt("data", "show", str(data), "--tokenizer", str(model), *words)
    assert answer.code == 0, answer.err
    return answer


def test_trained_text_stands_between_marks_in_a_pipe(tt, rows_file, model_dir):
    answer = show(tt, rows_file, model_dir, "-n", "1")
    assert "Repeat the word red.<|im_end|>\n<|im_start|>assistant\n\u27e6red<|im_end|>\u27e7" in answer.out
    assert "1 alpaca row (first 1 row read); dropped: none" in answer.err


def test_trained_text_is_green_where_there_is_colour(tt, rows_file, model_dir, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    answer = show(tt, rows_file, model_dir, "-n", "1")
    assert "\x1b[32mred<|im_end|>\x1b[0m" in answer.out
    assert "\u27e6" not in answer.out


def test_n_and_start_choose_rows(tt, rows_file, model_dir):
    rows = show(tt, rows_file, model_dir, "-n", "2", "--start", "1", "--json").json["shown"]
    assert [row["index"] for row in rows] == [1, 2]
    texts = [[piece["text"] for piece in row["documents"][0]["pieces"] if piece["trained"]] for row in rows]
    assert [text[0][:4] for text in texts] == ["blue", "gree"]


def test_json_counts_tokens_and_trained_tokens(tt, rows_file, model_dir):
    row = show(tt, rows_file, model_dir, "--json").json["shown"][0]
    assert 0 < row["trained"] < row["tokens"]


def test_stats_are_over_all_rows(tt, rows_file, model_dir):
    answer = show(tt, rows_file, model_dir, "--stats", "--json").json
    assert answer["rows"] == sum(part["count"] for part in answer["lengths"]["histogram"]) == 8
    assert answer["trained_tokens"] < answer["tokens"]
    text = show(tt, rows_file, model_dir, "--stats").out
    assert f"{answer['trained_tokens']} trained ({answer['share_trained']:.1%})" in text
    assert "\u2588" in text


def test_stats_name_what_was_dropped_and_where(tt, model_dir, tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": "Say red.", "completion": "red"}, {"prompt": "Say", "completion": ""}, {"prompt": "Say"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = show(tt, file, model_dir, "--stats").out
    assert "dropped  1 empty, 1 missing column" in text
    assert "rows.jsonl:2: " in text
    assert "rows.jsonl:3: " in text


@pytest.mark.parametrize("words", [("--train-on", "all"), ("--max-seq-len", "29"), ("--template", "llama2")])
def test_settings_of_a_run_change_what_is_shown(tt, rows_file, model_dir, words):
    plain = show(tt, rows_file, model_dir, "-n", "8", "--json").json
    assert show(tt, rows_file, model_dir, *words, "-n", "8", "--json").json != plain


def test_packing_puts_rows_together_and_shows_where_each_begins(tt, rows_file, model_dir):
    words = ["--packing", "--max-seq-len", "128"]
    packed = show(tt, rows_file, model_dir, *words, "--stats", "--json").json
    alone = show(tt, rows_file, model_dir, "--stats", "--json").json
    assert packed["lengths"]["max"] > alone["lengths"]["max"]
    assert packed["tokens"] == alone["tokens"]
    first = show(tt, rows_file, model_dir, *words, "-n", "1")
    documents = show(tt, rows_file, model_dir, *words, "-n", "1", "--json").json["shown"][0]["documents"]
    assert len(documents) > 1
    for document in documents:
        assert f"--- {document['name']} ---" in first.out


def test_a_cut_row_says_so(tt, rows_file, model_dir):
    assert "cut at max_seq_len" in show(tt, rows_file, model_dir, "--max-seq-len", "29", "-n", "8").out
    assert "cut at max_seq_len" not in show(tt, rows_file, model_dir).out


def test_streaming_reads_no_further_than_shown(tt, model_dir, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(200)) + "{broken\n")
    assert show(tt, file, model_dir, "--streaming", "-n", "2", "--json").json["shown"][1]["where"].endswith(":2")
    refused = tt("data", "show", str(file), "--tokenizer", str(model_dir), "--streaming", "--stats")
    assert refused.code == 2
    assert "--stats and --packing need all" in refused.err


def test_a_streamed_mix_that_is_packed_is_refused_as_a_streamed_pack_is(tt, model_dir, rows_file):
    words = [f"model.path={model_dir}", "data.streaming=true", "data.packing=true", "max_steps=1"]
    for train in (rows_file, f"{{{rows_file}: 1}}"):
        refused = tt("data", "show", "sft", *words, f"data.train={train}")
        assert refused.code == 2
        assert "--stats and --packing need all rows" in refused.err


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
    documents = shown["documents"]
    assert [document["name"].split()[-1] for document in documents] == ["chosen", "rejected"]
    texts = [[piece["text"] for piece in document["pieces"] if piece["trained"]] for document in documents]
    assert [text[0][:4] for text in texts] == ["this", "that"]
    assert shown["tokens"] > shown["trained"] > 2
    assert show(tt, rows, model_dir, "--stats", "--json").json["lengths"]["max"] == shown["tokens"]


def test_a_recipe_a_config_and_a_recipe_file_show_the_rows_of_their_run(
    tt, rows_file, model_dir, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    words = [f"model.path={model_dir}", f"data.train={rows_file}", "data.template=llama2", "data.max_seq_len=64"]
    plain = show(tt, rows_file, model_dir, "--template", "llama2", "--max-seq-len", "64", "--json").json
    (tmp_path / "c.yaml").write_text(f"recipe: sft\nmodel: {{path: '{model_dir}'}}\ndata: {{train: '{rows_file}'}}\n")
    assert tt("cp", "sft", "mine.py").code == 0
    for what in (
        ["sft", *words],
        ["mine.py", *words],
        ["c.yaml", *words[2:]],
        ["mine.py", "--config", "c.yaml", *words[2:]],
    ):
        answer = tt("data", "show", *what, "--json")
        assert answer.code == 0, answer.err
        assert answer.json == plain
    stats = tt("data", "show", "c.yaml", "--stats", "--template", "llama2", "--max-seq-len", "64").out
    assert stats == show(tt, rows_file, model_dir, "--template", "llama2", "--max-seq-len", "64", "--stats").out
    streamed = tt("data", "show", "sft", *words, "data.streaming=true", "-n", "1", "--json").json
    assert streamed["shown"] == plain["shown"][:1]


def test_rows_of_a_config_need_no_device_and_the_length_of_the_model_counts(tt, rows_file, write_tiny_model, tmp_path):
    model = write_tiny_model(tmp_path / "short", max_position_embeddings=29)
    words = [f"model.path={model}", f"data.train={rows_file}", "device=cuda:77", "-n", "8"]
    answer = tt("data", "show", "sft", *words)
    assert answer.code == 0, answer.err
    assert "cut at max_seq_len" in answer.out


CONFUSED = [
    (["sft", "data.trian=x"], "data.trian: unknown key; did you mean 'data.train'?"),
    (["sft", "data.train=rows.jsonl"], "model.path: missing"),
    (["sft", "model.path=MODEL"], "data.train: missing"),
    (["rows.jsonl"], "no tokenizer: name the model that will see the rows, as in --tokenizer MODEL"),
    (
        ["rows.jsonl", "data.packing=true"],
        "data.packing=true needs a recipe: tt data show sft data.train=",
    ),
    (["rows.jsonl", "--config", "c.yaml"], "--config needs a recipe: "),
    (["nowhere.yaml"], "nowhere.yaml: no such config file"),
    (["nowhere.py"], "nowhere.py: no such recipe file"),
    (["rows.jsonl", "--tokenzier", "m"], "did you mean '--tokenizer'?"),
    (["run"], "run is a run directory, not rows; give its config, run/config.yaml"),
]


@pytest.mark.parametrize(
    ("words", "part"), CONFUSED, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_rows_and_configs_that_are_confused_are_told_apart(
    tt, rows_file, model_dir, tmp_path, monkeypatch, words, part
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_bytes(rows_file.read_bytes())
    (tmp_path / "run").mkdir()
    for name in ("config.yaml", "manifest.json"):
        (tmp_path / "run" / name).write_text("{}")
    answer = tt("data", "show", *(word.replace("MODEL", str(model_dir)) for word in words))
    assert (answer.code, answer.out) == (2, "")
    assert part in answer.err
    assert answer.err.count("\n") == 1


def test_only_the_rows_shown_are_read_of_a_file_of_any_size(tt, model_dir, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(4)) + "{broken\n")
    answer = show(tt, file, model_dir, "-n", "2", "--start", "1")
    assert answer.err.startswith("3 text rows (first 3 rows read); dropped: none; truncated: 0\n")
    assert "row 2" in answer.out
    report = show(tt, file, model_dir, "-n", "2", "--json").json
    assert (report["partial"], report["read"]) == (True, 2)
    config = ("data", "show", "sft", f"model.path={model_dir}", "-n", "2")
    assert tt(*config, f"data.train={file}").err.startswith("2 text rows (first 2 rows read); dropped")
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert tt(*config, f"data.train={{{file}: 0.5, {other}: 0.5}}", "--json").json["read"] == 1 + 1
    for words in ((str(file), "--tokenizer", str(model_dir), "--stats"), (str(file), "--tokenizer", str(model_dir))):
        answer = tt("data", "show", *words, "-n", "5")
        assert (answer.code, "rows.jsonl:5:2: broken JSON" in answer.err) == (2, True)


def test_the_schema_may_be_named(tt, model_dir, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "Say ", "chosen": "red", "rejected": "blue", "text": "whole"}) + "\n")
    assert show(tt, file, model_dir, "--json").json["schema"] == "preference"
    assert show(tt, file, model_dir, "--schema", "text", "--json").json["schema"] == "text"
    config = tt("data", "show", "sft", f"model.path={model_dir}", f"data.train={file}", "--schema", "text", "--json")
    assert config.json["schema"] == "text"


@pytest.mark.parametrize("word", ["text", "JSON", "csv", "https://example.invalid/rows.jsonl", "", "pipe.jsonl"])
def test_what_is_no_data_is_refused_by_every_verb(tt, model_dir, tmp_path, monkeypatch, word):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "diary.txt").write_text("my private diary\n")
    os.mkfifo(tmp_path / "pipe.jsonl")
    config = ("sft", f"model.path={model_dir}")
    for words in (
        ("data", "show", word, "--tokenizer", str(model_dir)),
        ("validate", *config, f"data.train={word}"),
        ("run", *config, f"data.train={word}", "-o", "run"),
        ("validate", *config, f"data.train={word}", "data.streaming=true", "max_steps=1"),
    ):
        answer = tt(*words)
        assert (answer.code, answer.out) == (2, ""), words
        assert "diary" not in answer.err
        assert answer.err.count("\n") == 1
