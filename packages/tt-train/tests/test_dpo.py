"""The recipe dpo from rows to a result."""

import json
import math
import os
import re
import shutil
import signal
from functools import partial

import pytest
import torch

import tt_data
import tt_peft
from tt_train import ConfigError, Interrupted, TrainingError, compose, load, train_step
from tt_train.build import build_optimizer, build_reference, load_model
from tt_train.evaluate import answer
from tt_train.job import assemble
from tt_train.losses.answers import answers_of
from tt_train.recipes import dpo, sft
from tt_train.records.run_files import read_rows
from tt_train.references.reference import prepared
from tt_train.report import write_report
from tt_train.run.console import Console
from tt_train.settings.recipe_file import recipe_of
from tt_train.settings.registry import recipe_path

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau".split()


def prompt(index):
    return "say " + " ".join(WORDS[(index * step + step) % len(WORDS)] for step in range(1, 3 + index % 3))


def pair(index):
    """The chosen answer says good, the rejected one bad, with two words of the question."""
    words = prompt(index).split()[1:3]
    return {"prompt": prompt(index), "chosen": f"alpha {words[0]}", "rejected": f"beta {words[1]} {words[0]}"}


def judged(index):
    good = index % 2 == 0
    return {"prompt": prompt(index), "completion": pair(index)["chosen" if good else "rejected"], "label": good}


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair(index)) + "\n" for index in range(24)))
    return file


@pytest.fixture(scope="session")
def judged_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("judged") / "judged.jsonl"
    file.write_text("".join(json.dumps(judged(index)) + "\n" for index in range(24)))
    return file


@pytest.fixture
def run(words, pairs_file, judged_file, tmp_path, monkeypatch):
    """``run("loss.name=hinge", ...)``: the rows of metrics.jsonl of a run on pairs, or judged rows for kto."""
    monkeypatch.setattr("tt_train.run.finish.write_report", lambda runs, **more: ("", ""))

    def made(*more, name="run", resume=None, console=None):
        rows = judged_file if "loss.name=kto" in more else pairs_file
        overrides = [*words, f"data.train={rows}", "samples.num=0", f"output_dir={tmp_path / name}", *more]
        made.path = dpo.main(compose("dpo", overrides=overrides), resume=resume, console=console or Heard())
        return list(read_rows(made.path / "metrics.jsonl"))

    return made


class Heard(Console):
    """Says nothing; sends itself SIGTERM after step ``stop_at``."""

    def __init__(self, stop_at=None):
        self.stop_at, self.said = stop_at, []

    def note(self, text):
        self.said.append(text)

    def step(self, row):
        if row["step"] == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)


LN_2 = math.log(2)
LORA = ("adapter.rank=4",)
FIGURES = ("loss", "grad_norm", "rewards_chosen", "rewards_margin", "log_probs_rejected", "logits_chosen")


def curve(rows, names=FIGURES):
    return [[math.nan if row[name] is None else row[name] for name in names] for row in rows if row["step"]]


def assert_same_curve(one, other, tolerance=1e-5):
    assert len(one) == len(other) > 0
    assert torch.allclose(
        torch.tensor(curve(one)), torch.tensor(curve(other)), rtol=tolerance, atol=tolerance, equal_nan=True
    )


@pytest.mark.parametrize("method", [
    (), LORA, (*LORA, "adapter.use_dora=true"), (*LORA, "adapter.quantize_base=true"), ("data.packing=true",),
    (*LORA, "adapter.dropout=0.5"), ("model.dtype=bf16",), (*LORA, "model.dtype=bf16"),
    ("activation_checkpointing=true",), (*LORA, "adapter.target_modules=all-linear", "model.dtype=bf16"),
    (*LORA, "adapter.modules_to_save=[embed_tokens,lm_head,norm]"), (*LORA, "adapter.target_modules=[q_proj,lm_head]"),
    (*LORA, "adapter.init=loftq", "adapter.quantize_base=true"),
])  # fmt: skip
def test_the_first_loss_is_ln_2_with_rewards_of_exactly_0_and_the_last_one_is_lower(run, method):
    """Traps 7 and 43."""
    rows = run(*method)
    assert rows[0]["loss"] == pytest.approx(LN_2, rel=1e-6)  # a sum of pairs in fp32
    assert rows[0]["rewards_chosen"] == rows[0]["rewards_rejected"] == rows[0]["rewards_margin"] == 0.0
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["rewards_margin"] > 0


# ---- one trajectory, however rows are put together -------------------------------------------------------------------


@pytest.mark.parametrize("more", [(), LORA, ("loss.name=kto_pair",), ("loss.name=orpo", "loss.sft_weight=0.7"),
                                  ("loss.name=kto", "loss.sft_weight=0.5")])  # fmt: skip
def test_the_curve_does_not_depend_on_the_micro_batch(run, more):
    """Trap 8, and the figures of a whole step: divergences and the token mean of the SFT term."""
    curves = [run(*more, f"micro_batch_size={size}", name=f"of-{size}") for size in (1, 2, 8)]
    assert_same_curve(curves[0], curves[1])
    assert_same_curve(curves[0], curves[2])


def test_activation_checkpointing_keeps_the_curve(run):
    assert_same_curve(run(*LORA), run(*LORA, "activation_checkpointing=true", name="checkpointed"))


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "kto"])
def test_packed_rows_have_the_loss_and_the_gradients_of_rows_apart(words, pairs_file, judged_file, loss):
    """Trap 7: each pair counts the same wherever it is in a pack."""
    found = []
    for packing in ("false", "true"):
        rows = judged_file if loss == "kto" else pairs_file
        overrides = [*words, f"data.train={rows}", f"loss.name={loss}", f"data.packing={packing}"]
        job = assemble(compose("dpo", overrides=overrides))
        model = load_model(job)
        reference = build_reference(job, model, print)
        with torch.no_grad():  # a policy that has learnt something
            generator = torch.Generator().manual_seed(1)
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        batches = [tt_data.collate([job.train[i]], pad_id=0) for i in range(len(job.train))]
        batches = prepared(batches, model=model, loss=job.config.loss, reference=reference)
        parts = [dpo.make_objective(job.config.loss)(model, batch) for batch in batches]
        total = sum(part.loss for part in parts)
        total.backward()
        gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        found.append((len(batches), sum(part.count for part in parts), total.detach(), gradients))
    (rows, count, loss, gradients), (packs, packed_count, packed_loss, packed_gradients) = found
    assert (count, packed_count) == (rows, rows)
    assert packs < rows / 2
    torch.testing.assert_close(packed_loss, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(packed_gradients, gradients, rtol=0, atol=1e-5 * gradients.abs().max().item())


# ---- what a step is made of ------------------------------------------------------------------------------------------


@pytest.fixture
def at_work(words, pairs_file, judged_file):
    """``at_work(...)``: job, model, batch and reference of the recipe, with a trained adapter."""

    def made(*more, rows=slice(0, 5)):
        source = judged_file if "loss.name=kto" in more else pairs_file
        job = assemble(compose("dpo", overrides=[*words, f"data.train={source}", *more]))
        model = load_model(job)
        optimizer = build_optimizer(job, model)
        reference = build_reference(job, model, print)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(1)
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        picked = range(*rows.indices(len(job.train)))
        return job, model, tt_data.collate([job.train[i] for i in picked], pad_id=0), reference

    return made


def whole_string(model, batch, side=""):
    """The log-probability of each answer from all logits of each row, without a mask of ours."""
    found = []
    logits = model(batch[f"{side}input_ids"]).double().log_softmax(-1)
    for row, ids, labels in zip(logits, batch[f"{side}input_ids"], batch[f"{side}labels"], strict=True):
        places = [t for t in range(1, len(ids)) if labels[t] != -100]
        found.append(sum(row[t - 1, ids[t]] for t in places))
    return torch.stack(found)


def test_log_probabilities_are_those_of_the_whole_string(at_work):
    """Trap 11: tokens that both answers begin with count, and none is lost between prompt and answer."""
    _, model, batch, _ = at_work()
    answers = answers_of(model, batch)
    torch.testing.assert_close(answers.log_probs.double(), whole_string(model, batch), rtol=1e-5, atol=1e-5)
    assert answers.tokens.tolist() == (batch["labels"] != -100).sum(1).tolist()


def test_the_reference_has_no_dropout_and_is_the_plain_base(at_work, words, pairs_file, model_dir, tmp_path):
    """Trap 9: of a base that has dropout, since that of an adapter is off with it."""
    noisy = shutil.copytree(model_dir, tmp_path / "noisy")
    config = json.loads((noisy / "config.json").read_text()) | {"attention_dropout": 0.5}
    (noisy / "config.json").write_text(json.dumps(config))
    _, model, batch, reference = at_work(*LORA, "adapter.dropout=0.5", f"model.path={noisy}")
    first, second = reference(batch), reference(batch)
    assert torch.equal(first, second)
    assert model.training
    plain = load_model(assemble(compose("dpo", overrides=[*words, f"data.train={pairs_file}"])))
    assert torch.equal(first, answers_of(plain, batch).log_probs)
    assert not torch.equal(first, answers_of(model, batch).log_probs)
    assert not torch.equal(answers_of(model, batch).log_probs, answers_of(model, batch).log_probs)


@pytest.mark.parametrize("more", [
    (*LORA, "adapter.modules_to_save=[embed_tokens,norm,lm_head]"), (*LORA, "adapter.use_dora=true"), (),
    (*LORA, "adapter.quantize_base=true"), ("model.dtype=bf16",), (*LORA, "adapter.init=loftq",
    "adapter.quantize_base=true"),
])  # fmt: skip
def test_the_reference_stays_where_training_started_whatever_trains(words, pairs_file, more):
    """Trap 10."""
    job = assemble(compose("dpo", overrides=[*words, f"data.train={pairs_file}", *more]))
    model = load_model(job)
    optimizer = build_optimizer(job, model)
    reference = build_reference(job, model, print)
    batch = tt_data.collate([job.train[i] for i in range(4)], pad_id=0)
    start = answers_of(model, batch).log_probs.detach()
    assert torch.equal(reference(batch), start)
    prepare = partial(prepared, model=model, loss=job.config.loss, reference=reference)
    for _ in range(3):
        train_step(model, prepare([batch]), dpo.make_objective(job.config.loss), optimizer)
    assert torch.equal(reference(batch), start)
    assert not torch.equal(answers_of(model, batch).log_probs, start)


def test_an_adapter_is_no_reference_if_other_weights_train(at_work):
    """Trap 10: a copied recipe that trains the norms beside the adapter."""
    _, model, batch, reference = at_work(*LORA)
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(TrainingError, match="other weights than the adapter's train"):
        reference(batch)


def test_an_adapter_that_was_trained_before_is_its_own_reference(run, at_work):
    run(*LORA, "optimizer.lr=5e-2", name="first")
    path = f"adapter.path={run.path / 'adapter'}"
    rows = run(*LORA, path, name="second")
    assert rows[0]["loss"] == pytest.approx(LN_2, rel=1e-6)
    assert rows[0]["rewards_margin"] == 0.0
    _, model, batch, reference = at_work(*LORA, path)
    with tt_peft.disable_adapter(model):
        base = answers_of(model, batch).log_probs
    assert (reference(batch) - base).abs().max() > 1e-3
    saved = json.loads((run.path / "adapter" / "adapter_config.json").read_text())
    assert saved["r"] == 4
    assert sorted(file.name for file in (run.path / "adapter").iterdir() if file.is_dir()) == []


def test_a_pair_without_a_trained_token_counts_for_nothing(at_work):
    """Trap 14: an answer that was cut off, and a micro-batch of nothing else."""
    job, model, batch, reference = at_work()
    objective = dpo.make_objective(job.config.loss)
    (whole,) = prepared([batch], model=model, loss=job.config.loss, reference=reference)
    batch["labels"] = batch["labels"].masked_fill(
        batch["answer_ids"] == 3, -100
    )  # the rejected answer of the second pair
    (cut,) = prepared([batch], model=model, loss=job.config.loss, reference=reference)
    full, part = objective(model, whole), objective(model, cut)
    assert (full.count, part.count) == (5, 4)
    assert part.loss < full.loss
    batch["labels"] = torch.full_like(batch["labels"], -100)
    (nothing,) = prepared([batch], model=model, loss=job.config.loss, reference=reference)
    none = objective(model, nothing)
    assert (none.count, none.tokens, float(none.loss)) == (0, 0, 0.0)
    assert all(float(value) == 0 for value in none.metrics.values())


def test_the_sft_term_is_a_token_mean_over_the_whole_step(at_work):
    job, model, batch, reference = at_work("loss.sft_weight=2")
    parts = [tt_data.collate([job.train[i]], pad_id=0) for i in range(5)]
    made = prepared(parts, model=model, loss=job.config.loss, reference=reference)
    found = [dpo.make_objective(job.config.loss)(model, part) for part in made]
    chosen = {k: v[0::2] for k, v in batch.items() if v.dim() == 2}
    nll = -whole_string(model, chosen).sum() / (chosen["labels"] != -100).sum()
    assert float(sum(part.metrics["sft_loss"] for part in found).detach()) / 5 == pytest.approx(float(nll), rel=1e-5)
    plain = dpo.make_objective(compose("dpo", complete=False).loss)
    without = sum(plain(model, part).loss for part in made)
    assert float((sum(part.loss for part in found) - without).detach()) / 5 == pytest.approx(2 * float(nll), rel=1e-5)


@pytest.mark.parametrize("rows", [slice(0, 5), slice(0, 1)])
def test_ktos_divergence_is_over_the_mismatched_answers_of_all_micro_batches(at_work, rows):
    """Trap 15: an odd number of rows, and a single one."""
    job, model, batch, reference = at_work("loss.name=kto", *LORA, rows=rows)
    number = len(batch["desirable"])
    own, other = (
        [tuple(ids[labels != -100].tolist()) for ids, labels in zip(batch[f"{side}input_ids"], batch[f"{side}labels"],
                                                                   strict=True)] for side in ("", "kl_")
    )  # fmt: skip
    assert all(a != b for a, b in zip(own, other, strict=True))
    with tt_peft.disable_adapter(model):
        base = whole_string(model, batch, "kl_")
    by_hand = (whole_string(model, batch, "kl_") - base).mean().clamp(min=0)
    for size in (1, 2, number):
        parts = [tt_data.collate([job.train[i] for i in range(start, min(start + size, number))], pad_id=0)
                 for start in range(0, number, size)]  # fmt: skip
        made = prepared(parts, model=model, loss=job.config.loss, reference=reference)
        for part in made:
            assert float(part["kl"]) == pytest.approx(float(by_hand), rel=1e-4, abs=1e-6)
        assert float(made[0]["desirable_share"]) == pytest.approx(float(batch["desirable"].float().mean()))


def test_means_of_judged_answers_are_over_their_own_kind(at_work):
    job, model, batch, reference = at_work("loss.name=kto", *LORA, rows=slice(0, 7))
    (made,) = prepared([batch], model=model, loss=job.config.loss, reference=reference)
    part = dpo.make_objective(job.config.loss)(model, made)
    reward = 0.1 * (answers_of(model, batch).log_probs - reference(batch)).detach()
    good = batch["desirable"]
    assert float(part.metrics["rewards_chosen"]) / 7 == pytest.approx(float(reward[good].mean()), rel=1e-4)
    assert float(part.metrics["rewards_rejected"]) / 7 == pytest.approx(float(reward[~good].mean()), rel=1e-4)
    assert float(part.metrics["kl"]) / 7 == pytest.approx(float(made["kl"]), rel=1e-5)


# ---- a run as a whole ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [(), LORA, ("loss.name=kto", *LORA), ("data.packing=true", *LORA, "batch_size=1",
                                  "micro_batch_size=1"), ("model.dtype=bf16",), ("loss.name=simpo", "loss.beta=2"),
                                  (*LORA, "adapter.dropout=0.3")])  # fmt: skip
def test_a_stopped_run_continues_to_the_same_bits(run, more):
    whole = run(*more, name="whole")
    result = {file.name: file.read_bytes() for file in run.path.glob("*/*.safetensors")}
    with pytest.raises(Interrupted):
        run(*more, name="cut", console=Heard(stop_at=3))
    again = run(*more, name="cut", resume="auto")
    assert json.dumps(curve(again)) == json.dumps(curve(whole))
    assert {file.name: file.read_bytes() for file in run.path.glob("*/*.safetensors")} == result


def test_a_run_with_an_adapter_as_its_start_continues_with_the_same_reference(run):
    run(*LORA, "optimizer.lr=5e-2", name="first")
    path = f"adapter.path={run.path / 'adapter'}"
    whole = run(*LORA, path, name="whole")
    with pytest.raises(Interrupted):
        run(*LORA, path, name="cut", console=Heard(stop_at=2))
    assert curve(run(*LORA, path, name="cut", resume="auto")) == curve(whole)


@pytest.mark.parametrize("more", [(), LORA, ("loss.name=kto", *LORA), ("data.packing=true",)])
def test_cached_log_probabilities_give_the_same_curve_without_a_reference(run, tmp_path, more, monkeypatch):
    """Trap 12: and a folder that was made from something else is refused."""
    plain = run(*more, "data.eval=0.2")
    cache = f"loss.reference_cache={tmp_path / 'cache'}"
    assert_same_curve(run(*more, "data.eval=0.2", cache, name="making"), plain)
    monkeypatch.setattr("tt_train.build._frozen_copy", lambda *_: pytest.fail("a second model"))
    monkeypatch.setattr("tt_train.references.reference.log_probs_of", lambda *_: pytest.fail("a pass of the reference"))
    again = run(*more, "data.eval=0.2", cache, name="using")
    assert_same_curve(again, plain)
    assert again[0]["eval_loss"] == pytest.approx(plain[0]["eval_loss"], rel=1e-5)
    with pytest.raises(ConfigError, match=r"loss\.reference_cache: .* was made for something else"):
        run(*more, "data.eval=0.2", cache, "data.max_seq_len=16", name="other")


@pytest.mark.parametrize("more", [(), ("loss.name=kto",)])
def test_held_out_rows_have_the_same_figures_whatever_the_micro_batch(run, more):
    found = [run(*more, "data.eval=0.3", "eval_every=3", f"micro_batch_size={size}", name=f"of-{size}")
             for size in (1, 4)]  # fmt: skip
    for one, other in zip(*found, strict=True):
        names = [name for name in one if name.startswith("eval_")]
        assert len(names) > 8 or "eval_loss" not in one
        for name in names:
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5)
    first = found[0][0]
    assert (first["step"], first["eval_loss"]) == (0, pytest.approx(0.5 if more else LN_2, rel=1e-6))
    assert found[0][-1]["eval_rewards_margin"] > 0


def test_a_run_stops_early_and_keeps_its_best_step(run):
    rows = run("data.eval=0.3", "eval_every=1", "early_stop_after=2", "optimizer.lr=1e-9", "max_steps=9")
    assert rows[-1]["step"] < 9


def test_samples_are_answers_to_prompts_of_pairs(run):
    run("samples.num=2", "data.eval=0.3")
    samples = [row for row in read_rows(run.path / "samples.jsonl") if row["step"] == 6]
    assert len(samples) == 2
    assert all(row["prompt"].startswith("say ") and row["expected"].startswith("alpha") for row in samples)


def test_the_report_has_titles_for_rewards_and_draws_held_out_ones_beside_them(run):
    run("data.eval=0.3", "eval_every=3")
    page = write_report([run.path])[0].read_text(encoding="utf-8")
    for words in ("Rewards", "beta times the log-ratio to the reference", "Reward accuracy", "held-out margin"):
        assert words in page
    assert "metric eval_rewards" not in re.findall(r"<h3>(.*?)<", page)


# ---- what it is for --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def undecided(model_dir, tmp_path_factory):
    """A model that was taught to answer each question with alpha or with beta, at random."""
    folder = tmp_path_factory.mktemp("undecided")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": prompt(i), "completion": ("alpha", "beta")[i * 7 % 3 % 2]}) + "\n"
                            for i in range(60)))  # fmt: skip
    overrides = [f"model.path={model_dir}", f"data.train={rows}", "model.dtype=fp32", "batch_size=20", "epochs=6",
                 "micro_batch_size=20", "device=cpu", "optimizer.lr=1e-2", "samples.num=0",
                 "data.drop_duplicates=false", f"output_dir={folder / 'run'}"]  # fmt: skip
    return sft.main(compose("sft", overrides=overrides), console=Heard()) / "model"


LOSSES = {
    "sigmoid": (), "sigmoid_norm": ("loss.beta=0.5",), "robust": ("loss.label_smoothing=0.1",), "hinge": (), "ipo": (),
    "kto_pair": (), "apo_zero": (), "sppo_hard": (), "simpo": ("loss.beta=2", "loss.margin=0.5"),
    "orpo": ("loss.sft_weight=1",), "kto": (),
}  # fmt: skip


METHODS = {"lora": LORA, "dora": (*LORA, "adapter.use_dora=true"), "qlora": (*LORA, "adapter.quantize_base=true")}


@pytest.mark.parametrize(
    ("loss", "method"), [*((loss, ()) for loss in LOSSES), *((loss, method) for loss in ("sigmoid", "kto")
                                                             for method in METHODS.values())]
)  # fmt: skip
def test_each_loss_teaches_which_answer_is_wanted(run, undecided, tmp_path, loss, method):
    """Greedy answers to prompts that were not trained on, before and after."""
    rows = [{"prompt": prompt(i), "chosen": "alpha", "rejected": "beta"} for i in range(32)]
    if loss == "kto":
        rows = [{"prompt": row["prompt"], "completion": row[kind], "label": kind == "chosen"} for row in rows
                for kind in ("chosen", "rejected")]  # fmt: skip
    file = tmp_path / "wanted.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lr = {"kto": "5e-3"}.get(loss, "2e-3") if method else "1e-3"
    run(f"loss.name={loss}", *LOSSES[loss], *method, f"model.path={undecided}", f"data.train={file}", "batch_size=16",
        "micro_batch_size=16", "max_steps=16", f"optimizer.lr={lr}", "schedule.warmup_steps=0")  # fmt: skip

    def answers(path):
        model, tokenizer = load(path, device="cpu")
        asked = [{"ids": tokenizer.encode(prompt(i), add_bos=False, add_eos=False)} for i in range(100, 110)]
        return [
            row["generation"] for row in answer(model, tokenizer, asked, max_new_tokens=4, device=torch.device("cpu"))
        ]

    before = answers(undecided)
    assert set(before) <= {"alpha", "beta"}
    assert answers(run.path) == ["alpha"] * 10


# ---- a copy, and several processes -----------------------------------------------------------------------------------


def test_a_copied_recipe_with_another_loss_needs_no_other_file(run, tmp_path, words, pairs_file):
    text = recipe_path("dpo").read_text()
    changed = text.replace("loss=preference_loss(loss)", "loss=lambda pairs: 3 * (pairs.rejected - pairs.chosen)")
    assert changed != text
    file = tmp_path / "my_dpo.py"
    file.write_text(changed)
    config = compose(
        file, overrides=[*words, f"data.train={pairs_file}", "samples.num=0", f"output_dir={tmp_path / 'o'}"]
    )
    path = recipe_of(config).main(config, console=Heard())
    first, *_, last = read_rows(path / "metrics.jsonl")
    assert first["loss"] == pytest.approx(3 * (first["log_probs_rejected"] - first["log_probs_chosen"]), rel=1e-5)
    assert last["loss"] < first["loss"]
    assert (path / "my_dpo.py").read_text() == changed


def train_on_a_rank(overrides):
    dpo.main(compose("dpo", overrides=overrides), console=Heard())


@pytest.mark.parametrize("more", [
    ("batch_size=6",), ("parallel.shard=1",), (*LORA, "batch_size=6"), (*LORA, "parallel.shard=2"),
    ("loss.name=kto", *LORA), ("loss.name=kto_pair", "loss.sft_weight=0.5"),
])  # fmt: skip
def test_two_ranks_have_the_curve_of_one(run, ranks, words, pairs_file, judged_file, tmp_path, more):
    rows = judged_file if "loss.name=kto" in more else pairs_file
    alone = run(*more, "micro_batch_size=2", "data.eval=0.2", name="alone")
    overrides = [*words, f"data.train={rows}", "samples.num=0", "data.eval=0.2", *more, "micro_batch_size=1",
                 f"output_dir={tmp_path / 'two'}"]  # fmt: skip
    ranks(2, train_on_a_rank, overrides)
    both = list(read_rows(tmp_path / "two" / "metrics.jsonl"))
    assert_same_curve(both, alone, tolerance=1e-4)
    assert both[-1]["eval_loss"] == pytest.approx(alone[-1]["eval_loss"], rel=1e-4)
