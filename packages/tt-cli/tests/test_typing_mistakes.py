"""A new user's slips, in options, words, files and names: one line, the nearest valid one, the cure, exit 2."""

from pathlib import Path

import pytest

GOOD = ("model.path=MODEL", "data.train=rows.jsonl")
SLIPS = [
    ("run sft --model MODEL", "no option --model; did you mean model.path=MODEL?"),
    ("run sft --data rows.jsonl", "did you mean data.train=rows.jsonl?"),
    ("run sft --learning-rate 1e-4", "did you mean optimizer.lr=1e-4?"),
    ("run sft --lora-r=8", "did you mean adapter.rank=8?"),
    ("run sft --load_in_8bit", "there is none here: bases of 8 bits are not trained"),
    ("run sft --nproc 2", "there is none here: a run uses one device"),
    ("run sft -c c.yaml", "did you mean --config c.yaml?"),
    ("run sft --fix", "no option --fix; a config key is written fix=VALUE"),
    ("report --open", "no option --open (see"),
    ("run sft model.path = MODEL", "model.path = MODEL: write model.path=MODEL, without spaces"),
    ("run sft model.path= MODEL", "model.path= MODEL: write model.path=MODEL, without spaces"),
    ("run sft model.path: MODEL", "model.path: MODEL: write model.path=MODEL, without spaces"),
    ("run sft data.train={a.jsonl: 0.7, b.jsonl: 0.3}", "needs quotes: 'data.train={a.jsonl: 0.7, b.jsonl: 0.3}'"),
    ("run sft data.train=[a.jsonl, b.jsonl]", "needs quotes: 'data.train=[a.jsonl, b.jsonl]'"),
    ("run sft +GOOD adapter.rank=8 adapter.target_modules=all_linear", "did you mean 'all-linear'"),
    ("run sft +GOOD data.eval=5%", "data.eval: a share is written 0.05, not '5%'"),
    ("run sft +GOOD data.eval=50", "5 % is 0.05"),
    ("run sft +GOOD data.split=trian", "split 'trian' asked for, but it is one file and has no splits"),
    ("run sft +GOOD data.train=[]", "data.train: names no source"),
    ("run sft +GOOD model.tokenizer=nowhere", "model.tokenizer: nowhere: no such tokenizer"),
    ("run sft model.name=llama2_7 model.tokenizer=MODEL data.train=rows.jsonl", "model.name: no model is named"),
    ("run sft +GOOD -o full", "output_dir: full is not empty"),
    ("run sft +GOOD -o rows.jsonl", "output_dir: rows.jsonl is a file"),
    ("run sft +GOOD --resume=atuo", "did you mean 'auto'?"),
    ("run full_finetune_distributed", "a run uses one device; tt run full_finetune_single_device"),
    ("run lora_dpo_single_device", "no such recipe here: preference tuning is not offered"),
    ("run generate", "it is a verb: tt generate"),
    ("run sft --config sft", "sft: a recipe, not a config; tt ls configs"),
    ("cat rows.jsonl", "rows.jsonl: a file of rows, not a config; tt data show rows.jsonl"),
    ("cp c.yaml d.yaml", "it is a file already: copy it with cp"),
    ("data show rows.jsonl --tokenizer MODEL -n x", "'x' is not a valid whole number"),
    ("data show rows.jsonl --tokenizer MODEL --start 100", "--start 100: there are 8 rows, counted from 0"),
    ("data show rows.jsonl --tokenizer MODEL --split trian", "it is one file and has no splits"),
    ("data show rows.jsonl MODEL", "a second source, 'MODEL'; did you mean --tokenizer MODEL?"),
    ("merge MODEL out --dtype fp8", "--dtype: 'fp8' is not one of"),
    ("help", "tt has no verb 'help'; the help is tt --help"),
]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch, model_dir, rows_file):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("MODEL").symlink_to(model_dir)
    Path("rows.jsonl").write_bytes(rows_file.read_bytes())
    Path("c.yaml").write_text("recipe: sft\n")
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine")


@pytest.mark.parametrize(("typed", "said"), SLIPS, ids=[typed for typed, _ in SLIPS])
def test_a_slip_is_one_line_with_the_cure(tt, tmp_path, typed, said):
    before = sorted(tmp_path.rglob("*"))
    answer = tt(*(word for part in typed.split(" ") for word in (GOOD if part == "+GOOD" else [part])))
    assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1), answer.err
    assert answer.err.startswith("error: ")
    assert said in answer.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("words", [["run", ""], ["run", "sft", "-o", ""], ["cp", "sft", ""], ["report", "-o", ""]])
def test_an_empty_word_is_a_variable_that_is_not_set(tt, words):
    answer = tt(*words)
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "an empty word (a shell variable that is not set?)" in answer.err
