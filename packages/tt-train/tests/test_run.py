"""The sft recipe from end to end on a tiny model: what it leaves behind, and what it promises."""

import errno
import json
import math
import os
import re
import signal
from importlib.util import find_spec

import pytest
import torch

import tt_ckpt
import tt_data
import tt_models
from tt_train import ConfigError, Interrupted, TrainingError, compose, load, merge_run
from tt_train.job import assemble
from tt_train.losses.cross_entropy import Summed, cross_entropy
from tt_train.recipes import sft
from tt_train.records.run_files import read_json
from tt_train.run.console import Console
from tt_train.run.dir import find_run
from tt_train.run.listing import list_runs


class Silent(Console):
    """Keeps what it is told."""

    def __init__(self):
        self.notes, self.rows = [], []

    def note(self, text):
        self.notes.append(text)

    warn = note

    def step(self, row):
        self.rows.append(row)


def run(path, words, *more, **kwargs):
    return sft.main(compose("sft", overrides=[*words, f"output_dir={path}", *more]), console=Silent(), **kwargs)


def metrics(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def losses(path):
    return [row["loss"] for row in metrics(path) if row["step"] > 0]


def weights(path):
    model, _ = load(path, device="cpu")
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory, model_dir, rows_file):
    words = [
        f"model.path={model_dir}",
        f"data.train={rows_file}",
        "model.dtype=fp32",
        "batch_size=8",
        "micro_batch_size=4",
        "device=cpu",
        "optimizer.lr=2e-2",
        "schedule.warmup_steps=2",
    ]
    return run(
        tmp_path_factory.mktemp("runs") / "lora",
        words,
        "adapter.rank=8",
        "max_steps=20",
        "data.eval=0.1",
        "adapter.target_modules=all-linear",
        "eval_every=10",
        "samples.max_new_tokens=4",
    )


@pytest.fixture(scope="module")
def curves():
    return {}


@pytest.fixture
def plain_curve(curves, tmp_path, words, monkeypatch):
    """The losses of the small run, made once for each set of words, without the report (most of the time)."""
    monkeypatch.setattr("tt_train.run.finish.write_report", lambda runs, **more: ("", ""))

    def curve(*more):
        if more not in curves:
            curves[more] = losses(run(tmp_path / "plain", words, *more))
        return curves[more]

    return curve


def test_a_run_explains_itself(lora_run):
    names = {entry.name for entry in lora_run.iterdir()}
    assert {
        "config.yaml",
        "manifest.json",
        "metrics.jsonl",
        "samples.jsonl",
        "train.log",
        "report.html",
        "README.md",
        "adapter",
    } <= names
    assert ("report.png" in names) == (find_spec("matplotlib") is not None)
    before, *rows = metrics(lora_run)
    assert (before["step"], before["loss"]) == (0, None)
    assert before["eval_loss"] > rows[-1]["eval_loss"]
    assert [row["step"] for row in rows] == list(range(1, 21))
    keys = {"step", "epoch", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "memory_gib", "elapsed_s", "eta_s"}
    assert all(keys <= row.keys() for row in rows)
    assert rows[-1]["loss"] < 0.95 * rows[0]["loss"]
    assert [row["step"] for row in rows if "eval_loss" in row] == [10, 20]
    manifest = read_json(lora_run / "manifest.json")
    assert manifest["state"] == "finished"
    assert manifest["summary"]["steps"] == 20
    assert manifest["parameters"] > 20_000 > manifest["trainable"] > 1_000
    samples = [json.loads(line) for line in (lora_run / "samples.jsonl").read_text().splitlines()]
    assert {sample["step"] for sample in samples} == {0, 10, 20}


def test_the_merged_model_is_the_adapted_one(lora_run, tmp_path):
    heard = []
    merged = merge_run(lora_run, tmp_path / "merged", tell=heard.append)
    assert heard[0].startswith("merged 14 weights")
    adapted, tokenizer = load(lora_run, device="cpu")
    plain, again = load(merged, device="cpu")
    ids = torch.tensor([tokenizer.encode("say beta gamma", add_bos=False, add_eos=False)])
    assert again.encode("say", add_bos=False, add_eos=False) == tokenizer.encode("say", add_bos=False, add_eos=False)
    with torch.no_grad():
        torch.testing.assert_close(plain(ids), adapted(ids), rtol=1e-5, atol=1e-5)
        base, _ = load(lora_run, device="cpu", adapter=False)
        assert not torch.allclose(base(ids), adapted(ids), atol=1e-3)
    with pytest.raises(ConfigError, match="not empty"):
        merge_run(lora_run, merged)


def test_peft_and_transformers_read_the_results(lora_run, tmp_path):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    adapted, tokenizer = load(lora_run, device="cpu")
    ids = torch.tensor([tokenizer.encode("say beta gamma", add_bos=False, add_eos=False)])
    base = transformers.AutoModelForCausalLM.from_pretrained(read_json(lora_run / "manifest.json")["base_model"])
    theirs = peft.PeftModel.from_pretrained(base, lora_run / "adapter").eval()
    merged = transformers.AutoModelForCausalLM.from_pretrained(merge_run(lora_run, tmp_path / "m"))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, adapted(ids), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(merged(ids).logits, adapted(ids), rtol=1e-5, atol=1e-5)


def test_a_config_of_a_run_repeats_it(lora_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    again = sft.main(compose(lora_run / "config.yaml", overrides=["max_steps=3"]), console=Silent())
    assert again.parent.name == "runs"
    first = losses(lora_run)
    assert losses(again)[0] == first[0]
    assert find_run().resolve() == again.resolve()
    assert list_runs()[0]["state"] == "finished"


@pytest.mark.parametrize("adapter", [["adapter.rank=4", "adapter.dropout=0.2"], []])
def test_killed_and_resumed_ends_in_the_same_bits(tmp_path, words, adapter):
    whole = run(tmp_path / "whole", words, *adapter, "max_steps=20", "save_every=5")

    child = os.fork()
    if child == 0:
        signal.alarm(60)

        class Deadly(Silent):
            def step(self, row):
                if row["step"] == 13:
                    os.kill(os.getpid(), signal.SIGKILL)

        sft.main(
            compose(
                "sft", overrides=[*words, *adapter, "max_steps=20", "save_every=5", f"output_dir={tmp_path / 'cut'}"]
            ),
            console=Deadly(),
        )
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    cut = run(tmp_path / "cut", words, *adapter, "max_steps=20", "save_every=5", resume="auto")
    assert same(weights(whole), weights(cut))
    assert losses(whole) == losses(cut)


def test_a_signal_saves_and_the_run_goes_on(tmp_path, words):
    class Stopped(Silent):
        def step(self, row):
            if row["step"] == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    config = compose("sft", overrides=[*words, f"output_dir={tmp_path / 'r'}"])
    with pytest.raises(Interrupted) as stopped:
        sft.main(config, console=Stopped())
    assert stopped.value.exit_code == 143
    assert read_json(tmp_path / "r" / "manifest.json")["state"] == "stopped"
    half = weights(tmp_path / "r")  # loaded from the checkpoint
    sft.main(config, console=Silent(), resume="auto")
    assert not same(half, weights(tmp_path / "r"))
    assert same(weights(tmp_path / "r"), weights(run(tmp_path / "whole", words)))


def test_micro_batches_do_not_change_the_curve(tmp_path, words):
    curves = [losses(run(tmp_path / f"m{size}", words, f"micro_batch_size={size}")) for size in (1, 2, 8)]
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-5)


@pytest.mark.parametrize("switch", ["activation_checkpointing=true", "data.packing=true"])
def test_switches_that_must_not_change_the_mathematics(tmp_path, words, switch):
    if switch.startswith("data.packing"):
        plain = losses(run(tmp_path / "a", words, "batch_size=37", "micro_batch_size=1", "max_steps=3"))
        rows = run(tmp_path / "b", words, switch, "batch_size=37", "micro_batch_size=1", "max_steps=3")
        assert losses(rows) == pytest.approx(plain, rel=1e-4)  # one step is the whole data set either way
    else:
        plain = losses(run(tmp_path / "a", words, "adapter.rank=4", "adapter.dropout=0.3"))
        assert losses(run(tmp_path / "b", words, "adapter.rank=4", "adapter.dropout=0.3", switch)) == plain


@pytest.mark.parametrize("packing", ["false", "true"])
def test_a_stream_trains_and_resumes_exactly(tmp_path, words, packing):
    more = ["data.streaming=true", f"data.packing={packing}", "data.max_seq_len=64", "save_every=2"]
    whole = run(tmp_path / "whole", words, *more)

    class Stopped(Silent):
        def step(self, row):
            if row["step"] == 4:
                os.kill(os.getpid(), signal.SIGINT)

    config = compose("sft", overrides=[*words, *more, f"output_dir={tmp_path / 'r'}"])
    with pytest.raises(Interrupted):
        sft.main(config, console=Stopped())
    sft.main(config, console=Silent(), resume="auto")
    assert losses(tmp_path / "r") == losses(whole)
    assert same(weights(tmp_path / "r"), weights(whole))


def test_what_is_held_out_of_a_mix_is_never_trained(model_dir, rows_file, tmp_path):
    from tt_train.job import assemble

    other = tmp_path / "other.jsonl"
    other.write_text(rows_file.read_text().replace("say ", "speak "))
    config = compose(
        "sft", overrides=[f"model.path={model_dir}", f"data.train={{{rows_file}: 0.3, {other}: 0.7}}", "data.eval=0.2"]
    )
    job = assemble(config)
    held = {tuple(job.held_out[index]["input_ids"]) for index in range(len(job.held_out))}
    steps = tt_data.batches(job.train, batch_size=1, seed=0)
    seen = [next(steps)["input_ids"][0].tolist() for _ in range(3 * len(job.train))]
    assert held
    assert not held & {tuple(ids) for ids in seen}
    assert "jsonl" in job.train.where(0)


def test_worker_processes_change_nothing(tmp_path, words):
    assert losses(run(tmp_path / "a", words, "data.num_workers=2")) == losses(run(tmp_path / "b", words))


def test_the_curve_is_that_of_a_loop_in_plain_torch(tmp_path, words, model_dir, rows_file):
    """transformers, AdamW and cross entropy, written out, on the same rows in the same order."""
    transformers = pytest.importorskip("transformers")
    ours = losses(run(tmp_path / "r", words, "max_steps=20", "optimizer.lr=1e-3"))
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    tokenizer = tt_data.load_tokenizer(model_dir)
    data = tt_data.load_dataset(str(rows_file), tokenizer, max_seq_len=128)
    for step, expected in enumerate(ours):
        chosen = [data[index] for index in tt_data.rows_at(step, num_rows=len(data), batch_size=8, seed=0)]
        batch = tt_data.collate(chosen, pad_id=tokenizer.pad_id)
        logits = model(batch["input_ids"]).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rising, falling = (step + 1) / 3, 0.5 * (1 + math.cos(math.pi * (step - 2) / 18))  # two steps of warm-up
        optimizer.param_groups[0]["lr"] = 1e-3 * (rising if step < 2 else falling)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    "word",
    [
        "seed=1",
        "optimizer.weight_decay=0.9",
        "optimizer.betas=[0.5, 0.6]",
        "optimizer.eps=0.1",
        "optimizer.name=adam",
        "max_grad_norm=0.01",
        "loss.label_smoothing=0.2",
        "schedule.name=constant",
        "schedule.warmup_steps=5",
        "schedule.min_lr_ratio=0.5",
        "batch_size=4",
        "data.train_on=all",
        "data.shuffle=false",
        "data.max_seq_len=20",
        "model.dtype=bf16",
        "optimizer.lr=1e-3",
        "adapter.rank=4",
        "data.template=llama2",
    ],
)
def test_every_key_has_an_effect(tmp_path, words, word, plain_curve):
    assert losses(run(tmp_path / "b", words, word)) != plain_curve()


def test_token_rows_are_made_once_where_a_cache_is_named(tmp_path, words, plain_curve, monkeypatch):
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    assert losses(run(tmp_path / "a", words, cache, "data.num_workers=2")) == plain_curve()
    assert any((tmp_path / "cache").iterdir())
    monkeypatch.setattr("tt_data.loading.load.build", lambda *_, **__: pytest.fail("encoded once more"))
    assert losses(run(tmp_path / "b", words, cache)) == plain_curve()


@pytest.mark.parametrize(
    "word",
    [
        "adapter.alpha=64",
        "adapter.dtype=bf16",
        "adapter.dropout=0.5",
        "adapter.target_modules=[k_proj]",
        "adapter.use_rslora=true",
        "adapter.use_dora=true",
        "adapter.init=pissa",
        "adapter.quantize_base=true",
        "adapter.lora_plus_ratio=16",
        "adapter.rank_pattern={q_proj: 2}",
        "adapter.alpha_pattern={q_proj: 1}",
        "adapter.exclude_modules=[layers.0.self_attn.q_proj]",
        "adapter.modules_to_save=[lm_head]",
    ],
)
def test_every_key_of_the_adapter_has_an_effect(tmp_path, words, word, plain_curve):
    assert losses(run(tmp_path / "b", words, "adapter.rank=4", word)) != plain_curve("adapter.rank=4")


def test_a_loss_that_is_not_finite_stops_the_run_or_is_skipped(tmp_path, words, monkeypatch):
    monkeypatch.setattr(
        sft, "make_objective", lambda config: lambda model, _: Summed(model.output_weight.sum() / 0, 4, 4)
    )
    with pytest.raises(TrainingError, match="step 1: loss (inf|-inf|nan)") as stopped:
        run(tmp_path / "a", words)
    assert re.search(r"Look at \S*rows\.jsonl:\d+, ", str(stopped.value))
    assert "TrainingError" in (tmp_path / "a" / "train.log").read_text()
    assert read_json(tmp_path / "a" / "manifest.json")["state"] == "failed"
    kept = weights(run(tmp_path / "b", words, "on_nonfinite=skip"))
    base, _ = load(words[0].removeprefix("model.path="), device="cpu", dtype=torch.float32)
    assert same(kept, dict(base.named_parameters()))


def test_a_streamed_step_of_bad_rows_alone_is_empty_and_the_run_continues(tmp_path, words, rows_file):
    rows = rows_file.read_text().splitlines(keepends=True)
    file = tmp_path / "some-bad.jsonl"
    file.write_text("".join([*rows[:8], *["{}\n"] * 8, *rows[8:24]]))
    stream = [f"data.train={file}", "data.streaming=true", "data.shuffle=false", "data.max_dropped_share=0.9"]
    config = compose("sft", overrides=[*words, *stream, "max_steps=4", "batch_size=8", f"output_dir={tmp_path / 'r'}"])
    console = Silent()
    path = sft.main(config, console=console)
    rows = metrics(path)
    assert [row["loss"] is None for row in rows] == [False, True, False, False]
    assert rows[0]["tokens"] == rows[1]["tokens"] < rows[2]["tokens"]
    assert [line for line in console.notes if "step 2: nothing to train on in the rows from 8 on" in line]
    assert read_json(path / "manifest.json")["state"] == "finished"
    assert (path / "report.html").is_file()


def test_metrics_that_an_objective_names_are_recorded_shown_and_reported(tmp_path, words, monkeypatch):
    def objective(model, batch):
        part = cross_entropy(model, batch)
        return part._replace(metrics={"twice_the_loss": 2 * part.loss})

    monkeypatch.setattr(sft, "make_objective", lambda config: objective)
    console, heard = Console(), []
    monkeypatch.setattr(console, "note", heard.append)
    path = tmp_path / "r"
    sft.main(compose("sft", overrides=[*words, f"output_dir={path}", "data.eval=0.2"]), console=console)
    rows = metrics(path)
    assert all(row["twice_the_loss"] == pytest.approx(2 * row["loss"]) for row in rows if row["step"])
    assert rows[-1]["eval_twice_the_loss"] == pytest.approx(2 * rows[-1]["eval_loss"])
    assert f"twice_the_loss {rows[-1]['twice_the_loss']:.4f}" in [line for line in heard if "loss" in line][-2]


def test_a_metric_with_the_name_of_a_figure_that_every_run_has_is_refused(tmp_path, words, monkeypatch):
    def objective(model, batch):
        part = cross_entropy(model, batch)
        return part._replace(metrics={"tokens": part.loss})

    monkeypatch.setattr(sft, "make_objective", lambda config: objective)
    with pytest.raises(TrainingError, match="loss: names the metric tokens, which every run has"):
        run(tmp_path / "r", words)


def test_the_rows_of_a_step_are_named_in_every_epoch_of_a_mix(tmp_path, words, rows_file):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(rows_file.read_text().splitlines(keepends=True)[:8]))
    mix = f"data.train={{{rows_file}: 1, {few}: 1}}"
    job = assemble(compose("sft", overrides=[*words, mix, "epochs=3", "max_steps=null", "data.shuffle=false"]))
    assert (job.num_rows, job.steps_per_epoch) == (16, 2)
    named = [job.rows_of(step) for step in (1, 3)]
    assert named[0] != named[1]  # the longer file goes on
    for step, text in zip((1, 3), named, strict=True):
        assert text == ", ".join(job.train.where(row, (step - 1) // 2) for row in range(8))


def test_an_adapter_goes_on_from_an_adapter(lora_run, tmp_path, words):
    more = ["adapter.rank=8", "adapter.target_modules=all-linear", f"adapter.path={lora_run / 'adapter'}"]
    assert losses(run(tmp_path / "a", words, *more))[0] < losses(lora_run)[0] * 0.95


def test_random_weights_by_name_need_only_a_tokenizer(tmp_path, tokenizer_dir, rows_file, monkeypatch):
    monkeypatch.setattr(
        tt_models,
        "get_config",
        lambda name: tt_models.config_from_hf(
            {
                "model_type": "llama",
                "vocab_size": 400,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "max_position_embeddings": 128,
                "rms_norm_eps": 1e-5,
                "rope_theta": 10000.0,
                "hidden_act": "silu",
                "tie_word_embeddings": True,
            }
        ),
    )
    words = [
        "model.name=llama2_7b",
        f"model.tokenizer={tokenizer_dir}",
        f"data.train={rows_file}",
        "max_steps=2",
        "model.dtype=fp32",
        f"output_dir={tmp_path / 'r'}",
    ]
    path = sft.main(compose("sft", overrides=words), console=Silent())
    assert tt_ckpt.read_config(path / "model")["vocab_size"] == 400
    load(path)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["model.path=nowhere/at-all/x"], "model.path: "),
        (["adapter.target_modules=[q_prj]"], "q_proj"),
        (["adapter.target_modules=[q_proj, zz_proj]"], "zz_proj"),
        (["data.train=missing.jsonl"], "missing.jsonl"),
        (["data.columns={messages: conversation}"], "conversation"),
        (["data.eval=1.5"], "between 0 and 1"),
        (["data.streaming=true", "max_steps=null"], "max_steps: missing"),
        (["data.streaming=true", "data.eval=0.1"], "cannot be held out"),
        (["eval_every=2"], "data.eval"),
        (["early_stop_after=2", "data.eval=0.2"], "set eval_every"),
        (["device=cuda:7"], "device"),
        (["device=tpu"], "device"),
    ],
)
def test_mistakes_are_found_before_weights_load(tmp_path, words, more, expected, monkeypatch):
    monkeypatch.setattr(tt_ckpt, "load_weights", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    with pytest.raises(ConfigError) as caught:
        run(tmp_path / "r", words, *more)
    assert expected in str(caught.value)
    assert not (tmp_path / "r").exists()


def test_a_full_folder_and_a_changed_config_are_refused(tmp_path, words):
    path = run(tmp_path / "r", words, "max_steps=2", "save_every=1")
    with pytest.raises(ConfigError, match="is not empty.*--resume auto"):
        run(path, words)
    with pytest.raises(ConfigError, match=r"seed: 0 -> 1"):
        run(path, words, "max_steps=2", "seed=1", resume="auto")
    with pytest.raises(ConfigError, match="is not a run"):
        run(tmp_path / "other", words, resume=tmp_path / "nothing")


def test_a_dry_run_leaves_nothing(tmp_path, words):
    run(tmp_path / "r", words, dry_run=True)
    assert not (tmp_path / "r").exists()


def test_secrets_reach_no_file(tmp_path, words, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_canarycanarycanarycanary")
    monkeypatch.setattr("sys.argv", ["tt", "run", "sft", "token=hf_canarycanarycanarycanary"])
    path = run(tmp_path / "r", words, "max_steps=1")
    assert all(b"canary" not in file.read_bytes() for file in path.rglob("*") if file.is_file())


@pytest.fixture
def full_disk(monkeypatch):
    """``full_disk(4, 6)``: the saves of these steps fail."""

    def fill(*steps):
        def write(folder, *rest):
            if any(f"step-{step:06d}" in str(folder) for step in steps):
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(folder, *rest)

        real = tt_ckpt.train.checkpoint.write_groups
        monkeypatch.setattr(tt_ckpt.train.checkpoint, "write_groups", write)

    return fill


@pytest.mark.parametrize("background", ["false", "true"])
def test_a_save_that_fails_is_told_and_training_goes_on(tmp_path, words, full_disk, background):
    full_disk(4)
    console = Silent()
    more = ["save_every=2", f"save_async={background}", f"output_dir={tmp_path / 'r'}"]
    path = sft.main(compose("sft", overrides=[*words, *more]), console=console)
    (note,) = [note for note in console.notes if "not saved" in note]
    assert "No space left" in note
    assert "training continues" in note
    assert sorted(folder.name for folder in (path / "checkpoints").iterdir()) == ["step-000002", "step-000006"]


@pytest.mark.parametrize("background", ["false", "true"])
@pytest.mark.parametrize("steps", [(2,), (4, 6)])
def test_a_save_that_fails_twice_or_without_an_older_one_ends_the_run(tmp_path, words, full_disk, background, steps):
    full_disk(*steps)
    with pytest.raises(tt_ckpt.CheckpointNotSaved, match="No space left"):
        run(tmp_path / "r", words, "max_steps=8", "save_every=2", f"save_async={background}")


def test_saves_in_the_background_hold_what_the_run_held_then(tmp_path, words):
    whole = run(tmp_path / "whole", words, "save_every=3", "keep_last=9")
    other = run(tmp_path / "other", words, "save_every=3", "keep_last=9", "save_async=true")
    for step in ("step-000003", "step-000006"):
        one, two = (tt_ckpt.TrainCheckpoint(path / "checkpoints").restore(path / "checkpoints" / step)
                    for path in (whole, other))  # fmt: skip
        assert same(dict(one.tensors["model"]), dict(two.tensors["model"]))
        assert same(dict(one.tensors["optimizer"]), dict(two.tensors["optimizer"]))
        assert one.state["step"] == two.state["step"]
