"""A new user's slips, in options, words, files and names: one line, the nearest valid one, the cure, exit 2."""

import shlex
from pathlib import Path

import pytest

GOOD = ("model.path=MODEL", "data.train=rows.jsonl")
SLIPS = [
    ("run sft --model MODEL", "no option --model; did you mean model.path=MODEL?"),
    ("run sft --data rows.jsonl", "did you mean data.train=rows.jsonl?"),
    ("run sft --learning-rate 1e-4", "did you mean optimizer.lr=1e-4?"),
    ("run sft --lora-r=8", "did you mean adapter.rank=8?"),
    ("run sft --load_in_8bit", "tt has no such key: 8 bits are not supported"),
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
    ("run sft +GOOD -o rows.jsonl", "output_dir: rows.jsonl is"),
    ("run sft +GOOD --resume=atuo", "did you mean 'auto'?"),
    ("run full_finetune_distributed +GOOD optimizer.lr=a", "optimizer.lr: expected a number"),
    ("run lora_dpo_single_device +GOOD", "the recipe dpo trains a chosen and a rejected answer"),
    ("run generate", "generate: a verb here: tt generate MODEL --raw -p 'Hello, my name is' --max-new-tokens 300"),
    (
        "run generate --config generation prompt=Hi checkpointer.checkpoint_dir=my top_k=null temperature=0.5",
        "generate: a verb here: tt generate my --raw -p Hi --max-new-tokens 300 --temperature 0.5 --seed 1234",
    ),
    ("run stf --config c.yaml", "stf: unknown recipe; did you mean 'sft'?"),
    ("run c.yaml --config c.yaml", "'c.yaml' is itself a config; give only one of the two"),
    ("run sft c.yaml", "did you mean --config c.yaml?"),
    ("run c.yaml sft", "'sft' is not KEY=VALUE; write sft --config c.yaml"),
    ("run sft sft", "the recipe is given already"),
    ("run seed=3 sft", "'sft' is not KEY=VALUE; the recipe comes first: sft seed=3"),
    ("run sft rows.jsonl", "did you mean data.train=rows.jsonl?"),
    ("run sft MODEL", "did you mean model.path=MODEL?"),
    ("run MODEL", "a model is named by a key: tt run sft model.path=MODEL"),
    ("run sft --config full", "full: a folder, not a config"),
    ("run sft model.pth=MODEL", "did you mean 'model.path'?"),
    ("run sft modelpath=MODEL", "did you mean 'model.path'?"),
    ("run sft batch_size:8", "write batch_size=8"),
    ("run sft optimizer.=3", "optimizer.: unknown key"),
    ("run sft --resume=", "--resume has no value (an unset shell variable?)"),
    ("run sft -o=x", "write -o x, without ="),
    ("run sft -o", "option '-o' requires an argument (see tt run --help)"),
    ("sft c.yaml", "did you mean tt run sft?"),
    ("c.yaml", "did you mean tt run c.yaml?"),
    ("train sft", "did you mean 'run'?"),
    ("run https://x.org/c.yaml", "an address, not a file; download it"),
    ("chat runs/eno", "runs/eno: no such run; did you mean 'runs/one'?"),
    ("chat run/one", "run/one: no such run; did you mean 'runs/one'?"),
    ("generate runs/absent hello", "runs/absent: no such run; did you mean 'runs/one'?; tt ls runs lists them"),
    ("merge one out", "one: no such run; did you mean 'runs/one'?"),
    ("report runs/oen", "did you mean 'runs/one'?"),
    ("convert smol.ggu out", "did you mean smol.gguf?"),
    ("run sft --config sft", "sft: a recipe, not a config; tt ls configs"),
    ("cat rows.jsonl", "rows.jsonl: a file of rows, not a config; tt data show rows.jsonl"),
    ("cp c.yaml d.yaml", "this is already a file; copy it with cp"),
    ("data show rows.jsonl --tokenizer MODEL -n x", "'x' is not a valid whole number"),
    ("data show rows.jsonl --tokenizer MODEL --start 100", "--start 100: the data set has 8 rows, counted from 0"),
    ("data show rows.jsonl --tokenizer MODEL --split trian", "it is one file and has no splits"),
    ("data show rows.jsonl MODEL", "a second source, 'MODEL'; did you mean --tokenizer MODEL?"),
    ("merge MODEL out --dtype fp8", "--dtype: 'fp8' is not one of"),
    (f"data show {'a' * 5000} --tokenizer MODEL", f"{'a' * 100}"),
    (f"run {'a' * 5000}.yaml", "aaa"),
    (f"chat {'a' * 5000}", "aaa"),
    ("run sft +GOOD data.worker_timeout_s=5m", "write 300, in seconds"),
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
    Path("smol.gguf").write_bytes(b"GGUF")
    Path("runs/one").mkdir(parents=True)
    Path("runs/one/config.yaml").write_text("recipe: sft\n")
    Path("runs/one/manifest.json").write_text("{}")


@pytest.mark.parametrize(("typed", "said"), SLIPS, ids=[typed[:60] for typed, _ in SLIPS])
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
    assert "an empty argument (an unset shell variable?)" in answer.err


@pytest.mark.parametrize(("words", "suggested"), [
    (["my rows.yaml"], ["tt", "run", "my rows.yaml"]),
    (["run", "sft", "my.yaml dir/my run.yaml"], ["--config", "my.yaml dir/my run.yaml"]),
    (["run", "sft", "my rows.jsonl"], ["data.train=my rows.jsonl"]),
    (["run", "sft", "--train", "my rows.jsonl"], ["data.train=my rows.jsonl"]),
    (["run", "sft", "--config", "my recipe.py"], ["tt", "run", "my recipe.py"]),
    (["run", "my rows.jsonl"], ["tt", "data", "show", "my rows.jsonl", "--tokenizer", "MODEL"]),
    (["run", "my recipe.py"], ["tt", "cp", "sft", "my recipe.py"]),
    (["run", "my model"], ["tt", "run", "sft", "model.path=my model"]),
    (["cp", "sft", "my model/config.json"], ["tt", "cp", "-f", "sft", "my model/config.json"]),
    (["data", "show", "my rows.jsonl", "batch_size=2"], ["tt", "data", "show", "sft", "data.train=my rows.jsonl"]),
    (["data", "show", "my rows.jsonl", "my model"], ["--tokenizer", "my model"]),
    (["run", "sft", "model.path=my run", "data.train=x.jsonl"], ["tt", "merge", "HERE/my run", "-o", "DIR"]),
    (["verify", "my run"], ["tt", "merge", "my run", "-o", "DIR"]),
])  # fmt: skip
def test_a_path_with_a_space_is_quoted_once_in_a_suggested_command(tt, tmp_path, monkeypatch, words, suggested):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my model").mkdir()
    (tmp_path / "my model" / "config.json").write_text("{}")
    (tmp_path / "my run" / "adapter").mkdir(parents=True)
    (tmp_path / "my run" / "config.yaml").write_text("recipe: sft\n")
    (tmp_path / "my run" / "manifest.json").write_text("{}")
    answer = tt(*words)
    assert answer.code == 2, answer.err
    assert shlex.join(word.replace("HERE", str(tmp_path)) for word in suggested) in answer.err


def test_a_missing_word_of_a_few_is_asked_for_with_those_words(tt):
    assert tt("completion").err == "error: missing SHELL: one of 'bash', 'zsh', 'fish' (see tt completion --help)\n"
