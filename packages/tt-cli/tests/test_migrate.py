"""``tt migrate``, and the names of torchtune on the command line."""

import json

import pytest
import yaml

THEIRS = (
    "model: {_component_: torchtune.models.llama3_2.lora_llama3_2_1b, lora_rank: 4}\n"
    "dataset: {_component_: torchtune.datasets.alpaca_dataset}\n"
    "optimizer: {_component_: torch.optim.AdamW, lr: 3e-4}\n"
    "batch_size: 2\ngradient_accumulation_steps: 3\nodd_key: 1\n"
)


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "theirs.yaml"
    file.write_text(THEIRS)
    return file


def test_the_yaml_is_on_stdout_and_what_differs_on_stderr(tt, file):
    said = tt("migrate", "theirs.yaml", "--devices", "2")
    assert said.code == 0
    ours = yaml.safe_load(said.out)
    assert (ours["recipe"], ours["batch_size"], ours["adapter"]["rank"]) == ("sft", 12, 4)
    assert "odd_key: not known" in said.err
    assert "batch_size" not in said.err


def test_the_result_is_written_to_a_new_file_only_and_can_be_shown(tt, file, tmp_path):
    assert tt("migrate", "theirs.yaml", "-o", "ours.yaml").out == "ours.yaml\n"
    assert tt("cat", "ours.yaml").code == 0
    again = tt("migrate", "theirs.yaml", "-o", "ours.yaml")
    assert (again.code, again.out) == (2, "")
    assert "ours.yaml exists; name another file" in again.err


def test_the_answer_in_json_has_the_config_and_the_problems(tt, file):
    found = json.loads(tt("migrate", "theirs.yaml", "--json").out)
    assert found["config"]["optimizer"]["lr"] == 3e-4
    assert any(problem.startswith("odd_key: ") for problem in found["problems"])


def test_a_value_that_torchtune_takes_and_tt_does_not_is_named(tt, tmp_path):
    (tmp_path / "theirs.yaml").write_text(THEIRS.replace("lora_rank: 4", "lora_rank: 0"))
    said = tt("migrate", "theirs.yaml")
    assert "adapter.rank: must be at least 1, got 0" in said.err
    assert said.code == 0


def test_a_yaml_that_is_not_of_torchtune_is_refused(tt, tmp_path):
    (tmp_path / "mine.yaml").write_text("recipe: sft\n")
    said = tt("migrate", "mine.yaml")
    assert (said.code, said.out) == (2, "")
    assert "not a config of torchtune" in said.err


def test_a_config_of_torchtune_is_shown_and_copied_by_its_name(tt, tmp_path):
    assert "rank: 8\n" in tt("cat", "llama2/7B_lora").out
    assert tt("cp", "llama2/7B_lora", "mine").out == "mine.yaml\n"
    text = (tmp_path / "mine.yaml").read_text()
    assert text.startswith(
        "# torchtune's config for lora_finetune_distributed. tt run lora_finetune_distributed --config"
    )
    assert yaml.safe_load(text)["batch_size"] == 64


def test_ls_shows_the_recipe_of_each_config(tt):
    found = json.loads(tt("ls", "--json").out)
    pairs = {row["name"]: row["recipe"] for row in found["configs"]}
    assert pairs["llama2/7B_lora_dpo_single_device"] == "lora_dpo_single_device"
    assert pairs["llama2/7b_lora"] == "sft"
    assert {"generate", "full_finetune_distributed", "sft"} <= {row["name"] for row in found["recipes"]}


@pytest.mark.parametrize("words", [("run", "generate", "--config", "generation"), ("cat", "generation"),
                                   ("validate", "Generation"), ("cp", "generate", "x.py")])  # fmt: skip
def test_a_name_whose_work_is_a_verb_here_says_which(tt, words):
    said = tt(*words)
    assert said.code == 2
    assert "tt generate MODEL --raw -p 'Hello, my name is' --max-new-tokens 300" in said.err
