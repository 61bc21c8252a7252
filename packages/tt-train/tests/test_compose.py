"""Configs: what is accepted, and how each mistake is answered."""

import dataclasses
import random
import re
from pathlib import Path

import pytest

from tt_train import ConfigError, compose
from tt_train.config import SCHEMAS, DPOConfig, SFTConfig, to_dict, to_yaml
from tt_train.losses.table import PREFERENCE_LOSSES
from tt_train.settings.keys.foreign import FOREIGN

BASE = ["model.path=DIR", "data.train=rows.jsonl"]


def problems(*words, **kwargs):
    with pytest.raises(ConfigError) as caught:
        compose(kwargs.pop("recipe", "sft"), overrides=[*BASE, *words], **kwargs)
    assert all("\n" not in problem for problem in caught.value.problems)
    return caught.value.problems


def test_defaults_come_from_the_dataclass():
    config = compose("sft", overrides=BASE)
    assert config.batch_size == SFTConfig().batch_size
    assert config.adapter is None


def test_what_only_a_run_needs_may_be_left_out_to_look_at_a_config():
    assert compose("sft", complete=False).model.path is None
    with pytest.raises(ConfigError, match="model.path: missing") as caught:
        compose("sft")
    assert len(caught.value.problems) == 2
    with pytest.raises(ConfigError, match="batch_size"):
        compose("sft", overrides=["batch_size=0"], complete=False)


def test_an_override_switches_the_adapter_on_and_null_switches_it_off(tmp_path):
    assert compose("sft", overrides=[*BASE, "adapter.rank=4"]).adapter.rank == 4
    file = tmp_path / "lora.yaml"
    file.write_text(
        "recipe: sft\nmodel: {path: DIR}\nadapter:\n  rank: 4\n  target_modules: all-linear\ndata: {train: a}\n"
    )
    config = compose(file)
    assert config.adapter.rank == 4
    assert config.adapter.target_modules == "all-linear"
    assert compose(file, overrides=["adapter=null"]).adapter is None
    assert compose("sft", config=file, overrides=["adapter.rank=16"]).adapter.rank == 16


def test_values_are_yaml_split_at_the_first_equals_sign():
    config = compose(
        "sft",
        overrides=[
            "model.path=a=b",
            "data.train=[x.jsonl, y.jsonl]",
            "optimizer.lr=2e-5",
            "data.columns.messages=conv",
            "max_grad_norm=null",
        ],
    )
    assert config.model.path == "a=b"
    assert config.data.train == ["x.jsonl", "y.jsonl"]
    assert config.optimizer.lr == 2e-5
    assert config.data.columns == {"messages": "conv"}
    assert config.max_grad_norm is None


def test_a_mixture_keeps_its_file_names(tmp_path):
    file = tmp_path / "mix.yaml"
    file.write_text("model: {path: DIR}\ndata:\n  train: {a.jsonl: 0.7, b.parquet: 0.3}\nrecipe: sft\n")
    assert compose(file).data.train == {"a.jsonl": 0.7, "b.parquet": 0.3}


def test_a_config_survives_yaml(tmp_path):
    config = compose("sft", overrides=[*BASE, "adapter.rank=4", "optimizer.betas=[0.8, 0.9]", "seed=3"])
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert to_dict(compose(tmp_path / "again.yaml")) == to_dict(config)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("adapter.rnk=8", "did you mean 'adapter.rank'?"),
        ("learning_rate=1", "did you mean 'optimizer.lr'?"),
        ("learing_rate=1", "did you mean 'optimizer.lr'?"),
        ("optimizer.learing_rate=1", "did you mean 'optimizer.lr'?"),
        ("lr=1e-4", "did you mean 'optimizer.lr'?"),
        ("rank=4", "did you mean 'adapter.rank'?"),
        ("optimizer.lr=fast", "optimizer.lr: expected a number, got the text 'fast'"),
        ("batch_size=4.5", "batch_size: expected a whole number, got 4.5"),
        ("batch_size=null", "batch_size: expected a whole number, got null; the default is 16"),
        ("adapter=8", "adapter: expected keys (rank, "),
        ("data.packing=maybe", "data.packing: expected true or false"),
        ("batch_size.x=1", "batch_size has no keys inside"),
        ("model.dtype=bf61", "did you mean 'bf16'?"),
        ("model.dtype=fp16", "fp16 overflows"),
        ("batch_size=10 micro_batch_size=4", "nearest that are: 8 or 12"),
        ("batch_size=1 micro_batch_size=2", "set micro_batch_size=1"),
        ("adapter.rank=0", "adapter.rank: must be at least 1, got 0"),
        ("adapter.dropout=1.0", "adapter.dropout: must be at least 0 and below 1, got 1.0"),
        ("optimizer.name=adamv", "did you mean 'adam'?"),
        ("loss.name=os.system", "--allow-import os"),
        ("model.path=${oc.env:HF_TOKEN}", "interpolation"),
        ("--lr", "expected key=value"),
        ("adapter", "expected key=value"),
    ],
)
def test_a_mistake_is_named_with_its_cure(word, expected):
    assert any(expected in problem for problem in problems(*word.split(" ")))


AS_TYPED = [
    ("output_dir=007", "output_dir", "007"),
    ("output_dir=2024-01-01", "output_dir", "2024-01-01"),
    ("output_dir=1:30", "output_dir", "1:30"),
    ("output_dir=[a]", "output_dir", "[a]"),
    ("output_dir={a: b}", "output_dir", "{a: b}"),
    ("output_dir=a: b", "output_dir", "a: b"),
    ("output_dir=- a", "output_dir", "- a"),
    ("output_dir=~", "output_dir", "~"),
    ("output_dir=null", "output_dir", None),
    ("output_dir='null'", "output_dir", "null"),
    ('output_dir="it\'s"', "output_dir", "it's"),
    ("output_dir='a' or 'b'", "output_dir", "'a' or 'b'"),
    ("model.path=no", "model.path", "no"),
    ("model.path=1.10", "model.path", "1.10"),
    ("model.path=true", "model.path", "true"),
    ("model.path=1e3", "model.path", "1e3"),
    ("model.path=*star", "model.path", "*star"),
    ("model={path: 007, tokenizer: no}", "model.path", "007"),
    ("model={path: 007, tokenizer: no}", "model.tokenizer", "no"),
    ("data.train=rows #1.jsonl", "data.train", "rows #1.jsonl"),
    ("data.train=my: rows.jsonl", "data.train", "my: rows.jsonl"),
    ("data.train=012", "data.train", "012"),
    ("data.train=[no, 1.10, my: rows.jsonl, a #1.jsonl]", "data.train", ["no", "1.10", "my: rows.jsonl", "a #1.jsonl"]),
    ("data.train=['a, b.jsonl', c(1,2).jsonl]", "data.train", ["a, b.jsonl", "c(1,2).jsonl"]),
    ("data.train={my: rows.jsonl: 0.7, 007: 3}", "data.train", {"my: rows.jsonl": 0.7, "007": 3}),
    ("data.eval=0.05", "data.eval", 0.05),
    ("data.eval=2024-01-01", "data.eval", "2024-01-01"),
    ("data.eval=no", "data.eval", "no"),
    ("data.columns.messages=no", "data.columns", {"messages": "no"}),
    ("data.columns={messages: my: conv, text: 1.10}", "data.columns", {"messages": "my: conv", "text": "1.10"}),
    ("data.template=no", "data.template", "no"),
    ("adapter.target_modules=[no, q_proj]", "adapter.target_modules", ["no", "q_proj"]),
    ("adapter.exclude_modules=[1]", "adapter.exclude_modules", ["1"]),
    ("adapter.rank_pattern.layers.0.q_proj=4", "adapter.rank_pattern", {"layers.0.q_proj": 4}),
    ("batch_size=010", "batch_size", 10),  # YAML: eight
    ("max_steps=1_000", "max_steps", 1000),
    ("optimizer.lr=1e-3", "optimizer.lr", 1e-3),
    ("optimizer.betas=[1e-1, 0.9]", "optimizer.betas", [0.1, 0.9]),
    ("epochs=3.0", "epochs", 3),
    ("max_steps=1e3", "max_steps", 1000),
    ("data.packing=Yes", "data.packing", True),
    ("data.packing=False", "data.packing", False),
    ("data.shuffle=0", "data.shuffle", False),
]


@pytest.mark.parametrize(("word", "key", "meant"), AS_TYPED)
def test_a_word_means_what_was_typed(word, key, meant):
    plain = to_dict(compose("sft", overrides=["micro_batch_size=1", word], complete=False))
    for part in key.split("."):
        plain = plain[part]
    assert plain == meant
    assert type(plain) is type(meant)


def test_text_in_a_file_is_taken_as_written(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "output_dir: 007\nmodel: {path: no, tokenizer: 1.10}\nloggers: []\nadapter: {target_modules: [on, '2']}\n"
        "data:\n  train: [2024-01-01, 0x10, 'a: b']\n  eval: 0.1\n  columns: {messages: yes}\n  split: null\n"
        "  template: ~\n  cache_dir: '~'\nbatch_size: 010\nmicro_batch_size: '5'\n"
    )
    config = compose("sft", config=file)
    assert (config.output_dir, config.model.path, config.model.tokenizer) == ("007", "no", "1.10")
    assert config.adapter.target_modules == ["on", "2"]
    assert (config.data.train, config.data.eval) == (["2024-01-01", "0x10", "a: b"], 0.1)
    assert config.data.columns == {"messages": "yes"}
    assert (config.data.split, config.data.template, config.data.cache_dir) == (None, None, "~")
    assert (config.batch_size, config.micro_batch_size) == (10, 5)
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert to_dict(compose(tmp_path / "again.yaml")) == to_dict(config)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("max_steps=1:30", "expected a whole number or null, got the text '1:30'"),
        ("batch_size=0x10", "expected a whole number, got the text '0x10'"),
        ("epochs=0.5", "expected a whole number, got 0.5; a part of an epoch is given by max_steps"),
        ("eval_every=0.1", "got 0.1; it counts steps, not a share of the run"),
        ("schedule.warmup_steps=0.1", "got 0.1; a share of the run is schedule.warmup_ratio"),
        ("max_steps=-1", "max_steps: must be at least 1, got -1; null means what -1 means elsewhere"),
        ("data.packing=2", "expected true or false, got the text '2'"),
        ("loggers=wandb", "options such as {a: {project: p}}, got the text 'wandb'; write [wandb]"),
        ("data.columns=conv", "expected names such as {a: b}, got the text 'conv'"),
        ("optimizer.betas=0.9", "expected a list such as [0.9, 0.95]"),
        ("model.path=", "model.path: no value; write model.path=null to unset it"),
        ("optimizer.lr=.inf", "optimizer.lr: must be a finite number, got inf"),
        ("optimizer.lr=nan", "optimizer.lr: must be a finite number, got nan"),
        ("optimizer.betas=[0.9, .nan]", "optimizer.betas: must be a finite number, got nan"),
        ("adapter.alpha=inf", "adapter.alpha: must be a finite number, got inf"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas: must be at least 0 and below 1, got 1.0"),
        ("optimizer.eps=-1", "optimizer.eps: must be at least 0, got -1.0"),
        ("seed=18446744073709551616", "seed: must be below 2^64, torch's range, got 18446744073709551616"),
        ("adapter.lora_plus_ratio=0", "adapter.lora_plus_ratio: must be positive, got 0.0"),
        ("model.dtype=bfloat16", "did you mean 'bf16'?"),
        ("schedule.name=constant_with_warmup", "did you mean 'constant'?"),
        ("optimizer.name=adamw_torch_fused", "did you mean 'adamw'?"),
        ("optimizer.name=torch.optim.AdamW", "did you mean 'adamw'?"),
        ("data.train={path: rows.jsonl, type: alpaca}", "the weight of 'type' must be a positive number, got 'alpaca'"),
        ("data.train={a.jsonl: inf}", "data.train.a.jsonl: must be a finite number, got inf"),
    ],
)
def test_what_yaml_would_bend_is_refused(word, expected):
    assert any(expected in problem for problem in problems(word))


def test_the_home_folder_is_known_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["model.path=~/m", "data.train=[~/a.jsonl, b~/c]", "data.eval={~/e.jsonl: 1}", "output_dir=~/runs/x"]
    config = compose("sft", overrides=[*words, "adapter.path=~/ad", "data.cache_dir=~other"])
    home = str(tmp_path)
    assert (config.model.path, config.output_dir, config.adapter.path) == (f"{home}/m", f"{home}/runs/x", f"{home}/ad")
    assert (config.data.train, config.data.eval) == ([f"{home}/a.jsonl", "b~/c"], {f"{home}/e.jsonl": 1})
    assert config.data.cache_dir == "~other"


def test_names_given_anew_replace_those_of_the_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: {path: m}\ndata: {train: {a.jsonl: 0.7, b.jsonl: 0.3}, columns: {prompt: p}}\n")
    config = compose("sft", config=file, overrides=["data.train={c.jsonl: 1}", "data.columns={messages: m}"])
    assert (config.data.train, config.data.columns) == ({"c.jsonl": 1}, {"messages": "m"})


@pytest.mark.parametrize("name", FOREIGN)
def test_the_key_of_another_tool_leads_to_ours_or_is_absent_by_intent(name):
    from tt_train.settings.keys.schema import all_keys

    ours, note = FOREIGN[name]
    assert ours in {key for schema in SCHEMAS.values() for key in all_keys(schema)} if ours else note
    for typed in (name, name.upper(), name.replace("_", "-").replace("-component-", "_component_")):
        (problem,) = problems(f"{typed}=1")
        assert (f"did you mean {ours!r}?" if ours else f"tt has no such key: {note}") in problem


@pytest.mark.parametrize(
    "name",
    "load_in_4bit load_in_8bit val_set_size warmup_ratio report_to bf16 fp16 resume_from_checkpoint logging_steps "
    "optim load_best_model_at_end neftune_noise_alpha lora_target_modules lora_target_linear sample_packing "
    "deepspeed fsdp save_total_limit eval_strategy gradient_accumulation_steps max_seq_length dataset_text_field "
    "completion_only_loss assistant_only_loss use_rslora lora_modules_to_save train_on_inputs flash_attention "
    "xformers torch_dtype packing attn_implementation push_to_hub tokenizer.path checkpointer.checkpoint_dir "
    "model._component_ dataset._component_ metric_logger optimizer_in_bwd max_seq_len sequence_len "
    "per_device_train_batch_size lr_scheduler_type".split(),
)
def test_keys_that_people_bring_along_are_answered(name):
    (problem,) = problems(f"{name}=1")
    assert "did you mean" in problem or "tt has no such key: " in problem


@pytest.mark.parametrize(("package", "config"), [("trl", "SFTConfig"), ("peft", "LoraConfig")])
def test_every_key_of_peers_is_answered_on_purpose(package, config):
    """A key that is spelt like one of ours by chance would send people the wrong way."""
    from tt_train.settings.keys.foreign import foreign_key
    from tt_train.settings.keys.schema import all_keys

    fields = dataclasses.fields(getattr(pytest.importorskip(package), config))
    ours = {key.rsplit(".", 1)[-1] for key in all_keys(SFTConfig)}
    assert [field.name for field in fields if field.name not in ours and not foreign_key(field.name)] == []


def test_all_mistakes_are_told_at_once_with_their_lines(tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text("model:\n  path: DIR\nbatchsize: 4\nadapter:\n  rnk: 3\ndata: {train: x}\n")
    found = problems(recipe="sft", config=file)
    assert any(problem.startswith(f"{file}:3: batchsize: unknown key; did you mean 'batch_size'") for problem in found)
    assert any(problem.startswith(f"{file}:5: adapter.rnk: ") for problem in found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: [", ":1:9: not YAML: the file ends inside brackets; close them"),
        ("a: &x [1]\nb: *x\n", ":2:4: aliases (*x) are not read; write the value again"),
        ("x: !!python/object/apply:os.system [true]\n", ":1:4: tags (!!python/object/apply:os.system) are not read"),
        ("- 1\n", "a config is keys and values"),
        ("seed: 1\nseed: 2\n", "is given twice"),
        ("_component_: os.system\n", "unknown key"),
        ("a: " + "[" * 3000, "nested too deeply to be a config"),
        ("model:\n  <<: {path: m}\n", ":2:3: merge keys (<<) are not read"),
        ("model: DIR\n", "got the text 'DIR'; did you mean model.path?"),
        ("adapter: true\n", "got true; did you mean adapter.rank?"),
        (
            "data:\n  train: a: b\n",
            ":2:11: not YAML: a second ': ' in one line; put a value that contains ': ' in quotes (found 'train:",
        ),
    ],
)
def test_a_hostile_or_broken_file_is_refused(tmp_path, text, expected):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    assert any(expected in problem for problem in problems(recipe="sft", config=file))


def test_unknown_names_suggest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "did you mean 'sft'?" in problems(recipe="stf")[0]
    Path("lora.yaml").write_text("")
    assert "did you mean 'lora.yaml'?" in problems(recipe="lorra.yaml")[0]


def test_a_dotted_name_is_imported_only_if_allowed(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def focal(model, batch): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = compose("sft", overrides=[*BASE, "loss.name=mine.focal"], allow_import=["mine"])
    assert config.loss.name == "mine.focal"
    assert "cannot be imported" in problems("loss.name=mine.local", allow_import=["mine"])[0]


def test_the_config_of_a_run_is_read_without_the_code_of_its_recipe(tmp_path):
    from tt_train.settings.composing import compose_run

    text = to_yaml(compose("sft", overrides=[*BASE, "adapter.rank=4"])).replace("recipe: sft", "recipe: mine.py")
    (tmp_path / "config.yaml").write_text(text + "my_own_key: 3\n")
    (tmp_path / "mine.py").write_text("raise SystemExit('run')\n")
    config = compose_run(tmp_path, ["device=cpu"])
    assert (config.recipe, config.adapter.rank, config.device) == ("mine.py", 4, "cpu")
    with pytest.raises(ConfigError, match="mine.py is a recipe file, which runs only if you name it"):
        compose(tmp_path / "config.yaml")


def typos(word, choice):
    """One slip of a finger: a letter left out, doubled, changed for another, put in, or two in the wrong order."""
    letters = "abcdefghijklmnopqrstuvwxyz_"
    place = choice.randrange(len(word))
    match choice.randrange(5):
        case 0:
            return word[:place] + word[place + 1 :]
        case 1:
            return word[:place] + word[place] + word[place:]
        case 2:
            return word[:place] + choice.choice(letters) + word[place + 1 :]
        case 3:
            return word[:place] + choice.choice(letters) + word[place:]
        case _:
            return word[:place] + word[place : place + 2][::-1] + word[place + 2 :]


@pytest.mark.parametrize(("slips", "with_section"), [(1, True), (2, True), (1, False)])
def test_mistyped_keys_get_the_right_key_in_95_percent(slips, with_section):
    from tt_train.settings.keys.schema import all_keys, unknown_key

    keys = list(all_keys(SFTConfig))
    choice = random.Random(7)
    hit = total = 0
    missed = []
    for key in keys:
        head, dot, last = key.rpartition(".")
        if len(last) < 4 * slips:  # of `lr` with two slips nothing is left
            continue
        for _ in range(12):
            typo = last
            for _ in range(slips):
                typo = typos(typo, choice)
            typed = head + dot + typo if with_section else typo
            if typed in keys or typo == last:
                continue
            total += 1
            said = unknown_key(SFTConfig, typed)
            found = f"{key!r}" in said if with_section else f"{last}'" in said  # two sections have a dtype
            hit += found
            missed += [] if found else [(key, typed, said)]
    assert total > 200
    assert hit / total >= 0.95, (hit / total, missed)


CURE = re.compile(
    r"did you mean|\bwrite |\bgive |\bname |\bleave |\bset |\buse |tt \w+|the default is|such as|must be|looked in"
    r"|expected (one of|text)|tt has no such key: |null: |a share is|needs quotes|--allow-import|known: |keep one"
)
BAD_VALUES = ["@@", "-1", "0", "[]", "[a]", "{a: b}", "{}", "null", "1e999", ".nan", "9" * 400, "yes", "${x}", "1:30"]


def test_every_refusal_of_a_config_says_what_to_do():
    from tt_train.settings.keys.schema import all_keys

    refused = []
    for key in [*all_keys(SFTConfig), "nonsense", "model.nonsense", "data.columns.x.y", "batch_size.x"]:
        for value in BAD_VALUES:
            try:
                compose("sft", overrides=[f"{key}={value}"], complete=False)
            except ConfigError as error:
                refused += error.problems
    assert len(refused) > 300
    assert [line for line in refused if not CURE.search(line)] == []


@pytest.mark.parametrize(
    ("words", "both"),
    [
        (["schedule.warmup_steps=1", "schedule.warmup_ratio=0.1"], ("warmup_steps", "warmup_ratio", "set one of them")),
        (["data.streaming=true", "data.eval=0.1", "max_steps=1"], ("data.eval", "data.streaming", "separate file")),
        (["batch_size=10", "micro_batch_size=4"], ("batch_size", "micro_batch_size", "nearest that are: 8 or 12")),
        (["model.name=llama3.2_1b"], ("path DIR", "name llama3.2_1b", "set one of them to null")),
        (["adapter.path=a", "adapter.init=pissa"], ("path a", "init pissa", "leave out init")),
        (["data.streaming=true"], ("max_steps", "data.streaming", "max_steps=1000")),
    ],
)
def test_keys_that_do_not_go_together_are_both_named_with_the_way_out(words, both):
    (problem,) = problems(*words)
    assert all(part in problem for part in both), problem


# ---- preference losses ----


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("loss.name=sigmiod", "loss.name: unknown name 'sigmiod'; did you mean 'sigmoid'?; known: sigmoid, "),
        ("loss.name=cross_entropy", "loss.name: unknown name 'cross_entropy'"),
        ("loss.beta=0", "loss.beta: must be positive, got 0"),
        ("loss.label_smoothing=1", "loss.label_smoothing: must be at least 0 and below 1, got 1.0"),
        ("loss.name=robust loss.label_smoothing=0.5", "loss.label_smoothing: must be less than 0.5, got 0.5"),
        ("loss.label_smoothing=0.6", "loss.label_smoothing: must be less than 0.5, got 0.6"),
        ("loss.name=kto loss.desirable_weight=0 loss.undesirable_weight=0", "loss.desirable_weight: 0 as undesirable_"),
        ("loss.name=hinge loss.label_smoothing=0.1", "loss.label_smoothing: hinge has none, only sigmoid, "),
        ("loss.margin=0.5", "loss.margin: sigmoid has none, only simpo; leave it out"),
        ("loss.name=ipo loss.desirable_weight=2", "loss.desirable_weight: ipo has none, only kto"),
        ("loss.sft_weight=-1", "loss.sft_weight: must be at least 0, got -1.0"),
        ("loss.name=simpo loss.reference_cache=x", "loss.reference_cache: simpo compares with no reference"),
        ("loss.reference_cache=x data.streaming=true max_steps=1", "loss.reference_cache: a stream has no rows"),
        ("loss.reference_cache=x adapter.init=loftq adapter.quantize_base=true", "adapter.init=loftq starts from"),
        ("loss.bta=1", "loss.bta: unknown key; did you mean 'loss.beta'?"),
    ],
)  # fmt: skip
def test_mistakes_of_a_preference_loss_are_found_in_the_config(words, line):
    with pytest.raises(ConfigError) as found:
        compose("dpo", overrides=words.split(), complete=False)
    assert any(line in problem for problem in found.value.problems), found.value.problems


@pytest.mark.parametrize("loss", PREFERENCE_LOSSES)
def test_each_preference_loss_takes_the_keys_that_the_table_says(loss):
    import inspect

    from tt_train.losses import preferences

    accepted = set(inspect.signature(getattr(preferences, loss)).parameters) - {"pairs", "judged", "beta"}
    assert accepted == set(PREFERENCE_LOSSES[loss])
    words = [f"loss.{key}=0.25" for key in PREFERENCE_LOSSES[loss]]
    assert compose("dpo", overrides=[f"loss.name={loss}", *words], complete=False).loss.name == loss


@pytest.mark.parametrize("key", ["loss.beta=0.2", "loss.sft_weight=1", "loss.margin=1"])
def test_a_key_of_preference_losses_is_unknown_to_supervised_fine_tuning(key):
    with pytest.raises(ConfigError, match="unknown key"):
        compose("sft", overrides=[key], complete=False)


def test_a_yaml_file_for_dpo_is_read_with_its_keys_and_by_torchtunes_name(tmp_path):
    file = tmp_path / "d.yaml"
    file.write_text("recipe: lora_dpo_single_device\nloss: {name: ipo, beta: 0.2}\nadapter: {rank: 4}\n")
    config = compose(file, complete=False)
    assert (type(config), config.recipe, config.loss.name, config.loss.beta) == (DPOConfig, "dpo", "ipo", 0.2)
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config))
    assert compose(again, complete=False) == config
    assert compose("lora_dpo_single_device", config=file, complete=False) == config
    with pytest.raises(ConfigError, match="this config is for lora_dpo_single_device, not for sft"):
        compose("sft", config=file, complete=False)
