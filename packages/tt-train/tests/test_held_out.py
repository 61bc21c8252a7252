"""Held-out rows: one token mean, perplexity, named sets, exact match; on one rank and on two."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

import tt_train
from tt_train import ConfigError, Interrupted, compose
from tt_train.build import load_model, make_objective
from tt_train.evaluate import evaluating, held_out_figures
from tt_train.inputs.questions import Question, questions
from tt_train.job import assemble
from tt_train.losses.cross_entropy import Summed, cross_entropy
from tt_train.recipes import dpo, sft
from tt_train.records.run_files import read_json, read_rows
from tt_train.run.console import Console
from tt_train.run.exact_match import _batches, exact_match

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def no_report():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tt_train.run.finish.write_report", lambda runs, **more: ("", ""))
        yield


class Quiet(Console):
    def note(self, text):
        pass


class StopsAt(Quiet):
    """A signal in the step ``step``."""

    def __init__(self, step):
        self.stop_at = step

    def step(self, row):
        import os
        import signal

        if row["step"] == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def files(rows_file, tmp_path):
    """``news`` has 5 rows, ``code`` 8, of the rows of ``rows_file``."""
    lines = rows_file.read_text().splitlines(keepends=True)
    found = {"news": tmp_path / "news.jsonl", "code": tmp_path / "code.jsonl"}
    found["news"].write_text("".join(lines[:5]))
    found["code"].write_text("".join(lines[5:13]))
    return found


def named(files):
    return f"data.eval={{{', '.join(f'{name}: {file}' for name, file in files.items())}}}"


def made(words, *more):
    """(job, model) of a config."""
    job = assemble(compose("sft", overrides=[*words, *more]))
    return job, load_model(job)


def figures_of(job, model, *, size=4, objective=None):
    return held_out_figures(model, job.held_out, objective or make_objective(job.config), micro_batch_size=size,
                            pad_id=job.tokenizer.pad_id, device=CPU)  # fmt: skip


# ---- one token mean ----


@pytest.mark.parametrize("size", [1, 2, 5])
def test_held_out_loss_is_one_mean_over_tokens_and_not_a_mean_of_batches(size):
    """Trap 23: a loss of 2 over 1 token and of 90 over 9 are 9.2 a token, not 6.0."""
    rows = [{"input_ids": [7] * 10, "labels": [-100] + [90] * 9}, {"input_ids": [7, 7], "labels": [-100, 2]}]

    def objective(model, batch):
        trained = batch["labels"] != -100
        losses = [{90: 90.0, 2: 2.0}[int(row.max())] for row in batch["labels"]]
        return Summed(torch.tensor(sum(losses)), int(trained.sum()), tokens=int(trained.sum()))

    found = held_out_figures(torch.nn.Identity(), rows, objective, micro_batch_size=size, pad_id=0, device=CPU)
    assert found == {"eval_loss": pytest.approx(9.2)}


@pytest.mark.parametrize("packing", [False, True])
def test_every_held_out_row_counts_once_whatever_the_batch_size(words, packing):
    job, model = made(words, "data.eval=0.35", f"data.packing={packing}", "data.max_seq_len=64")
    rows = [job.held_out[index] for index in range(len(job.held_out))]
    total = count = 0
    with evaluating(model):
        for row in rows:
            positions = {name: torch.tensor([row[name]]) for name in ("position_ids",) if name in row}
            hidden = model.hidden_states(torch.tensor([row["input_ids"]]), **positions)
            labels = torch.tensor(row["labels"][1:])
            total += float(F.cross_entropy(model.logits(hidden)[0, :-1].double(), labels, reduction="sum"))
            count += int((labels != -100).sum())
    for size in (1, 3, 8, 64):
        found = figures_of(job, model, size=size)
        assert found["eval_loss"] == pytest.approx(total / count, rel=1e-6)
        assert found["eval_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


# ---- perplexity ----


def test_a_run_of_hardly_a_step_because_its_few_rows_are_packed_is_reported(words, tmp_path):
    packed = [*words, "data.packing=true", "data.max_seq_len=64", "max_steps=null", "epochs=1"]
    notes = assemble(compose("sft", overrides=[*packed, "batch_size=64"])).notes
    assert any(
        note.startswith("data.packing: ") and "make a run of 1 step; for more steps, lower" in note for note in notes
    )
    for more in (["batch_size=1", "micro_batch_size=1"], ["max_steps=3"], ["data.packing=false"]):
        notes = assemble(compose("sft", overrides=[*packed, "batch_size=64", *more])).notes
        assert not any("data.packing" in note for note in notes)
    (tmp_path / "few.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    with pytest.raises(ConfigError, match="1 pack of rows cannot be split; set data.packing=false, or give data.eval"):
        assemble(compose("sft", overrides=[*packed, f"data.train={tmp_path}/few.jsonl", "data.eval=0.1"]))


def test_perplexity_is_given_only_if_the_mean_cross_entropy_per_token_is_known(words):
    job, model = made(words, "data.eval=0.2", "loss.label_smoothing=0.1")
    assert set(figures_of(job, model)) == {"eval_loss"}

    def doubled(model, batch):
        part = cross_entropy(model, batch)
        return part._replace(loss=2 * part.loss)

    def saying_so(model, batch):
        part = cross_entropy(model, batch)
        return part._replace(loss=2 * part.loss, metrics={"cross_entropy": part.loss})

    def of_rows(model, batch):
        return saying_so(model, batch)._replace(count=len(batch["labels"]))

    assert set(figures_of(job, model, objective=doubled)) == {"eval_loss"}
    assert set(figures_of(job, model, objective=of_rows)) == {"eval_loss", "eval_cross_entropy"}
    plain = figures_of(job, model, objective=cross_entropy)
    assert figures_of(job, model, objective=saying_so)["eval_perplexity"] == pytest.approx(plain["eval_perplexity"])


def test_a_loss_whose_exponential_is_too_large_has_no_finite_perplexity():
    rows = [{"input_ids": [1, 2], "labels": [-100, 2]}]

    def huge(model, batch):
        return Summed(torch.tensor(1e4), 1, tokens=1, metrics={"cross_entropy": torch.tensor(1e4)})

    found = held_out_figures(torch.nn.Identity(), rows, huge, micro_batch_size=1, pad_id=0, device=CPU)
    assert found["eval_perplexity"] == math.inf


# ---- named sets ----


def test_named_sets_have_figures_of_their_own_and_together_one_token_mean(words, files):
    job, model = made(words, named(files))
    found = figures_of(job, model)
    alone = {name: figures_of(*made(words, f"data.eval={file}")) for name, file in files.items()}
    together = figures_of(*made(words, f"data.eval=[{files['news']}, {files['code']}]"))
    for key in ("eval_loss", "eval_perplexity"):
        assert found[key] == pytest.approx(together[key], rel=1e-6)
        for name in files:
            assert found[f"{key}_{name}"] == pytest.approx(alone[name][key], rel=1e-6)
    assert found["eval_loss"] != pytest.approx((alone["news"]["eval_loss"] + alone["code"]["eval_loss"]) / 2, rel=1e-6)
    assert len(found) == 6


def test_both_forms_of_a_mapping_are_read_in_yaml_and_in_a_word(words, files, tmp_path):
    names = {name: str(file) for name, file in files.items()}
    config = tmp_path / "c.yaml"
    config.write_text(f"recipe: sft\ndata:\n  eval:\n    news: {names['news']}\n    code: [{names['code']}]\n")
    assert compose(config, overrides=words).data.eval == {"news": names["news"], "code": [names["code"]]}
    word = "data.eval={news: a.jsonl, code: [a.jsonl, b.jsonl]}"
    assert compose("sft", overrides=[*words, word]).data.eval == {"news": "a.jsonl", "code": ["a.jsonl", "b.jsonl"]}
    weights = f"data.eval={{{names['news']}: 0.5, {names['code']}: 0.5}}"
    job = assemble(compose("sft", overrides=[*words, weights]))
    assert (type(job.held_out).__name__, len(job.held_out)) == ("MixedDataset", 10)


def test_what_became_of_the_rows_of_each_set_is_said(words, files):
    with files["code"].open("a") as file:
        file.write('{"messages": []}\n' * 2)
    job = assemble(compose("sft", overrides=[*words, named(files), "data.max_dropped_share=1"]))
    first, *rest = job.data_lines
    assert "; held out as news: 5 " in first
    assert "; held out as code: 8 " in first
    assert any(line.startswith("held out as code: ") for line in rest)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("{news: a.jsonl, b.jsonl: 0.3}", "'b.jsonl' has the number 0.3, other names have sources"),
        ("{a.jsonl: half}", "'a.jsonl' is not the name of a set"),
        ("{news set: a.jsonl}", "'news set' is not the name of a set"),
        ("{news: a.jsonl, code: []}", "data.eval.code: expected a source"),
        ("{news: a.jsonl, code: {b.jsonl: 0.5}}", "data.eval.code: expected a source"),
        ("{news: a.jsonl, code: null}", "data.eval.code: expected a source"),
    ],
)
def test_a_mapping_that_is_neither_names_nor_weights_is_an_error(words, value, said):
    with pytest.raises(ConfigError) as error:
        compose("sft", overrides=[*words, f"data.eval={value}"])
    assert any(said in line for line in error.value.problems)


def test_every_set_that_cannot_be_read_is_named(words):
    with pytest.raises(ConfigError) as error:
        assemble(compose("sft", overrides=[*words, "data.eval={news: missing.jsonl, code: gone.jsonl}"]))
    keys = [line.partition(": ")[0] for line in error.value.problems]
    assert keys == ["data.eval.news", "data.eval.code"]


def test_a_run_with_named_sets_records_each_of_them_and_repeats_from_anywhere(words, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code").mkdir()  # the name of a set is not a path
    relative = [*words, "data.eval={news: news.jsonl, code: code.jsonl}", "eval_every=3", "samples.exact_match=2"]
    path = sft.main(compose("sft", overrides=[*relative, f"output_dir={tmp_path / 'run'}"]), console=Quiet())
    assert compose(path / "config.yaml").data.eval == {name: str(file) for name, file in files.items()}
    rows = [row for row in read_rows(path / "metrics.jsonl") if "eval_loss" in row]
    keys = {
        f"eval_{figure}{name}" for figure in ("loss", "perplexity", "exact_match") for name in ("", "_news", "_code")
    }
    assert [row["step"] for row in rows] == [0, 3, 6]
    for row in rows:
        assert keys == {key for key in row if key.startswith("eval_")}
    manifest = read_json(path / "manifest.json")
    assert manifest["data"]["held_out_rows"] == 13
    assert manifest["data"]["held_out_sets"] == {"news": 5, "code": 8}
    summary = manifest["summary"]
    assert summary["eval_loss"] == rows[-1]["eval_loss"]
    assert summary["eval_sets"]["news"]["loss"] == rows[-1]["eval_loss_news"]
    card = (path / "README.md").read_text()
    assert f"| held-out loss, code | {rows[-1]['eval_loss_code']:.4f} |" in card
    assert f"| held-out perplexity | {rows[-1]['eval_perplexity']:.4f} |" in card
    assert "| exact match on held-out rows |" in card
    assert manifest["best"]["eval_loss"] == min(row["eval_loss"] for row in rows[1:])
    asked = [sample["expected"] for sample in read_rows(path / "samples.jsonl") if sample["step"] == 0]
    assert len(set(asked)) == 3  # from both sets in turn


def test_a_set_whose_figure_has_the_name_of_another_is_an_error(words, files):
    job, model = made(words, named({"x": files["news"]}))

    def naming_it(model, batch):
        part = cross_entropy(model, batch)
        return part._replace(metrics={"loss_x": part.loss})

    with pytest.raises(tt_train.TrainingError, match="rename the set"):
        figures_of(job, model, objective=naming_it)


# ---- exact match ----


@pytest.fixture(scope="module")
def learnt(tmp_path_factory, model_dir, rows_file):
    """A run that knows its 8 rows by heart, all of them held out too."""
    folder = tmp_path_factory.mktemp("learnt")
    (folder / "rows.jsonl").write_text("".join(rows_file.read_text().splitlines(keepends=True)[:8]))
    words = [f"model.path={model_dir}", f"data.train={folder / 'rows.jsonl'}", f"data.eval={folder / 'rows.jsonl'}",
             "model.dtype=fp32", "batch_size=8", "micro_batch_size=8", "max_steps=120", "optimizer.lr=2e-2",
             "device=cpu", "samples.exact_match=100", "samples.num=2", f"output_dir={folder / 'run'}"]  # fmt: skip
    return sft.main(compose("sft", overrides=words), console=Quiet()), words


def test_the_end_token_is_not_part_of_the_text_that_is_compared(learnt):
    """Trap 25: answers known by heart are all right."""
    path, _ = learnt
    found = [row["eval_exact_match"] for row in read_rows(path / "metrics.jsonl") if "eval_exact_match" in row]
    assert found == [0.0, 1.0]
    assert read_json(path / "manifest.json")["summary"]["eval_exact_match"] == 1.0


def test_answers_in_batches_are_those_of_each_prompt_alone(learnt, words, rows_file):
    import tt_models

    path, _ = learnt
    model, tokenizer = tt_train.load(path, device="cpu", dtype=torch.float32)
    job = assemble(compose("sft", overrides=[*words, f"data.eval={rows_file}"]))
    asked = questions(job.held_out, tokenizer, num=37)
    assert len(asked) == 37
    right = 0
    for question in asked:
        ids = torch.tensor([question.ids])
        text = tokenizer.decode(list(tt_models.stream(model, ids, max_new_tokens=50, temperature=0, eos_ids=[2])))
        right += text.strip() == question.expected.strip()
    assert 8 <= right < 37
    for tokens_at_once in (1, 200, 10**6):
        found = exact_match(model, tokenizer, asked, tokens_at_once=tokens_at_once, device=CPU)
        assert found == {"eval_exact_match": pytest.approx(right / 37)}


@pytest.mark.parametrize(
    ("generated", "is_right"),
    [(" alpha beta <end>", True), ("alpha beta<end>gamma<end>", True), ("alpha  beta<end>", False),
     ("alpha beta", False), ("alpha beta gamma<end>", False), ("Alpha beta<end>", False)],
)  # fmt: skip
def test_blanks_around_an_answer_do_not_matter_and_everything_else_does(generated, is_right, words, monkeypatch):
    job, model = made(words, "data.eval=0.2")
    text, *more = (job.tokenizer.encode(part, add_bos=False, add_eos=False) for part in generated.split("<end>"))
    ids = [id for part in (text, *more) for id in ([2] if part is not text else []) + part]
    asked = [Question(name="", ids=(5,), expected="alpha beta\n", tokens=3)]
    monkeypatch.setattr("tt_models.generate", lambda *_, **__: torch.tensor([[5, *ids]]))
    found = exact_match(model, job.tokenizer, asked, tokens_at_once=99, device=CPU)
    assert found == {"eval_exact_match": float(is_right)}


@pytest.mark.parametrize("ranks", [1, 3])
def test_no_batch_is_longer_than_the_model_reads_or_larger_than_asked_for(ranks):
    torch.manual_seed(0)
    shapes = [(int(a), int(b)) for a, b in torch.randint(1, 64, (200, 2))]
    asked = [Question(name="", ids=(1,) * prompt, expected="", tokens=answer) for prompt, answer in shapes]
    found = list(_batches(asked, ranks=ranks, tokens_at_once=1000, longest=128))
    assert sorted(map(id, (one for batch in found for one in batch))) == sorted(map(id, asked))
    assert len(found) < 80 / ranks
    for batch in found:
        prompt, answer = max(len(one.ids) for one in batch), max(one.tokens for one in batch)
        assert prompt + answer - 1 <= 128
        assert -(-len(batch) // ranks) * (prompt + answer) <= 1000


def test_packed_rows_are_asked_one_by_one(words, rows_file):
    more = [f"data.eval={rows_file}", "data.max_seq_len=64"]
    plain, packed = (assemble(compose("sft", overrides=[*words, *more, f"data.packing={on}"])) for on in (False, True))
    assert len(packed.held_out) < 37
    one, other = (
        {question.ids for question in questions(job.held_out, job.tokenizer, num=99)} for job in (plain, packed)
    )
    assert one == other
    assert len(one) > 30


def test_rows_without_a_whole_answer_are_not_asked_and_that_is_said(words, rows_file, tmp_path):
    asking = [*words, f"data.eval={rows_file}", "samples.exact_match=37"]
    assert not any("exact_match" in note for note in assemble(compose("sft", overrides=asking)).notes)
    job = assemble(compose("sft", overrides=[*asking, "data.max_seq_len=24"]))
    (note,) = [note for note in job.notes if "exact_match" in note]
    assert "37 asked for, data.eval has" in note
    asked = questions(job.held_out, job.tokenizer, num=37)
    assert 0 < len(asked) < 37
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"alpha {n}"}) + "\n" for n in range(5)))
    with pytest.raises(ConfigError, match=r"samples\.exact_match: no row of data\.eval can be asked"):
        assemble(
            compose("sft", overrides=[*words, f"data.train={texts}", f"data.eval={texts}", "samples.exact_match=2"])
        )


def test_exact_match_without_rows_or_with_trained_prompts_is_an_error(words):
    with pytest.raises(ConfigError, match=r"samples\.exact_match: set, but there is nothing to evaluate on"):
        assemble(compose("sft", overrides=[*words, "samples.exact_match=2"]))
    with pytest.raises(ConfigError, match=r"samples\.exact_match: data\.train_on=all trains prompts too"):
        compose("sft", overrides=[*words, "data.eval=0.2", "samples.exact_match=2", "data.train_on=all"])


# ---- with other features ----


def test_a_run_that_was_begun_without_exact_match_resumes_with_it(words, tmp_path):
    more = [*words, "data.eval=0.2", "eval_every=2", f"output_dir={tmp_path / 'run'}"]
    with pytest.raises(Interrupted):
        sft.main(compose("sft", overrides=more), console=StopsAt(2))
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert "exact_match: 0" in text
    (tmp_path / "run" / "config.yaml").write_text(text.replace("  exact_match: 0\n", ""))  # of an older version
    path = sft.main(compose("sft", overrides=[*more, "samples.exact_match=3"]), console=Quiet(), resume="auto")
    found = {row["step"]: "eval_exact_match" in row for row in read_rows(path / "metrics.jsonl") if "eval_loss" in row}
    assert found == {0: False, 2: False, 4: True, 6: True}


def test_dpo_has_figures_of_each_named_set_and_asks_for_the_chosen_answer(words, tmp_path):
    for name in ("train", "news", "code"):
        pairs = [{"prompt": f"say {name} {n}", "chosen": "alpha", "rejected": f"beta {n}"} for n in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    more = [f"data.train={tmp_path / 'train.jsonl'}", "adapter.rank=2", "max_steps=2", "batch_size=4", "samples.num=1",
            named({name: tmp_path / f"{name}.jsonl" for name in ("news", "code")}), "samples.exact_match=4",
            f"loss.reference_cache={tmp_path / 'cache'}", f"output_dir={tmp_path / 'run'}"]  # fmt: skip
    path = dpo.main(compose("dpo", overrides=[*words, *more]), console=Quiet())
    first, last = (row for row in read_rows(path / "metrics.jsonl") if "eval_loss" in row)
    assert first["eval_loss"] == pytest.approx(math.log(2)) == first["eval_loss_news"] == first["eval_loss_code"]
    for key in ("eval_rewards_margin", "eval_rewards_accuracy", "eval_loss"):
        assert last[key] == pytest.approx((last[f"{key}_news"] + last[f"{key}_code"]) / 2, rel=1e-5, abs=1e-6)
    assert 0 <= last["eval_exact_match_code"] <= 1
    assert "eval_perplexity" not in last


def evaluate_on_rank(words, folder):
    job, model = made(words)
    asked = questions(job.held_out, job.tokenizer, num=7)
    found = figures_of(job, model, size=2)
    found |= exact_match(model, job.tokenizer, asked, tokens_at_once=100, device=CPU)
    (folder / f"{tt_train.devices.distributed.world().rank}.json").write_text(json.dumps(found))


@pytest.mark.parametrize("how", [[], ["parallel.replicate=2"]], ids=["sharded", "replicated"])
def test_two_ranks_evaluate_no_row_twice_and_drop_none(how, learnt, words, files, ranks, tmp_path):
    """Answers of different lengths end at different tokens on each rank; sharded ranks wait for each other."""
    given = [*words, f"model.path={learnt[0]}", named(files), *how]
    evaluate_on_rank(given, tmp_path)
    expected = json.loads((tmp_path / "0.json").read_text())
    assert 0 < expected["eval_exact_match_news"] <= 1
    assert expected["eval_exact_match_code"] < 1
    ranks(2, evaluate_on_rank, given, tmp_path)
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == pytest.approx(expected, rel=1e-5)
