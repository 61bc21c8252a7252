"""The recipe kd: what it refuses, and that a student learns what only its teacher knows."""

import json
import shutil

import pytest
import torch

import tt_ckpt
import tt_models
import tt_train
from tt_train import compose
from tt_train.errors import ConfigError
from tt_train.job import assemble
from tt_train.recipes import kd, sft


def rows_of(run, name="metrics.jsonl"):
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def teacher(model_dir, rows_file, tmp_path_factory):
    """A model that was trained to answer everything with the same word."""
    folder = tmp_path_factory.mktemp("teacher")
    turns = [json.loads(line)["messages"] for line in rows_file.read_text().splitlines()]
    taught = [{"messages": [ask, {"role": "assistant", "content": "omicron"}]} for ask, _ in turns]
    (folder / "taught.jsonl").write_text("".join(json.dumps(row) + "\n" for row in taught))
    words = [f"model.path={model_dir}", f"data.train={folder / 'taught.jsonl'}", "model.dtype=fp32", "device=cpu"]
    words += ["batch_size=8", "micro_batch_size=8", "max_steps=40", "optimizer.lr=5e-3", "samples.num=0"]
    return sft.main(compose("sft", overrides=[*words, f"output_dir={folder / 'run'}"]))


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
@pytest.mark.parametrize("adapter", [[], ["adapter.rank=8", "adapter.modules_to_save=[lm_head]"]])
def test_a_student_learns_what_only_the_teacher_knows(words, teacher, tmp_path, divergence, adapter):
    """The rows say one thing and the teacher another: without cross entropy, the student follows the teacher."""
    more = [f"kd.teacher={teacher}", f"kd.divergence={divergence}", "kd.cross_entropy_weight=0", "data.packing=true"]
    more += ["data.eval=0.2", "max_steps=60", "optimizer.lr=1e-2", "data.max_seq_len=64", "micro_batch_size=8"]
    run = kd.main(compose("kd", overrides=[*words, *more, *adapter, f"output_dir={tmp_path / 'run'}"]))
    before, after = rows_of(run)[0], rows_of(run)[-1]
    assert after["eval_loss"] < before["eval_loss"] / 4
    assert after["eval_divergence"] == pytest.approx(after["eval_loss"], rel=1e-4)
    assert after["eval_cross_entropy"] > 4 * after["eval_loss"]  # of the rows, which it does not learn
    answers = [row["generation"] for row in rows_of(run, "samples.jsonl") if row["step"] == 60]
    assert answers
    assert all(answer.startswith("omicron") for answer in answers)


def test_cross_entropy_alone_is_supervised_fine_tuning(words, teacher, tmp_path):
    more = [*words, "max_steps=4"]
    plain = sft.main(compose("sft", overrides=[*more, f"output_dir={tmp_path / 'sft'}"]))
    overrides = [*more, f"kd.teacher={teacher}", "kd.cross_entropy_weight=1", f"output_dir={tmp_path / 'kd'}"]
    found = kd.main(compose("kd", overrides=overrides))
    for one, other in zip(rows_of(plain), rows_of(found), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_a_stopped_run_continues_to_the_same_bits(words, teacher, tmp_path):
    more = [*words, f"kd.teacher={teacher}", "kd.teacher_dtype=fp32", "kd.temperature=2", "save_every=3"]
    whole = kd.main(compose("kd", overrides=[*more, f"output_dir={tmp_path / 'whole'}"]))
    shutil.copytree(whole, tmp_path / "half")
    for name in ("step-000006",):
        shutil.rmtree(tmp_path / "half" / "checkpoints" / name)
    continued = kd.main(
        compose("kd", overrides=[*more, f"output_dir={tmp_path / 'again'}"]),
        resume=tmp_path / "half" / "checkpoints" / "step-000003",
    )
    first, second = (tt_train.load(run)[0].state_dict() for run in (whole, continued))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("key", "value", "said"), [
    ("divergence", "js", "kd.divergence: expected one of forward, reverse, got 'js'"),
    ("temperature", "0", "kd.temperature: must be positive, got 0"),
    ("cross_entropy_weight", "1.5", "kd.cross_entropy_weight: must be at most 1, got 1.5"),
    ("teacher_dtype", "fp16", "kd.teacher_dtype: expected one of bf16, fp32, got 'fp16'"),
    ("teachr", "model", "kd.teachr: unknown key; did you mean 'kd.teacher'?"),
])  # fmt: skip
def test_values_that_cannot_be_meant_are_refused_by_compose(words, model_dir, key, value, said):
    with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
        compose("kd", overrides=[*words, f"kd.teacher={model_dir}", f"kd.{key}={value}"])


def test_a_missing_teacher_is_told(words):
    with pytest.raises(ConfigError, match="kd.teacher: missing; give the model to learn from"):
        compose("kd", overrides=words)


def changed_copy(model_dir, folder, **keys):
    """A copy of a model with another vocabulary or other keys, and weights that fit."""
    copy = shutil.copytree(model_dir, folder)
    config = json.loads((copy / "config.json").read_text()) | keys
    (copy / "model.safetensors").unlink()
    model = tt_models.build(tt_models.config_from_hf(config))
    tt_ckpt.save_hf(model, folder.parent / "made", config=config)
    shutil.copy(folder.parent / "made" / "model.safetensors", copy)
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def test_a_teacher_of_another_tokenizer_is_refused(words, model_dir, tmp_path):
    copy = shutil.copytree(model_dir, tmp_path / "copy")
    file = copy / "tokenizer.json"
    text = file.read_text()
    vocabulary = json.loads(text)["model"]["vocab"]
    one, other = next((a, b) for a in vocabulary for b in vocabulary if len(a) == len(b) == 1 and a < b)
    swapped = json.loads(text)
    swapped["model"]["vocab"] |= {one: vocabulary[other], other: vocabulary[one]}
    file.write_text(json.dumps(swapped))
    config = compose("kd", overrides=[*words, f"kd.teacher={copy}"])
    with pytest.raises(
        ConfigError, match="kd.teacher: its token .* is '.', the student's '.', so its prob.*take a teacher"
    ):
        assemble(config)
    merges = json.loads(text)
    merges["model"]["merges"] = merges["model"]["merges"][:2]
    file.write_text(json.dumps(merges))
    with pytest.raises(ConfigError, match="kd.teacher: its tokenizer makes other ids of '<"):
        assemble(config)


def test_a_teacher_that_reads_less_than_the_rows_have_is_refused(words, model_dir, tmp_path):
    short = changed_copy(model_dir, tmp_path / "short", max_position_embeddings=32)
    with pytest.raises(ConfigError, match="kd.teacher: it reads at most 32 tokens .* rows may have 128; set data.max"):
        assemble(compose("kd", overrides=[*words, f"kd.teacher={short}"]))
    assemble(compose("kd", overrides=[*words, f"kd.teacher={short}", "data.max_seq_len=32"]))


def test_a_teacher_that_is_no_model_is_refused(words, tmp_path, model_dir):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "none"):
        with pytest.raises(ConfigError, match="kd.teacher: "):
            assemble(compose("kd", overrides=[*words, f"kd.teacher={folder}"]))
    cut = shutil.copytree(model_dir, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((model_dir / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ConfigError, match="kd.teacher: .*cut short"):
        assemble(compose("kd", overrides=[*words, f"kd.teacher={cut}"]))


def test_a_larger_teacher_with_a_padded_vocabulary_teaches(words, model_dir, tmp_path):
    wide = changed_copy(model_dir, tmp_path / "wide", hidden_size=48, head_dim=12, vocab_size=448)
    run = kd.main(compose("kd", overrides=[*words, f"kd.teacher={wide}", f"output_dir={tmp_path / 'run'}"]))
    assert rows_of(run)[-1]["divergence"] > 0
