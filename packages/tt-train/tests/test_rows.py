"""Which rows a recipe takes, and the keys of ``data:`` that decide which are read and dropped."""

import json

import pytest

from tt_train.config import SFTConfig
from tt_train.errors import ConfigError
from tt_train.job import assemble, rows_to_train
from tt_train.recipes.sft import main
from tt_train.settings.composing import compose
from tt_train.settings.keys.paths import absolute

PAIRS = [{"prompt": f"Say red {i}. ", "chosen": "red", "rejected": "blue"} for i in range(6)]
TEXTS = [{"prompt": f"Say red {i}. ", "completion": "red"} for i in range(18)]


def problems(config):
    """A line for each mistake; [] if a run would start."""
    try:
        assemble(config)
    except ConfigError as error:
        return error.problems
    return []


@pytest.fixture
def composed(model_dir, tmp_path):
    def compose_rows(data, *words, eval_rows=None):
        for name, some in (("train", data), ("eval", eval_rows or [])):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
        held_out = [f"data.eval={tmp_path / 'eval.jsonl'}"] if eval_rows else []
        given = [f"model.path={model_dir}", f"data.train={tmp_path / 'train.jsonl'}", *held_out]
        return compose("sft", overrides=[*given, f"output_dir={tmp_path / 'run'}", "device=cpu", *words])

    return compose_rows


@pytest.mark.parametrize("words", [(), ("data.packing=true", "data.max_seq_len=64"),
                                   ("data.streaming=true", "max_steps=1")])  # fmt: skip
def test_preference_rows_are_refused_by_sft_before_weights_load(composed, tmp_path, words):
    judged = [{"prompt": f"{i} ", "completion": "red", "label": True} for i in range(4)]
    kinds = [PAIRS] if words else [PAIRS, judged]
    for data in kinds:
        config = composed(data, *words)
        (problem,) = problems(config)
        assert problem.startswith("data.train: ")
        assert "preference" in problem
        assert "the recipe sft trains one answer each" in problem
        with pytest.raises(ConfigError, match="preference"):
            main(config)
    assert not (tmp_path / "run").exists()
    (problem,) = problems(composed(TEXTS, eval_rows=PAIRS))
    assert problem.startswith("data.eval: preference rows")


def test_single_answers_are_refused_by_a_recipe_of_pairs(composed):
    with pytest.raises(ConfigError, match="hold one answer each, the recipe sft trains a chosen and a rejected"):
        assemble(composed(TEXTS), rows="pair")
    assert assemble(composed(PAIRS), rows="pair").num_rows == 6


def test_the_schema_chooses_where_the_columns_fit_several(composed):
    data = [{**row, "completion": row["chosen"]} for row in PAIRS]
    assert problems(composed(data)) != []
    job = assemble(composed(data, "data.schema=prompt_completion"))
    assert job.train.schema == "prompt_completion"
    assert "did you mean 'prompt_completion'" in problems(composed(data, "data.schema=prompt_completon"))[0]


def test_a_tenth_of_bad_rows_is_the_most_unless_told(composed):
    bad = [{"prompt": "a", "completion": ""}] * 3
    (problem,) = problems(composed(TEXTS + bad))
    assert problem.startswith("data.train: ")
    assert "3 of 21 rows cannot be used (3 empty), max_dropped_share allows 10%" in problem
    assert problems(composed(TEXTS + bad[:2])) == []
    assert problems(composed(TEXTS + bad, "data.max_dropped_share=0.2")) == []
    assert "must be at most 1, got 10" in problems_of_words(composed, "data.max_dropped_share=10")
    assert len(rows_to_train(composed(TEXTS + bad))) == 18  # tt data show shows them all the same


def problems_of_words(composed, *words):
    with pytest.raises(ConfigError) as refusal:
        composed(TEXTS, *words)
    return str(refusal.value)


def test_duplicates_are_dropped_by_a_key(composed, tmp_path):
    assert assemble(composed(TEXTS + TEXTS)).num_rows == 18
    assert assemble(composed(TEXTS + TEXTS, "data.drop_duplicates=false")).num_rows == 36
    twice = composed(TEXTS, f"data.train=[{tmp_path / 'train.jsonl'}, {tmp_path / 'train.jsonl'}]")
    assert assemble(twice).num_rows == 36


def test_parts_of_a_directory_have_keys(composed, tmp_path):
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    for name in ("a.jsonl", "sub/b.jsonl"):
        (tmp_path / "folder" / name).write_text(json.dumps({"prompt": name, "completion": "red"}) + "\n")
    folder = f"data.train={tmp_path / 'folder'}"
    assert assemble(composed(TEXTS, folder)).num_rows == 2
    for word in ("data.data_dir=sub", "data.data_files=sub/*", "data.data_files=[sub/b.jsonl]"):
        job = assemble(composed(TEXTS, folder, word, eval_rows=TEXTS))  # what is held out is a file of its own
        assert [job.train.where(i) for i in range(job.num_rows)] == [f"{tmp_path}/folder/sub/b.jsonl:1"]
    assert "only hub data sets have them" in problems(composed(TEXTS, folder, "data.revision=main"))[0]


def test_a_pattern_of_files_is_kept_with_its_folder(composed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = absolute(composed(TEXTS, "data.train=tr*.jsonl"))
    assert config.data.train == f"{tmp_path}/tr*.jsonl"
    assert assemble(config).num_rows == 18
    assert absolute(composed(TEXTS, "data.train=no*.jsonl")).data.train == "no*.jsonl"


def test_folders_that_a_run_makes_are_found_again_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["model.path=org/model", "data.train=org/rows", "data.cache_dir=rows", "loss.reference_cache=new/refs"]
    config = absolute(compose("dpo", overrides=words))
    assert (config.data.cache_dir, config.loss.reference_cache) == (f"{tmp_path}/rows", f"{tmp_path}/new/refs")
    assert (config.model.path, config.data.train) == ("org/model", "org/rows")  # of the hub
    assert absolute(compose("dpo", overrides=words[:2])).loss.reference_cache is None


def test_the_new_keys_have_defaults():
    data = SFTConfig().data
    assert (data.schema, data.max_dropped_share, data.drop_duplicates) == (None, 0.1, True)
