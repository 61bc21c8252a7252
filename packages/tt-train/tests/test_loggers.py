"""Where the figures of a run go besides the console: loggers and their options, log_every, profiles, utilization."""

import gzip
import json
import os
import pathlib
import sys
import types

import pytest
import torch

import tt_models
import tt_peft
from tt_train import ConfigError, TrainingError, compose
from tt_train.config import AdapterSection, ProfileSection, SFTConfig
from tt_train.inputs.components import logger_mistakes
from tt_train.inputs.model import lora_config
from tt_train.recipes import sft
from tt_train.records.run_files import read_json, read_rows
from tt_train.run import mfu
from tt_train.run.console import Console
from tt_train.run.profile import Profile


class Heard(Console):
    def __init__(self):
        self.said = []

    def note(self, text):
        self.said.append(text)

    warn = note


@pytest.fixture
def train(words, monkeypatch):
    monkeypatch.setattr("tt_train.run.finish.write_report", lambda runs, **more: ("", ""))

    def run(path, *more, console=None, allow_import=(), **kwargs):
        small = ["samples.num=0", "adapter.rank=2", "schedule.name=constant"]
        config = compose("sft", overrides=[*words, *small, *more, f"output_dir={path}"], allow_import=allow_import)
        return sft.main(config, console=console or Heard(), **kwargs)

    return run


@pytest.fixture(autouse=True)
def _installed(monkeypatch):
    monkeypatch.setattr("tt_train.inputs.components.logger_mistakes", lambda *args: [])


def logged(path):
    return [row["step"] for row in read_rows(path / "metrics.jsonl")]


# ---- Weights & Biases ------------------------------------------------------------------------------------------------


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the client, which records what it is told."""
    calls = []

    class Run:
        def log(self, row, step):
            calls.append(("log", step, row["loss"]))

        def save(self, path, base_path, policy):
            calls.append(("save", path, pathlib.Path(path).read_text()))

        def finish(self, exit_code):
            calls.append(("finish", exit_code))

    client = types.ModuleType("wandb")
    client.setup = lambda: calls.append(("setup", os.getcwd()))
    client.Settings = dict
    client.init = lambda **options: calls.append(("init", options)) or Run()
    monkeypatch.setitem(sys.modules, "wandb", client)
    return calls


def test_weights_and_biases_continues_the_same_run_and_is_finished_also_by_a_failure(
    train, tmp_path, wandb, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr("tt_train.run.finish.write_result", raise_planted)
        with pytest.raises(OSError, match="planted"):
            train(tmp_path / "r", "loggers=[wandb]", "max_steps=2")
    assert wandb[-1] == ("finish", 1)
    train(tmp_path / "r", "loggers=[wandb]", "max_steps=2", resume="auto")
    assert wandb[-1] == ("finish", 0)
    first, second = (options for kind, options in (call for call in wandb if call[0] == "init"))
    assert first["id"] == second["id"] == read_json(tmp_path / "r" / "manifest.json")["wandb_id"]
    assert first["resume"] == "allow"
    assert sorted(call[1] for call in wandb if call[0] == "log") == [1, 2]


def raise_planted(*args, **kwargs):
    raise OSError("planted")


def test_weights_and_biases_reads_no_settings_of_the_working_folder_and_starts_no_git(
    train, tmp_path, wandb, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    train("r", "loggers=[wandb]", "max_steps=1")
    assert [call[1] for call in wandb if call[0] == "setup"] not in ([], [str(tmp_path)])
    (options,) = [call[1] for call in wandb if call[0] == "init"]
    assert options["dir"] == str(tmp_path / "r")  # its service, started elsewhere, takes no relative path
    assert options["settings"] == {"disable_git": True, "save_code": False}


def test_the_options_of_a_logger_reach_its_client_and_the_config_is_uploaded(train, tmp_path, wandb):
    train(
        tmp_path / "r", "loggers={wandb: {project: p, group: g, tags: [a, b]}}", "loggers.wandb.name=n", "max_steps=1"
    )
    (options,) = [call[1] for call in wandb if call[0] == "init"]
    assert [options[key] for key in ("project", "group", "tags", "name")] == ["p", "g", ["a", "b"], "n"]
    (saved,) = [call for call in wandb if call[0] == "save"]
    assert saved[1] == str(tmp_path / "r" / "config.yaml")
    assert "group: g" in saved[2]
    again = compose(tmp_path / "r" / "config.yaml")
    assert again.loggers == {"wandb": {"project": "p", "group": "g", "tags": ["a", "b"], "name": "n"}}


def test_loggers_get_no_secret(train, tmp_path, wandb, monkeypatch, rows_file):
    data = tmp_path / "canary-in-a-name.jsonl"
    data.write_bytes(rows_file.read_bytes())
    monkeypatch.setenv("MY_TOKEN", "canary-in-a-name")
    train(tmp_path / "r", "loggers=[wandb]", "max_steps=1", f"data.train={data}")
    (options,) = (options for kind, options in (call for call in wandb if call[0] == "init"))
    assert options["config"]["data"]["train"].endswith("[redacted].jsonl")
    assert "canary" not in json.dumps(wandb, default=str)


# ---- the others ------------------------------------------------------------------------------------------------------


def test_tensorboard_is_cut_back_to_the_step_that_is_resumed(train, tmp_path, monkeypatch):
    opened, texts = [], []

    class SummaryWriter:
        def __init__(self, folder, purge_step=None):
            assert pathlib.Path(folder).is_absolute()  # its thread may write while a logger is in another folder
            opened.append([purge_step, False])
            pathlib.Path(folder).mkdir(exist_ok=True)

        def add_text(self, name, text):
            texts.append(text)

        def add_scalar(self, key, value, step):
            assert step > 0

        def flush(self):
            pass

        def close(self):
            opened[-1][1] = True

    module = types.ModuleType("torch.utils.tensorboard.writer")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.ModuleType("torch.utils.tensorboard"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", module)
    monkeypatch.chdir(tmp_path)
    train("r", "loggers=[tensorboard]", "max_steps=2")
    train("r", "loggers=[tensorboard]", "max_steps=4", resume="auto")
    assert opened == [[None, True], [3, True]]
    assert "    recipe: sft\n" in texts[0]


@pytest.fixture
def clients(monkeypatch):
    """Stand-ins for trackio, mlflow and comet_ml, which record what they are told."""
    calls = []

    def tell(name):
        return lambda *words, **options: calls.append((name, words, options))

    trackio = types.ModuleType("trackio")
    run = types.SimpleNamespace(log=tell("log"))
    trackio.init = lambda **options: print("Created") or calls.append(("init", (), options)) or run
    trackio.finish = lambda: print("Finished") or calls.append(("finish", (), {}))
    mlflow, entities = types.ModuleType("mlflow"), types.ModuleType("mlflow.entities")
    entities.Metric = lambda key, value, time, step: (key, value, step)
    mlflow.MlflowClient = lambda uri: types.SimpleNamespace(
        get_experiment_by_name=lambda name: None,
        create_experiment=lambda name: calls.append(("experiment", (name, uri), {})) or "7",
        create_run=lambda number, run_name: types.SimpleNamespace(info=types.SimpleNamespace(run_id="run-1")),
        update_run=tell("update_run"), log_text=tell("log_text"), log_batch=tell("log"), set_terminated=tell("finish"),
    )  # fmt: skip
    comet = types.ModuleType("comet_ml")
    names = ("log_parameters", "log_asset", "log_metrics", "add_tag", "end")
    comet.ExperimentConfig = lambda **options: options
    comet.start = lambda **options: (
        calls.append(("init", (), options))
        or types.SimpleNamespace(
            **{name: tell({"log_metrics": "log", "end": "finish"}.get(name, name)) for name in names}
        )
    )
    for module in (trackio, mlflow, entities, comet):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def test_trackio_gets_the_figures_of_every_step_and_is_finished(train, tmp_path, clients, capsys):
    train(tmp_path / "r", "loggers={trackio: {project: p, group: g}}", "max_steps=2")
    assert [name for name, *_ in clients] == ["init", "log", "log", "finish"]
    opened = clients[0][2]
    assert [opened[key] for key in ("project", "group", "name", "resume")] == ["p", "g", "r", "allow"]
    assert clients[1][2] == {"step": 1}
    said = capsys.readouterr()
    assert (said.out, said.err.split()) == ("", ["Created", "Finished"])  # stdout ends with the run directory
    assert "loss" in clients[1][1][0]
    assert "step" not in clients[1][1][0]


def test_mlflow_continues_its_run_and_says_how_it_ended(train, tmp_path, clients, monkeypatch):
    more = ["loggers={mlflow: {experiment: e, tracking_uri: 'sqlite:///my.db'}}", "max_steps=2"]
    with monkeypatch.context() as patch:
        patch.setattr("tt_train.run.finish.write_result", raise_planted)
        with pytest.raises(OSError, match="planted"):
            train(tmp_path / "r", *more)
    assert clients[0][1] == ("e", "sqlite:///my.db")
    assert clients[-1] == ("finish", ("run-1",), {"status": "FAILED"})
    clients.clear()
    train(tmp_path / "r", *more, resume="auto")
    assert [name for name, *_ in clients] == ["experiment", "update_run", "log_text", "log", "finish"]
    assert clients[-1][2] == {"status": "FINISHED"}


def test_comet_uploads_nothing_but_figures_and_the_config(train, tmp_path, clients, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train("r", "loggers={comet: {project: p, mode: offline}}", "max_steps=1")
    assert read_json(tmp_path / "r" / "manifest.json")["comet_id"] == clients[0][2]["experiment_key"]
    assert [name for name, *_ in clients] == ["init", "log_parameters", "log_asset", "log", "finish"]
    opened = clients[0][2]
    assert (opened["project_name"], opened["online"], len(opened["experiment_key"])) == ("p", False, 32)
    settings = opened["experiment_config"]
    assert not any(settings[key] for key in settings if key.startswith(("log_", "auto_", "parse_")))


def test_a_logger_of_ones_own_gets_its_options(train, tmp_path, monkeypatch):
    module = types.ModuleType("my_loggers")
    got = []
    module.Mine = lambda run, config, step, *, volume: got.append(volume) or got.append
    monkeypatch.setitem(sys.modules, "my_loggers", module)
    train(tmp_path / "r", "loggers={my_loggers.Mine: {volume: 11}}", "max_steps=1", allow_import=["my_loggers"])
    assert got[0] == 11
    assert got[1]["step"] == 1


def test_a_logger_that_does_not_start_is_named(train, tmp_path, monkeypatch):
    module = types.ModuleType("my_loggers")
    module.Mine = lambda run, config, step: {}["no key"]
    monkeypatch.setitem(sys.modules, "my_loggers", module)
    with pytest.raises(TrainingError, match="loggers: my_loggers.Mine does not start: KeyError: 'no key'; correct it"):
        train(tmp_path / "r", "loggers=[my_loggers.Mine]", allow_import=["my_loggers"])


def test_options_that_a_logger_of_ones_own_does_not_take_are_found_before_weights_load(words, monkeypatch):
    monkeypatch.undo()  # the checks of loggers
    module = types.ModuleType("my_loggers")
    module.Mine = lambda run, config, step, *, volume=1: print
    monkeypatch.setitem(sys.modules, "my_loggers", module)
    for options, found in (("{volum: 2}", 1), ("{volume: 2}", 0), ("{step: 2}", 1)):
        config = compose("sft", overrides=[*words, f"loggers={{my_loggers.Mine: {options}}}"],
                         allow_import=["my_loggers"])  # fmt: skip
        lines = logger_mistakes(config)
        assert len(lines) == found
        assert all(line.startswith("loggers.my_loggers.Mine: cannot be called with") for line in lines)


def test_a_logger_that_fails_at_its_first_row_ends_the_run_and_later_only_warns(train, tmp_path, monkeypatch):
    module, rows = types.ModuleType("my_loggers"), []

    class Mine:
        def __init__(self, run, config, step, *, works):
            self.works = works

        def __call__(self, row):
            rows.append(row["step"])
            if len(rows) > self.works:
                raise OSError("no network")

        def close(self):
            raise OSError("no network at all")

    module.Mine = Mine
    monkeypatch.setitem(sys.modules, "my_loggers", module)
    options = {"allow_import": ["my_loggers"]}
    with pytest.raises(TrainingError, match="my_loggers.Mine takes no figures: OSError: no network; correct it"):
        train(tmp_path / "first", "loggers={my_loggers.Mine: {works: 0}}", **options)
    rows.clear()
    console = Heard()
    train(tmp_path / "later", "loggers={my_loggers.Mine: {works: 2}}", console=console, **options)
    assert rows == [1, 2, 3]
    assert logged(tmp_path / "later") == [1, 2, 3, 4, 5, 6]
    warned = [line for line in console.said if line.startswith("loggers: ")]
    assert warned == [
        "loggers: my_loggers.Mine gets no figures from step 3 on: OSError: no network; metrics.jsonl has all figures",
        "loggers: my_loggers.Mine could not be closed: OSError: no network at all; metrics.jsonl has all figures",
    ]


# ---- what is wrong with loggers is found before weights load -------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (
            "loggers={wandb: {projct: p}}",
            "loggers.wandb.projct: unknown option; did you mean 'project'?",
        ),
        ("loggers={wandb: {project: 7}}", "loggers.wandb.project: expected text; put a number in quotes"),
        ("loggers={wandb: {tags: a}}", "loggers.wandb.tags: expected a list of text"),
        (
            "loggers={wandb: {mode: onlin}}",
            "loggers.wandb.mode: expected one of online, offline, disabled",
        ),
        ("loggers={comet: {api_key: 12ab}}", "loggers.comet.api_key: a key is never in a config"),
        ("loggers={tensorboard: {log_dir: x}}", "loggers.tensorboard.log_dir: unknown option; it has none"),
        ("loggers=[mlfow]", "loggers: unknown name 'mlfow'; did you mean 'mlflow'?"),
        ("loggers={wandb: p}", "loggers: expected a list such as [a, b], or names with options"),
    ],
)
def test_an_option_that_a_logger_does_not_have_is_named(words, word, said):
    with pytest.raises(ConfigError) as refused:
        compose("sft", overrides=[*words, word])
    assert any(said in problem for problem in refused.value.problems)
    assert "12ab" not in str(refused.value)


@pytest.mark.parametrize(("url", "refused"), [("http://wandb.example", True), ("http://127.0.0.2:1", True),
                                              ("nonsense", True), ("https://wandb.example", False)])  # fmt: skip
def test_the_key_of_a_logger_goes_over_no_plain_http(monkeypatch, url, refused):
    monkeypatch.setenv("WANDB_BASE_URL", url)
    monkeypatch.setenv("COMET_URL_OVERRIDE", url)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "secret")
    for loggers, key in (
        (["wandb"], "WANDB_BASE_URL: "), (["comet"], "COMET_URL_OVERRIDE: "),
        ({"mlflow": {"tracking_uri": url}}, "MLFLOW_TRACKING_URI: "),
    ):  # fmt: skip
        found = logger_mistakes(SFTConfig(loggers=loggers))
        assert any(line.startswith(key) for line in found) == refused


# ---- log_every -------------------------------------------------------------------------------------------------------


def test_log_every_writes_every_nth_step_each_evaluation_and_the_last_step(train, tmp_path, wandb):
    console = Heard()
    more = ["log_every=4", "max_steps=10", "data.eval=0.2", "eval_every=3", "loggers=[wandb]"]
    train(tmp_path / "r", *more, console=console)
    assert logged(tmp_path / "r") == [0, 3, 4, 6, 8, 9, 10]
    assert [call[1] for call in wandb if call[0] == "log"][1:] == [3, 4, 6, 8, 9, 10]
    assert [line.split()[1] for line in console.said if line.startswith("step ")] == ["3", "4", "6", "8", "9", "10"]


def test_the_rows_that_log_every_writes_are_those_of_a_run_that_writes_all(train, tmp_path):
    train(tmp_path / "all", "max_steps=6")
    train(tmp_path / "some", "max_steps=6", "log_every=3")
    exact = ("step", "loss", "grad_norm", "lr", "tokens")
    all_rows, some = (
        [{key: row[key] for key in exact} for row in read_rows(tmp_path / name / "metrics.jsonl")]
        for name in ("all", "some")
    )
    assert some == [all_rows[2], all_rows[5]]


def test_a_resumed_run_writes_the_steps_that_log_every_asks_for(train, tmp_path):
    more = ["log_every=4", "save_every=3"]
    train(tmp_path / "r", *more, "max_steps=6")
    train(tmp_path / "r", *more, "max_steps=9", resume="auto")
    assert logged(tmp_path / "r") == [4, 6, 8, 9]


# ---- profiles --------------------------------------------------------------------------------------------------------


def traced(path):
    with gzip.open(path, "rt") as file:
        return json.load(file)["traceEvents"]


def steps_in(events):
    return sorted({event["name"] for event in events if event["name"].startswith("ProfilerStep#")})


def test_a_profile_is_a_chrome_trace_of_the_chosen_steps(train, tmp_path):
    console = Heard()
    train(tmp_path / "r", "profile.first_step=3", console=console)
    (trace,) = (tmp_path / "r" / "profile").iterdir()
    assert trace.name == "steps-000003-000004.json.gz"
    events = traced(trace)
    assert steps_in(events) == ["ProfilerStep#1", "ProfilerStep#2"]  # 0 is the step that warms up
    assert any(event["name"] == "aten::mm" for event in events)
    assert any("profile: 2 steps in" in line for line in console.said)
    assert logged(tmp_path / "r") == [1, 2, 3, 4, 5, 6]


def test_a_profile_may_begin_at_the_first_step_and_changes_no_figure(train, tmp_path):
    train(tmp_path / "with", "profile={first_step: 1, num_steps: 1, with_stack: true}", "max_steps=2")
    train(tmp_path / "without", "max_steps=2")
    assert steps_in(traced(tmp_path / "with" / "profile" / "steps-000001-000001.json.gz")) == ["ProfilerStep#0"]
    losses = [[row["loss"] for row in read_rows(tmp_path / name / "metrics.jsonl")] for name in ("with", "without")]
    assert losses[0] == losses[1]


def test_steps_that_a_continuation_does_not_make_are_not_traced_and_that_is_said(train, tmp_path):
    train(tmp_path / "r", "max_steps=3")
    console = Heard()
    train(tmp_path / "r", "max_steps=5", "profile.first_step=2", resume="auto", console=console)
    assert not (tmp_path / "r" / "profile").exists()
    assert any("profile: step 2 was made before this continuation" in line for line in console.said)


def test_a_profile_of_steps_that_the_run_does_not_make_is_refused(words):
    from tt_train.job import assemble

    with pytest.raises(ConfigError, match=r"profile\.first_step: step 6 to 7 are traced, the run has 6 steps"):
        assemble(compose("sft", overrides=[*words, "profile.first_step=6"]))


def test_a_trace_that_is_too_large_is_not_kept(train, tmp_path, monkeypatch):
    monkeypatch.setattr("tt_train.run.profile.MOST_BYTES", 1000)
    console = Heard()
    train(tmp_path / "r", "profile.first_step=2", console=console)
    assert not list((tmp_path / "r" / "profile").iterdir())
    assert any("was not kept; lower profile.num_steps" in line for line in console.said)


def test_on_cuda_a_memory_snapshot_is_written_and_recording_ends(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda enabled="all", **_: calls.append(enabled))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: calls.append(pathlib.Path(path).name))
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    said = []
    section = ProfileSection(first_step=2, num_steps=1)
    profile = Profile(section, tmp_path, torch.device("cuda"), after=0, say=said.append)
    for step in (1, 2, 3):
        profile.begin(step)
        torch.ones(2) + 1
        profile.end(step)
    assert calls == ["all", "steps-000002-000002-memory.pickle", None]
    assert "steps-000002-000002-memory.pickle" in said[0]


def test_the_profiler_is_stopped_by_a_failure_within_its_steps(train, tmp_path, monkeypatch):
    from tt_train.run import profile

    made = []
    begin = profile.Profile.begin
    monkeypatch.setattr(profile.Profile, "begin", lambda self, step: made.append(self) or begin(self, step))
    monkeypatch.setattr(sft, "train_step", raise_planted)
    with pytest.raises(OSError, match="planted"):
        train(tmp_path / "r", "profile.first_step=1")
    assert made[0].profiler is None
    assert not torch.autograd._profiler_enabled()


# ---- tokens and utilization ------------------------------------------------------------------------------------------


def test_padding_is_in_no_count_of_tokens_and_prompts_are():
    pad, loss = 0, -100
    batch = {
        "input_ids": torch.tensor([[5, 0, 6, 7, 0, 0], [5, 6, 7, 0, 0, 0]]),
        "labels": torch.tensor([[loss, loss, 6, 7, loss, loss], [loss, loss, 7, 0, loss, loss]]),
    }
    assert mfu.count_tokens(batch, pad_id=pad) == 4 + 4  # a pad token that trains is a token of its row


def test_all_tokens_per_second_counts_prompts_too(train, tmp_path):
    train(tmp_path / "r")
    for row in read_rows(tmp_path / "r" / "metrics.jsonl"):
        assert row["all_tokens_per_s"] > row["tokens_per_s"] > 0
        assert "mfu" not in row  # nobody knows the peak of this CPU


def test_a_row_has_every_peak_that_the_allocator_of_the_device_knows(train, tmp_path, monkeypatch):
    known = {"active": 2.0, "allocated": 1.5, "reserved": 3.0}
    monkeypatch.setattr("tt_train.run.loop.memory_gib", lambda device: known)
    train(tmp_path / "r", "max_steps=1")
    (row,) = read_rows(tmp_path / "r" / "metrics.jsonl")
    assert [row[f"memory_{kind}gib"] for kind in ("active_", "", "reserved_")] == [2.0, 1.5, 3.0]


def test_a_full_fine_tune_costs_6n_per_token_and_an_adapter_4n():
    config = tt_models.get_config("llama2_7b")
    model = tt_models.build(config, device="meta")
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2) - model.model.embed_tokens.weight.numel()
    assert mfu.flops_per_token(model) == 6 * matrices
    tt_peft.apply_lora_(model, lora_config(AdapterSection(rank=8)))
    adapter = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert mfu.flops_per_token(model) == 4 * matrices + 6 * adapter


def test_a_tied_embedding_counts_once_since_the_output_uses_it():
    model = tt_models.build("qwen2_5_0_5b", device="meta")
    assert mfu.flops_per_token(model) == 6 * sum(p.numel() for p in model.parameters() if p.dim() == 2)


def test_a_mixture_of_experts_has_no_utilization():
    assert mfu.flops_per_token(tt_models.build("mixtral_8x7b", device="meta")) is None


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989), ("NVIDIA H20", 148), ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250), ("NVIDIA L40S", 362), ("NVIDIA L40", 181), ("NVIDIA A10", 125), ("NVIDIA A10G", None),
        ("AMD Instinct MI300X", 1307), ("NVIDIA GeForce RTX 4090", None), ("Tesla T4", None),
    ],
)  # fmt: skip
def test_the_peak_of_a_device_comes_from_the_table_or_is_unknown(monkeypatch, name, tera):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = mfu.peak_flops(torch.device("cuda:0"), torch.bfloat16)
    assert peak == (tera and tera * 1e12)
    assert mfu.peak_flops(torch.device("cuda:0"), torch.float32) is None
    assert mfu.peak_flops(torch.device("cpu"), torch.bfloat16) is None


def test_utilization_is_the_cost_of_all_tokens_over_the_peak(train, tmp_path, monkeypatch):
    monkeypatch.setattr("tt_train.run.loop.peak_flops", lambda device, dtype: 1e9)
    monkeypatch.setattr("tt_train.run.loop.flops_per_token", lambda model: 1000.0)
    train(tmp_path / "r", "max_steps=2")
    for row in read_rows(tmp_path / "r" / "metrics.jsonl"):
        assert row["mfu"] == pytest.approx(row["all_tokens_per_s"] * 1000 / 1e9, abs=1e-4)
