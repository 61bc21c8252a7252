"""The whole story at a size that takes seconds, and the verb around it."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tt_cli.quickstart.commands
import tt_data
import tt_models
import tt_train
from tt_cli.quickstart import commands, story
from tt_cli.quickstart.commands import Folders, Scale, Stage
from tt_cli.quickstart.narrator import Narrator, StageLines, default_root
from tt_cli.quickstart.rows import KINDS, PREFERRED, TARGET
from tt_cli.quickstart.story import Outcome, tell

TINY = Scale(
    hidden_size=32,
    num_hidden_layers=1,
    vocab_size=320,
    rank=2,
    num_held_out=10,
    num_base_held_out=5,
    pretrain=Stage(num_rows=40, max_steps=100, learning_rate=1e-2, batch_size=8),
    finetune=Stage(num_rows=20, max_steps=10, learning_rate=1e-2, batch_size=4),
    preferences=Stage(num_rows=12, max_steps=2, learning_rate=1e-2, batch_size=4),
)
GOOD = Outcome(
    seed=0,
    before={TARGET: 0.01, "add": 1.0},
    after={TARGET: 0.99, PREFERRED: 0.01, "add": 0.5},
    logits_apart=1e-6,
    answers_apart=0,
    pairs=30,
    preferred={TARGET: 0.9, PREFERRED: 0.95, "add": 0.5},
    question="Sort: b a",
    answer="a b",
    commands=[],
)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Folders, Outcome]:
    root = tmp_path_factory.mktemp("story") / "qs"
    return Folders(root), tell(root, seed=3, scale=TINY, narrator=Narrator())


def test_the_story_leaves_everything_that_it_names(told: tuple[Folders, Outcome]):
    folders, outcome = told
    for path in (
        folders.pretrain_rows,
        folders.finetune_rows,
        folders.held_out_rows,
        folders.pair_rows,
        folders.report,
    ):
        assert path.stat().st_size > 0
    for path in (folders.blank, folders.base, folders.merged):
        assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= {
            file.name for file in path.iterdir()
        }
    for run in (folders.lora_run, folders.dpo_run):
        assert (run / "adapter" / "adapter_model.safetensors").is_file()
    assert set(outcome.before) == set(outcome.after) == set(outcome.preferred) == {TARGET, PREFERRED, *KINDS}


def test_each_stage_trained_for_its_steps(told: tuple[Folders, Outcome]):
    folders, _ = told
    for run, stage in (
        (folders.pretrain_run, TINY.pretrain), (folders.lora_run, TINY.finetune), (folders.dpo_run, TINY.preferences)
    ):  # fmt: skip
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if row["step"]] == list(range(1, stage.max_steps + 1))


def test_merged_and_adapted_agree_and_differ_from_the_base(told: tuple[Folders, Outcome]):
    folders, outcome = told
    assert outcome.logits_apart <= story.SAME_LOGITS
    assert outcome.answers_apart == 0
    ids = torch.arange(10).view(1, -1)
    base, adapted, merged = (
        tt_train.load(path, device="cpu")[0](ids) for path in (folders.base, folders.lora_run, folders.merged)
    )
    torch.testing.assert_close(merged, adapted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(base, merged, atol=1e-4)


def test_the_rejected_answers_are_the_merged_models_own_wrong_ones(told: tuple[Folders, Outcome]):
    folders, outcome = told
    pairs = [json.loads(line) for line in folders.pair_rows.read_text().splitlines()]
    assert 0 < len(pairs) == outcome.pairs <= TINY.preferences.num_rows
    model, tokenizer = tt_train.load(folders.merged, device="cpu")
    questions, chosen, rejected = (
        [pair[key][0]["content"] for pair in pairs] for key in ("prompt", "chosen", "rejected")
    )
    said = story.answers(model, tokenizer, questions)
    assert rejected == [answer.removesuffix("...") for answer in said]
    for question, right, wrong in zip(questions, chosen, rejected, strict=True):
        assert wrong != right == " ".join(sorted(question.removeprefix("Sort: ").split()))
    other = {json.loads(line)["messages"][0]["content"] for path in (folders.finetune_rows, folders.held_out_rows)
             for line in path.read_text().splitlines()}  # fmt: skip
    assert other.isdisjoint(questions)


def test_preferences_start_from_the_merged_model_and_move_it(told: tuple[Folders, Outcome]):
    folders, _ = told
    steps = [json.loads(line) for line in (folders.dpo_run / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in steps if row["step"] == 1)
    assert first["rewards_margin"] == 0  # the reference is the model that training starts from
    ids = torch.arange(10).view(1, -1)
    merged, preferred = (tt_train.load(path, device="cpu")[0](ids) for path in (folders.merged, folders.dpo_run))
    assert not torch.allclose(merged, preferred, atol=1e-4)


def test_a_model_that_is_never_wrong_has_no_preferences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(story, "write_pairs", lambda path, rows, given: 0)
    outcome = tell(tmp_path / "qs", seed=3, scale=TINY, narrator=Narrator())
    assert not (tmp_path / "qs" / "runs" / "dpo").exists()
    assert outcome.preferred == outcome.after
    assert "preferences: the merged model gave no wrong answer to learn from, expected some" in outcome.shortfalls
    assert "tt run dpo" not in capsys.readouterr().err + " ".join(outcome.commands)


def test_transformers_loads_base_and_merged(told: tuple[Folders, Outcome]):
    transformers = pytest.importorskip("transformers")
    folders, _ = told
    ids = torch.arange(10).view(1, -1)
    for path in (folders.base, folders.merged):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(path)
        with torch.no_grad():
            ours = tt_train.load(path, device="cpu")[0](ids)
            torch.testing.assert_close(ours, theirs(ids).logits, rtol=1e-5, atol=1e-5)


def test_the_same_seed_tells_the_same_story(told: tuple[Folders, Outcome], tmp_path: Path):
    folders, outcome = told
    again = tell(tmp_path / "qs", seed=3, scale=TINY, narrator=Narrator())
    for weights in (
        "pretrain/model/model.safetensors",
        *(f"{run}/adapter/adapter_model.safetensors" for run in ("lora", "dpo")),
    ):
        one, other = (load_file(root / "runs" / weights) for root in (folders.root, tmp_path / "qs"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert replace(again, commands=[]) == replace(outcome, commands=[])


def test_the_commands_are_what_was_run(told: tuple[Folders, Outcome]):
    folders, outcome = told
    lines = [line for line in outcome.commands if line.startswith("tt run ")]
    for line, run in zip(lines, (folders.pretrain_run, folders.lora_run, folders.dpo_run), strict=True):
        tt, verb, recipe, *words, dash_o, output = shlex.split(line)
        assert (tt, verb, dash_o, output) == ("tt", "run", "-o", str(run))
        typed = tt_train.compose(recipe, overrides=words)
        ran = tt_train.compose(run / "config.yaml")
        assert replace(typed, model=None, data=None) == replace(ran, model=None, data=None)  # type: ignore[arg-type]
        assert Path(str(typed.model.path)).resolve() == Path(str(ran.model.path)).resolve()


def test_the_typed_commands_run(told: tuple[Folders, Outcome], tmp_path: Path, tt):
    _, outcome = told
    outputs = {"run": "-o", "merge": "-o", "report": "-o"}
    for number, line in enumerate(outcome.commands):
        words = shlex.split(line)
        if "|" in words:
            continue
        if outputs.get(words[1]):
            words[-1] = str(tmp_path / f"{number}.html")
        answer = tt(*words[1:])
        assert answer.code == 0, (line, answer.err)


def test_a_chat_turn_is_what_the_story_told(told: tuple[Folders, Outcome], tt_process):
    folders, outcome = told
    answer = tt_process("chat", str(folders.lora_run), input=outcome.question + "\n")
    assert answer.out.rstrip("\n") == outcome.answer.rstrip("\n")


@pytest.mark.parametrize(("change", "told"), [
    ({"before": {TARGET: 0.10}}, "sort before: 10.0 %"),
    ({"after": {TARGET: 0.90, PREFERRED: 0.01}}, "sort after: 90.0 %"),
    ({"logits_apart": 1e-3}, "logits 1e-03"),
    ({"answers_apart": 1}, "1 answer unlike"),
    ({"preferred": {PREFERRED: 0.8}}, "sort 3 or 7 after preferences: 80.0 % of held-out rows, expected over 80.0 %"),
    ({"after": {TARGET: 0.99, PREFERRED: 0.95}}, "after preferences: 95.0 % of held-out rows, expected over 95.0 %"),
    ({"pairs": 0}, "no wrong answer"),
])  # fmt: skip
def test_each_shortfall_is_named(change: dict[str, object], told: str):
    assert GOOD.shortfalls == []
    (line,) = replace(GOOD, **change).shortfalls  # type: ignore[arg-type]
    assert told in line


def test_paths_that_yaml_would_misread_are_quoted(tmp_path: Path):
    folders = Folders(tmp_path / "a #b: c")
    for recipe, words in (
        ("sft", commands.pretrain_words(folders, TINY, seed=0)),
        ("sft", commands.lora_words(folders, TINY, seed=0)),
        ("sft", commands.both_words(folders, TINY, seed=0)),
        ("dpo", commands.dpo_words(folders, TINY, seed=0)),
    ):
        config = tt_train.compose(recipe, overrides=words)
        rows = config.data.train if isinstance(config.data.train, list) else [config.data.train]
        assert str(config.model.path).startswith(str(folders.root))
        assert all(str(path).startswith(str(folders.root)) for path in rows)


def test_the_commands_to_go_on_with_are_well_formed(tmp_path: Path):
    folders = Folders(tmp_path)
    lines = [*commands.go_on(folders, TINY, "Sort: b a", seed=1), *commands.on_your_own(folders, TINY)]
    runs = [shlex.split(line, comments=True) for line in lines]
    assert all(words[0] == "tt" for words in runs)
    for words in runs:
        if words[1] == "run":
            assert tt_train.compose(words[2], overrides=words[3:-2]).adapter is not None


def test_training_on_both_files_takes_twice_the_steps(tmp_path: Path):
    words = commands.both_words(Folders(tmp_path), TINY, seed=0)
    assert tt_train.compose("sft", overrides=words).max_steps == 2 * TINY.finetune.max_steps


def test_the_model_named_for_your_own_is_one_that_loads():
    # config.json of HuggingFaceTB/SmolLM2-135M-Instruct, what shapes the model
    config = {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "rope_theta": 100000, "rope_scaling": None, "rope_interleaved": False,
        "tie_word_embeddings": True, "attention_bias": False, "hidden_act": "silu", "is_llama_config": True,
    }  # fmt: skip
    model = tt_models.build(tt_models.config_from_hf(config), device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008


def test_lines_are_told_now_and_then_and_at_the_end(capsys: pytest.CaptureFixture[str]):
    console = StageLines()
    console.steps_total = 250
    for step in range(1, 251):
        console.step({"step": step, "loss": 1.0, "lr": 1.0, "grad_norm": 1.0, "tokens_per_s": 1.0, "eta_s": 1.0})
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["100", "200", "250"]


def test_the_default_folder_is_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tt-quickstart", "tt-quickstart-2", "tt-quickstart-3"):
        root = default_root()
        assert root == Path(name)
        root.mkdir()


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tt_cli.quickstart.commands, "Scale", lambda: TINY)


@pytest.mark.usefixtures("tiny")
def test_a_bar_that_is_missed_is_exit_code_1(tmp_path: Path, tt):
    threads = torch.get_num_threads()
    answer = tt("quickstart", "-o", str(tmp_path / "qs"), "--seed", "5")
    assert answer.code == 1
    assert "error: sort after: 0.0 % of held-out rows, expected over 90.0 %" in answer.err
    assert f"tt run sft model.path={tmp_path}/qs/blank" in answer.err
    assert "error: sort 3 or 7 after preferences: 0.0 % of held-out rows, expected over 80.0 %" in answer.err
    assert f"tt run dpo model.path={tmp_path}/qs/merged" in answer.err
    assert "unseen questions" in answer.out
    assert "with preferences" in answer.out
    assert torch.get_num_threads() == threads


@pytest.mark.usefixtures("tiny")
def test_json_is_one_object_and_follows_the_seed(tmp_path: Path, tt):
    root = tmp_path / "qs"
    answer = tt("quickstart", "-o", str(root), "--seed", "6", "--json")
    assert answer.code == 1
    assert answer.json["ok"] is False
    assert answer.json["errors"] == [
        "sort after: 0.0 % of held-out rows, expected over 90.0 %",
        "sort 3 or 7 after preferences: 0.0 % of held-out rows, expected over 80.0 %",
    ]
    assert answer.json["pairs"] == len((root / "data" / "pairs.jsonl").read_text().splitlines()) > 0
    assert answer.json["preferred"].keys() == {TARGET, PREFERRED, *KINDS}
    assert (answer.json["seed"], answer.json["output_dir"]) == (6, str(root))
    assert (root / "data" / "pretrain.jsonl").read_text() != _rows_of_seed(5, tmp_path)


def _rows_of_seed(seed: int, folder: Path) -> str:
    from tt_cli.quickstart.rows import make_splits, write_rows

    rows = make_splits(seed, num_pretrain=40, num_finetune=20, num_held_out=10, num_base_held_out=5).pretrain
    return write_rows(folder / "rows.jsonl", rows).read_text()


@pytest.mark.parametrize("kind", ["full folder", "file"])
def test_an_output_that_is_taken_is_refused(tmp_path: Path, kind: str, tt):
    taken = tmp_path / "taken"
    if kind == "file":
        taken.write_text("mine")
    else:
        taken.mkdir()
        (taken / "mine").write_text("mine")
    answer = tt("quickstart", "-o", str(taken))
    assert answer.code == 2
    assert answer.err == f"error: {taken} exists and is not empty; name a new folder with -o DIR\n"


def test_pairs_are_trained_in_the_template_that_the_model_answers_in(told: tuple[Folders, Outcome], tt):
    folders, _ = told
    answer = tt("data", "show", str(folders.pair_rows), "--tokenizer", str(folders.merged), "-n", "1")
    assert answer.code == 0
    pair = json.loads(folders.pair_rows.read_text().splitlines()[0])
    tokenizer = tt_data.load_tokenizer(folders.merged)
    for side in ("chosen", "rejected"):
        shown = tokenizer.render([*pair["prompt"], *pair[side]])
        assert shown in re.sub("[\u27e6\u27e7]", "", answer.out)


def test_the_held_out_rows_are_scored_with_the_rows_template(told: tuple[Folders, Outcome]):
    folders, _ = told
    tokenizer = tt_data.load_tokenizer(folders.merged)
    row = json.loads(folders.held_out_rows.read_text().splitlines()[0])
    prompt = tokenizer.render(row["messages"][:1], add_generation_prompt=True)
    assert tokenizer.render(row["messages"]).startswith(prompt)
