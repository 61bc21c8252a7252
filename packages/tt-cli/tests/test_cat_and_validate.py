"""``tt cat`` and ``tt validate``: a config as a run would see it, and what is wrong with it."""

import json
from pathlib import Path

import pytest
import yaml


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def words(model_dir, rows_file) -> list[str]:
    return [f"model.path={model_dir}", f"data.train={rows_file}"]


def test_cat_shows_yaml_that_runs_again_as_it_is(tt, words):
    shown = tt("cat", "sft", *words, "optimizer.lr=1e-4").out
    assert yaml.safe_load(shown)["optimizer"]["lr"] == 1e-4
    Path("again.yaml").write_text(shown)
    assert tt("cat", "again.yaml").out == shown


def test_cat_in_json_is_the_same_config(tt, words):
    assert tt("cat", "sft", *words, "--json").json["config"] == yaml.safe_load(tt("cat", "sft", *words).out)


def test_a_torchtune_recipe_is_ours(tt, words):
    assert tt("cat", "lora_finetune_single_device", *words).out == tt("cat", "sft", *words).out


def test_validate_finds_nothing_wrong_with_a_good_config(tt, words):
    assert tt("validate", "sft", *words, "adapter.rank=4").out == "sft: no mistakes found\n"
    assert tt("validate", "sft", *words, "--json").json["ok"] is True


def test_validate_show_and_run_say_the_same_about_the_rows(tt, words, model_dir, tmp_path):
    rows = [{"prompt": "Say red.", "completion": text} for text in ("red", "", *map(str, range(18)))]
    file = tmp_path / "some.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [*(word for word in words if not word.startswith("data.train")), f"data.train={file}"]
    said = ["19 prompt_completion rows; dropped: 1 empty; truncated: 0", f"{file}:2: column 'completion' is empty"]
    for answer in (
        tt("validate", "sft", *words),
        tt("data", "show", str(file), "--tokenizer", str(model_dir), "-n", "20"),
        tt("run", "sft", *words, "--dry-run"),
    ):
        assert answer.code == 0
        assert all(line in answer.err for line in said)
    report = tt("validate", "sft", *words, "--json").json["data"]
    shown = tt("data", "show", str(file), "--tokenizer", str(model_dir), "-n", "20", "--json").json
    assert report == {key: shown[key] for key in report}


@pytest.mark.parametrize(
    "mode",
    [
        [],
        ["data.packing=true"],
        ["data.streaming=true", "max_steps=1"],
        ["data.streaming=true", "max_steps=1", "data.packing=true"],
    ],
)
@pytest.mark.parametrize(
    "source", ["data.train={file}", "data.train=[{other},{file}]", "data.train={{{other}: 1, {file}: 1}}"]
)
def test_validate_names_the_rows_that_would_be_dropped_in_every_mode(tt, words, source, mode):
    file, other = Path("some.jsonl"), Path("other.jsonl")
    file.write_text("".join(json.dumps({"text": f"row {i}" if i else ""}) + "\n" for i in range(30)))
    other.write_text("".join(json.dumps({"text": f"other {i}"}) + "\n" for i in range(30)))
    answer = tt("validate", "sft", words[0], source.format(file=file, other=other), *mode)
    assert (answer.code, answer.out) == (0, "sft: no mistakes found\n")
    assert "; dropped: 1 empty; " in answer.err
    assert "some.jsonl:1: column 'text' is empty\n" in answer.err
    assert tt("validate", "sft", words[0], source.format(file=file, other=other), *mode, "--json").json["data"][
        "dropped"
    ] == {"empty": 1}


def test_validate_names_dropped_rows_of_the_held_out_set(tt, words):
    Path("out.jsonl").write_text('{"text": "a row"}\n{"text": ""}\n')
    for mode in ([], ["data.streaming=true", "max_steps=1"]):
        answer = tt("validate", "sft", *words, *mode, "data.eval=out.jsonl", "data.max_dropped_share=0.5")
        assert answer.code == 0
        assert "held out: 1 text row; dropped: 1 empty; " in answer.err
        assert "held out: out.jsonl:2: column 'text' is empty\n" in answer.err


def test_validate_reads_the_head_of_a_stream_and_says_so(tt, words):
    rows = [{"text": f"row {i}" if i != 7 else ""} for i in range(400)] + [{"text": ""}]
    Path("some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    streamed = ("sft", words[0], "data.train=some.jsonl", "data.streaming=true", "max_steps=1")
    for words in (("validate", *streamed), ("run", *streamed, "--dry-run")):
        assert "255 text rows (first 256 rows read); dropped: 1 empty; truncated: 0" in tt(*words).err
    Path("some.jsonl").write_text("".join(json.dumps({"text": "row" if i % 2 else ""}) + "\n" for i in range(400)))
    answer = tt("validate", *streamed)
    assert answer.code == 2
    assert "some.jsonl (the first 256 rows): 128 of 256 rows cannot be used (128 empty)" in answer.err


def test_validate_checks_a_sample_of_large_data_and_says_so(tt, words):
    bad = {4321, 11_999}  # one between the rows of the sample, and the last one
    Path("some.jsonl").write_text(
        "".join(json.dumps({"text": "" if i in bad else f"row {i}"}) + "\n" for i in range(12_000))
    )
    large = (words[0], "data.train=some.jsonl", "batch_size=10", "schedule.warmup_steps=1199")  # of about 1,200 steps
    answer = tt("validate", "sft", *large)
    assert (answer.code, answer.out) == (0, "sft: no mistakes found in the config and the sample of the rows\n")
    assert "(a sample: 4,200 of 12,000 rows were read, of each large source the first 100, the last 100 " in answer.err
    assert "some.jsonl:12000: column 'text' is empty\n" in answer.err
    assert "only a sample of the rows was checked; --all-rows checks them all" in answer.err
    assert "is not below" not in answer.err
    report = tt("validate", "sft", *large, "--all-rows", "--json").json["data"]
    assert (report["rows"], report["dropped"], "sampled_from" in report) == (11_998, {"empty": 2}, False)
    assert report["problems"][0] == "some.jsonl:4322: column 'text' is empty"


def test_a_mistake_in_a_file_names_its_line(tt, words):
    Path("mine.yaml").write_text("batch_size: 4\noptimizer:\n  lrr: 3\n")
    answer = tt("validate", "mine.yaml", *words)
    assert answer.code == 2
    assert answer.err == "error: mine.yaml:3: optimizer.lrr: unknown key; did you mean 'optimizer.lr'?\n"


BAD = [
    ("model.path=nowhere/model", "nowhere/model"),
    ("data.train=rosw.jsonl", "rosw.jsonl"),
    ("adapter.target_modules=[q_prj]", "did you mean 'q_proj'?"),
    ("data.columns={instruction: nothing}", "columns maps instruction to 'nothing', but the row has"),
    ("device=cuda:77", "cuda:77"),
    ("data.template=lama2", "did you mean 'llama2'?"),
    ("batch_size=3", "nearest that are: 2 or 4"),
    ("model.dtype=fp16", "use bf16 or fp32"),
]


@pytest.mark.parametrize(("word", "part"), BAD)
def test_validate_and_run_answer_a_bad_value_in_the_same_line(tt, words, word, part, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = [*words, "adapter.rank=4", word]
    checked = tt("validate", "sft", *words)
    assert (checked.code, checked.out) == (2, "")
    assert checked.err.startswith(f"error: {word.split('.')[0].split('=')[0]}")
    assert part in checked.err
    assert checked.err.count("\n") == 1
    assert tt("run", "sft", *words, "-o", "run") == checked
    assert not Path("run").exists()


def test_all_mistakes_are_told_at_once_and_are_in_the_json_too(tt, words):
    answer = tt("validate", "sft", *words, "batch_size=3", "model.dtype=fp16", "--json")
    assert answer.code == 2
    assert len(answer.json["errors"]) == 2
    assert answer.err.count("\n") == 2


@pytest.mark.parametrize("verb", ["cat", "validate", "run"])
def test_a_folder_in_place_of_a_config_is_answered_with_the_config_in_it(tt, verb):
    Path("one").mkdir()
    assert tt(verb, "one").err == "error: one: a folder, not a config; give a YAML file or a registered name\n"
    Path("one/config.yaml").write_text("")
    assert tt(verb, "one").err == "error: one: a folder, not a config; give the config in it, one/config.yaml\n"


def test_a_folder_named_like_a_recipe_hides_none(tt, words):
    Path("sft").mkdir()
    assert tt("cat", "sft", *words).code == 0
