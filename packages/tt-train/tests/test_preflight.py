"""Devices, optimizers, losses and loggers: what cannot work is known before anything is loaded."""

import sys
import types

import pytest
import torch

import tt_models
from tt_train import ConfigError, compose
from tt_train.inputs import components, model
from tt_train.job import assemble
from tt_train.models.load import load


def problems(config):
    """A line for each mistake; [] if a run would start."""
    try:
        assemble(config)
    except ConfigError as error:
        return error.problems
    return []


@pytest.fixture
def found(words):
    return lambda *more, **kwargs: problems(compose("sft", overrides=[*words, *more], **kwargs))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gpu", "unknown device 'gpu'; did you mean 'cuda'?"),
        ("CPU", "unknown device 'CPU'; did you mean 'cpu'?"),
        ("cdua:0", "unknown device 'cdua:0'; did you mean 'cuda:0'?"),
        ("meta", "unknown device 'meta'"),
        ("cuda:-1", "unknown device 'cuda:-1'"),
        ("cuda:7", "device: cuda:7 asked for, 1 CUDA device visible"),
        ("mps", "device: mps is not available on this machine or in this torch"),
    ],
)
def test_a_missing_device_is_named_with_the_available_ones(found, monkeypatch, name, said):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    (problem,) = found(f"device={name}")
    assert said in problem


@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [
        ("cuda", ["data.packing=true"], "device: auto took cuda (A card)"),
        ("xpu", [], "device: auto took xpu (A card)"),
        (
            "xpu",
            ["data.packing=true"],
            "device: auto took xpu (A card); it has no flex_attention, so packed rows need memory quadratic",
        ),
        ("mps", ["data.packing=true"], "device: auto took mps (Apple GPU); it has no flex_attention, so packed rows"),
        (None, ["model.dtype=bf16"], "sees no accelerator; this CPU has no instructions for bf16 and emulates it"),
        (None, ["model.dtype=fp32"], "sees no accelerator"),
    ],
)
def test_auto_takes_what_torch_finds_and_says_what_that_cannot_do(monkeypatch, kind, more, said):
    module = types.SimpleNamespace(device_count=lambda: 1, get_device_name=lambda device: "A card")
    monkeypatch.setattr(torch, "get_device_module", lambda kind: module)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: kind and torch.device(kind))
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    device = components.pick_device("auto")
    assert device.type == (kind or "cpu")
    config = compose("sft", overrides=["model.path=m", "data.train=d", *more])
    (note,) = components.device_notes(config, device)
    assert said in note
    assert (";" in note) == (";" in said)
    config.device = str(device)  # which was asked for
    assert components.device_notes(config, device) == []


def test_a_device_without_nf4_is_refused_before_weights_load():
    if not torch.backends.mps.is_available():
        with pytest.raises(ConfigError, match="adapter.quantize_base: mps cannot do NF4: .*; use device=cpu, or"):
            model._try_nf4(torch.device("mps"))
    model._try_nf4(torch.device("cpu"))


def test_a_finished_model_is_loaded_to_what_torch_finds(monkeypatch, model_dir):
    def load_base(path, *, device, dtype):
        raise LookupError(str(device))

    monkeypatch.setattr("tt_train.models.load.load_base", load_base)
    for found, expected in ((torch.device("xpu"), "xpu"), (None, "cpu")):
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda found=found, **_: found)
        with pytest.raises(LookupError, match=expected):
            load(model_dir)


def test_bf16_is_refused_on_a_gpu_without_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.version, "hip", None)
    config = compose("sft", overrides=["model.path=m", "data.train=d", "adapter.dtype=bf16"])
    said = "Tesla T4 (compute capability 7.5) does not compute in bf16; use"
    found = components.mistakes(config, torch.device("cuda:0"))
    assert found == [f"model.dtype: {said} model.dtype=fp32", f"adapter.dtype: {said} adapter.dtype=fp32"]


def test_a_device_that_does_not_answer_is_named():
    config = compose("sft", overrides=["model.path=m", "data.train=d"])
    if not torch.backends.mps.is_available():
        (problem,) = components.mistakes(config, torch.device("mps"))
        assert problem.startswith("device: mps does not answer: ")
    assert components.mistakes(config, torch.device("cpu")) == []


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio", "mlflow", "comet"])
def test_a_logger_that_is_not_installed_is_found_before_the_run(found, monkeypatch, name):
    monkeypatch.setattr(components.importlib.util, "find_spec", lambda package: None)
    package = "comet-ml" if name == "comet" else name
    for loggers in (f"loggers=[{name}]", f"loggers={{{name}: {{}}}}"):
        assert f"loggers: {name} is not installed; pip install {package}, or leave it out" in found(loggers)


def test_the_folder_that_wandb_leaves_behind_is_not_the_package(tmp_path, monkeypatch):
    (tmp_path / "a_logger_of_nobody").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not components.is_installed("a_logger_of_nobody")
    assert components.is_installed("json")


def test_a_logger_named_twice_is_named(found):
    assert "loggers: wandb is named twice" in found("loggers=[wandb, wandb]")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["optimizer.momentum=0.9"], "optimizer.momentum: adamw has no momentum; leave it out"),
        (["optimizer.name=sgd", "optimizer.betas=[0.8, 0.9]"], "optimizer.betas: sgd has no betas; leave it out"),
        (["optimizer.name=collections.OrderedDict"], "optimizer"),
        (
            ["loss.label_smoothing=0.1", "loss.name=losses_without_smoothing.plain"],
            "loss.label_smoothing: losses_without",
        ),
    ],
)
def test_what_a_component_does_not_take_is_found_before_the_run(found, monkeypatch, more, said):
    module = types.ModuleType("losses_without_smoothing")
    module.plain = lambda model, batch: None
    monkeypatch.setitem(sys.modules, "losses_without_smoothing", module)
    (problem,) = found(*more, allow_import=["collections", "losses_without_smoothing"])
    assert problem.startswith(said)


def test_every_phase_is_checked_even_if_the_device_is_wrong(found):
    said = found("device=gpu", "data.train=nowhere.jsonl", "adapter.target_modules=[q_prj]", "loggers=[wandb, wandb]")
    assert {line.split(":")[0] for line in said} >= {"device", "data.train", "adapter", "loggers"}


def test_the_largest_seed_trains(words, tmp_path):
    from tt_train.recipes import sft

    more = [f"seed={2**64 - 1}", "max_steps=2", f"output_dir={tmp_path / 'r'}", "data.eval=0.1", "adapter.dropout=0.1"]
    assert sft.main(compose("sft", overrides=[*words, *more])).is_dir()


def test_a_schedule_beyond_the_end_of_the_run_is_in_the_notes_of_validate_and_run(words):
    job = assemble(compose("sft", overrides=[*words, "save_every=100"]))
    assert [note for note in job.notes if note.startswith("save_every: 100 is beyond the run's 6 steps")]
    with pytest.raises(ConfigError, match="eval_every: set, but there is nothing"):
        assemble(compose("sft", overrides=[*words, "eval_every=100"]))


def test_a_rank_above_the_size_of_a_layer_is_one_note_and_not_a_python_warning(words, tmp_path, recwarn):
    from tt_train.recipes import sft

    config = compose("sft", overrides=[*words, "adapter.rank=1000", "max_steps=1", f"output_dir={tmp_path / 'r'}"])
    (note,) = [note for note in assemble(config).notes if "rank 1000" in note]
    assert note.endswith("(and 3 more such modules)")
    sft.main(config)
    assert not [warning for warning in recwarn if "rank 1000" in str(warning.message)]


def test_a_file_in_place_of_the_cache_is_named_and_held_out_rows_have_no_split_of_the_training_rows(
    words, found, rows_file, tmp_path
):
    assert f"data.cache_dir: {rows_file} is a file; name a folder" in found(f"data.cache_dir={rows_file}")
    (tmp_path / "rows").mkdir()
    for name in ("train", "test"):
        (tmp_path / "rows" / f"{name}.jsonl").write_text(rows_file.read_text())
    more = [f"data.train={tmp_path / 'rows'}", "data.split=test", f"data.eval={rows_file}"]
    assert len(assemble(compose("sft", overrides=[*words, *more])).held_out) == 37


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], None),
        (["adapter.rank=4"], "adapter.rank: adapter.path has 2; write adapter.rank=2"),
        (["adapter.alpha=99"], "adapter.alpha: adapter.path has 16; write adapter.alpha=16"),
        (["adapter.target_modules=[q_proj]"], "write 'adapter.target_modules=[q_proj, v_proj]'"),
        (["adapter.target_modules=all-linear"], "write 'adapter.target_modules=[q_proj, v_proj]'"),
        (["adapter.target_modules=[v_proj, q_proj]"], None),
        (["adapter.target_modules=[model.layers.0.self_attn.q_proj]"], "adapter.target_modules: adapter.path has"),
        (["adapter.rank_pattern={q_proj: 3}"], "rank is 2 for "),
        (["adapter.use_dora=true"], "adapter.use_dora: adapter.path has false; write adapter.use_dora=false"),
        (["adapter.modules_to_save=[lm_head]"], "adapter.modules_to_save: adapter.path has null"),
    ],
)
def test_an_adapter_to_start_from_that_does_not_fit_is_found_before_weights_load(words, found, tmp_path, more, said):
    from tt_train.recipes import sft

    run = tmp_path / "r"
    sft.main(compose("sft", overrides=[*words, "adapter.rank=2", "max_steps=1", f"output_dir={run}"]))
    problems = found("adapter.rank=2", f"adapter.path={run}/adapter", *more)
    assert len(problems) == (said is not None)
    assert said is None or said in problems[0]
    assert f"did you mean {run}/adapter?" in found("adapter.rank=2", f"adapter.path={run}")[0]


def test_a_model_that_the_machine_cannot_hold_is_refused_before_the_run_and_state_that_does_not_fit_is_said(
    found, words, monkeypatch
):
    monkeypatch.setattr("tt_models.limits.total_memory", lambda device: 30 * 10**9)
    folder = next(word.removeprefix("model.path=") for word in words if word.startswith("model.path="))
    huge = ["model.path=null", "model.name=llama3_70b", f"model.tokenizer={folder}"]
    problem = next(one for one in found(*huge) if "weights" in one)
    start = "model: a model of 70,553,706,496 parameters (its weights alone) needs 282.2 GB, this machine has 30.0 GB; "
    assert problem == f"{start}train an adapter (adapter.rank=8) or take a smaller model"
    adapter = ["adapter.rank=2", "model.dtype=bf16"]
    problem = next(one for one in found(*huge, *adapter) if "weights" in one)
    assert "needs 141.1 GB" in problem
    assert problem.endswith("set adapter.quantize_base=true, lower adapter.rank or take a smaller model")
    problem = next(one for one in found(*huge, *adapter, "adapter.quantize_base=true") if "weights" in one)
    assert "needs 39.5 GB" in problem
    for module in ("tt_models.limits", "tt_train.inputs.model"):
        monkeypatch.setattr(f"{module}.total_memory", lambda device: 300_000)
    job = assemble(compose("sft", overrides=words))
    assert any("memory: weights, gradients and the optimizer's state take about 0.0 GB" in note for note in job.notes)


@pytest.fixture
def memory(monkeypatch):
    """Says how many bytes a GPU, and the machine, has in all."""

    def has(gpu, machine):
        for module in ("tt_models.limits", "tt_train.inputs.model"):
            monkeypatch.setattr(f"{module}.total_memory", lambda device: machine if device.type == "cpu" else gpu)

    return has


def fits(job, device, processes, *more, recipe="sft", words=()):
    """Whether the weights of a run with these words are not refused."""
    from tt_train.inputs.model import Processes, check_memory

    config = compose(recipe, overrides=[*words, *more]) if words else job.config
    model = tt_models.build(job.model_config, device="meta")
    try:
        check_memory(model, config, torch.device(device), [], processes=Processes(*processes))
    except ConfigError as error:
        return "its weights alone" not in str(error)
    return True


def test_shards_on_several_devices_and_a_plan_for_another_machine_need_not_fit_here(words, memory):
    memory(100_000, 100_000)  # the weights have more bytes
    with pytest.raises(ConfigError, match="its weights alone"):
        assemble(compose("sft", overrides=words))
    job = assemble(compose("sft", overrides=words), elsewhere=1)
    assert not any(fits(job, "cpu", (ranks, ranks)) for ranks in (1, 2, 1000))
    assert not fits(job, "cuda", (1, 1))
    assert fits(job, "cuda", (1000, 8))
    assert fits(job, "cpu", (1000, 2))  # of a thousand machines


def test_shards_that_are_offloaded_and_copies_on_a_cpu_share_the_memory_of_the_machine(words, memory):
    memory(0, 10**9)
    job = assemble(compose("sft", overrides=words))
    size = 4 * sum(p.numel() for p in tt_models.build(job.model_config, device="meta").parameters())
    offloaded = ["parallel.cpu_offload=true"]
    memory(0, size + 100)
    assert fits(job, "cuda", (4, 4), *offloaded, words=words)  # four quarters
    assert not fits(job, "cpu", (2, 2), "parallel.replicate=2", words=words)  # two copies
    assert fits(job, "cpu", (2, 1), "parallel.replicate=2", words=words)  # on two machines
    memory(0, size // 2)
    assert not fits(job, "cuda", (4, 4), *offloaded, words=words)
    assert fits(job, "cuda", (4, 2), *offloaded, words=words)


def test_the_frozen_copy_of_dpo_is_sharded_and_the_teacher_of_kd_is_whole_in_each_process(words, memory):
    memory(10**9, 10**9)
    job = assemble(compose("sft", overrides=words))
    count = sum(p.numel() for p in tt_models.build(job.model_config, device="meta").parameters())
    folder = next(word.removeprefix("model.path=") for word in words if word.startswith("model.path="))
    taught = ["kd.teacher=" + folder, "kd.teacher_dtype=fp32"]
    memory(2 * count + 100, 0)
    assert fits(job, "cuda", (4, 4), words=words, recipe="dpo")  # a quarter of 8 bytes each
    assert not fits(job, "cuda", (3, 3), words=words, recipe="dpo")
    memory(5 * count + 100, 0)
    assert fits(job, "cuda", (4, 4), *taught, words=words, recipe="kd")  # a quarter of 4 bytes, and 4
    assert not fits(job, "cuda", (3, 3), *taught, words=words, recipe="kd")


def test_shards_that_do_not_divide_the_processes_are_named_before_they_start(words):
    from tt_train.inputs.model import Processes
    from tt_train.job import look_over

    config = compose("sft", overrides=[*words, "adapter.rank=4", "parallel.shard=2"])
    with pytest.raises(ConfigError) as found:
        look_over(config, processes=Processes(3, 3))
    assert found.value.problems == ["parallel: shard 2 does not divide the 3 processes; take one of 1, 3"]
    look_over(config, processes=Processes(4, 4))


def test_the_frozen_copy_that_a_full_preference_run_compares_with_counts(words, monkeypatch):
    monkeypatch.setattr("tt_models.limits.total_memory", lambda device: 30 * 10**9)
    folder = next(word.removeprefix("model.path=") for word in words if word.startswith("model.path="))
    huge = [*words, "model.path=null", "model.name=llama3_70b", f"model.tokenizer={folder}", "model.dtype=bf16"]
    with pytest.raises(ConfigError, match=r"needs 282\.2 GB"):
        assemble(compose("dpo", overrides=[*huge, "loss.name=simpo"]))
    with pytest.raises(ConfigError, match=r"needs 423\.3 GB"):  # 4 bytes that train and 2 that are frozen
        assemble(compose("dpo", overrides=huge))
