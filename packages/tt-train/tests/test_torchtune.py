"""torchtune's names and YAML: what its configs mean there is what ours mean here, and the rest is said."""

import pytest
import yaml

from tt_train import ConfigError, compose
from tt_train.settings import registry
from tt_train.settings.torchtune import names
from tt_train.settings.torchtune.migrate import migrate, migrate_file

QV, MLP = ["q_proj", "v_proj"], ["gate_proj", "up_proj", "down_proj"]
QVK = [*QV, "k_proj"]
FULL = ("full_finetune_distributed", None, "alpaca", 2, 2, 3)
LOW = ("full_finetune_single_device", None, "alpaca", 2, 2, 3)
QKV = ["q_proj", "k_proj", "v_proj"]
# name: (recipe, modules, rows, rows per step, rows per pass, epochs, lr, decay, warm-up, checkpointing) in torchtune
MEANING = {
    "llama2/7B_full": (*FULL, 2e-5, 0.01, None, True),
    "llama2/13B_full": (*FULL, 2e-5, 0.01, None, True),
    "llama2/7B_full_low_memory": (*LOW, 2e-5, 0.01, None, True),
    "llama2/7B_lora": ("lora_finetune_distributed", QV, "alpaca_cleaned", 64, 2, 1, 3e-4, 0.01, 100, False),
    "llama2/13B_lora": (
        "lora_finetune_distributed", [*QVK, *MLP, "lm_head"], "alpaca_cleaned", 32, 2, 1, 2e-4, 0.01, 100, False),
    "llama2/7B_lora_single_device": (
        "lora_finetune_single_device", QV, "alpaca_cleaned", 128, 2, 1, 3e-4, 0.01, 100, True),
    "llama2/7B_qlora_single_device": (
        "lora_finetune_single_device", [*QVK, "o_proj", *MLP], "alpaca_cleaned", 32, 2, 1, 3e-4, 0.01, 100, True),
    "llama2/7B_lora_dpo_single_device": (
        "lora_dpo_single_device", QV, "stack_exchange_paired", 64, 4, 1, 5e-4, 0.05, 100, True),
    "mistral/7B_full": (*FULL, 5e-6, 0.01, None, True),
    "mistral/7B_full_low_memory": (*LOW, 5e-6, 0.01, None, True),
    "mistral/7B_lora": ("lora_finetune_distributed", [*QKV, *MLP, "lm_head"], "alpaca", 4, 4, 3, 2e-5, 0.01, 100, True),
    "mistral/7B_lora_single_device": (
        "lora_finetune_single_device", [*QKV, *MLP, "lm_head"], "alpaca", 16, 4, 3, 2e-5, 0.01, 100, True),
    "mistral/7B_qlora_single_device": (
        "lora_finetune_single_device", [*QKV, *MLP], "alpaca", 16, 4, 3, 2e-5, 0.01, 100, True),
    "gemma/2B_full": (*FULL, 2e-5, 0.01, None, True),
}  # fmt: skip


@pytest.mark.parametrize("name", MEANING)
def test_a_config_of_torchtune_means_here_what_it_means_there(name):
    recipe, modules, rows, batch, micro, epochs, lr, decay, warmup, checkpointing = MEANING[name]
    config = compose(name)
    assert names.PAIRS[name] == recipe
    assert config.recipe == names.RECIPES[recipe] == ("dpo" if "dpo" in recipe else "sft")
    assert (config.batch_size, config.micro_batch_size, config.epochs) == (batch, micro, epochs)
    assert (config.optimizer.name, config.optimizer.lr, config.optimizer.weight_decay) == ("adamw", lr, decay)
    expected = ("constant", 0) if warmup is None else ("cosine", warmup)
    assert (config.schedule.name, config.schedule.warmup_steps) == expected
    assert config.max_grad_norm is None
    assert config.activation_checkpointing is checkpointing
    assert config.data.train == rows
    assert config.data.drop_duplicates is False
    assert config.model.dtype == "bf16"
    assert (config.adapter and config.adapter.target_modules) == modules
    if config.adapter is not None:
        assert (config.adapter.rank, config.adapter.alpha, config.adapter.dropout) == (
            64 if name.startswith("mistral") else 8, 16.0, 0.0)  # fmt: skip
        assert config.adapter.quantize_base == ("qlora" in name)
    if config.recipe == "dpo":
        assert (config.loss.name, config.loss.beta, config.loss.label_smoothing) == ("sigmoid", 0.1, 0.0)
        assert (config.data.data_dir, config.data.max_seq_len, config.max_steps) == ("data/rl", 1024, 1000)
    else:
        assert (config.data.train_on, config.data.template, config.data.max_seq_len) == ("all", "alpaca", 512)
    assert config.optimizer_in_backward == name.endswith("low_memory")


def test_all_17_names_of_configs_and_8_of_recipes_are_known_in_any_case():
    assert len(names.PAIRS) == 17
    assert len(names.RECIPES) == 8
    for name in MEANING:
        assert compose(name.upper()) == compose(name)
    assert compose("llama2/7B_lora").adapter.rank == 8  # torchtune's
    assert compose("llama2/7b_lora").adapter.rank == 16  # ours


def test_the_yaml_of_an_evaluation_is_answered_with_the_line_that_does_it():
    component = {"_component_": "torchtune.utils.FullModelHFCheckpointer", "checkpoint_dir": "/tmp/llama 2"}
    theirs = {"checkpointer": component, "tasks": ["a", "b"], "limit": 5, "max_seq_length": 4096, "seed": 217}
    with pytest.raises(ConfigError) as refused:
        migrate({**theirs, "quantizer": {"_component_": "torchtune.utils.quantization.Int8WeightOnlyQuantizer"}})
    [line] = refused.value.problems
    assert line == (
        "tasks: an evaluation: it is a verb, tt eval '/tmp/llama 2' --tasks a,b --limit 5 --max-length 4096 "
        "--seed 217, after tt quantize has written MODEL"
    )


@pytest.mark.parametrize("name", ["generation", "Eleuther_Evaluation", "quantization", "generate", "quantize"])
def test_a_name_whose_work_is_a_verb_here_is_answered(name):
    with pytest.raises(ConfigError, match=r"a verb here: tt (generate|eval|quantize) "):
        compose(name)


def test_the_batch_of_a_distributed_config_is_that_of_one_gpu_times_the_processes():
    alone, two = compose("llama2/7B_lora"), compose("llama2/7B_lora", devices=2)
    assert (alone.batch_size, two.batch_size) == (64, 128)
    assert alone.micro_batch_size == two.micro_batch_size == 2


def test_a_recipe_of_torchtune_takes_a_config_of_torchtune():
    config = compose("lora_finetune_distributed", config="llama2/7B_lora", overrides=["data.train=rows.jsonl"])
    assert (config.recipe, config.data.train) == ("sft", "rows.jsonl")


def test_what_differs_from_torchtune_is_in_the_comments_of_the_config():
    text = registry.named_config("mistral/7B_full_low_memory")
    assert "# optimizer: the same update, but its moments are not paged" in text
    assert "# batch_size: torchtune's 2 of a GPU, times the number of processes\n" in text
    assert yaml.safe_load(text)["recipe"] == "sft"


# ---- migrate ---------------------------------------------------------------------------------------------------------

LORA = """
output_dir: /data/out
model:
  _component_: torchtune.models.llama3_1.lora_llama3_1_8b
  lora_attn_modules: ['q_proj', 'v_proj', 'output_proj']
  apply_lora_to_mlp: True
  apply_lora_to_output: True
  lora_rank: 32
  lora_alpha: 64
  lora_dropout: 0.1
  use_dora: True
tokenizer:
  _component_: torchtune.models.llama3.llama3_tokenizer
  path: /data/llama/original/tokenizer.model
  max_seq_len: 4096
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: /data/llama/
  checkpoint_files: [model-00001-of-00002.safetensors, model-00002-of-00002.safetensors]
  recipe_checkpoint: null
  output_dir: ${output_dir}
  model_type: LLAMA3
resume_from_checkpoint: False
dataset:
  _component_: torchtune.datasets.instruct_dataset
  source: json
  data_files: mine.json
  column_map: {input: question, output: reply}
  train_on_input: False
  packed: True
  split: train
seed: 7
shuffle: False
batch_size: 4
epochs: 2
max_steps_per_epoch: 50
gradient_accumulation_steps: 8
optimizer: {_component_: torch.optim.AdamW, lr: 3e-4, fused: True, betas: [0.9, 0.95], amsgrad: True}
lr_scheduler: {_component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup, num_warmup_steps: 20}
loss: {_component_: torchtune.modules.loss.CEWithChunkedOutputLoss}
clip_grad_norm: 2.0
compile: True
device: cuda
dtype: bf16
enable_activation_checkpointing: True
metric_logger: {_component_: torchtune.training.metric_logging.WandBLogger, project: p, group: g, colour: red}
log_every_n_steps: 5
profiler: {_component_: torchtune.training.setup_torch_profiler, enabled: True, wait_steps: 1, warmup_steps: 2,
           active_steps: 3, record_shapes: True, with_stack: False, profile_memory: True}
brand_new_key: 3
"""


@pytest.fixture
def theirs():
    return yaml.safe_load(LORA)


def test_each_key_of_torchtune_becomes_ours(tmp_path):
    file = tmp_path / "theirs.yaml"
    file.write_text(LORA)
    found = migrate_file(file, devices=2)
    assert found.config == {
        "recipe": "sft",
        "model": {"path": "/data/llama/", "dtype": "bf16"},
        "adapter": {"rank": 32, "alpha": 64, "dropout": 0.1, "use_dora": True,
                    "target_modules": ["q_proj", "v_proj", "o_proj", *MLP, "lm_head"]},
        "data": {"train": "mine.json", "schema": "prompt_completion", "packing": True, "train_on": "assistant",
                 "columns": {"prompt": "question", "completion": "reply"}, "max_seq_len": 4096, "shuffle": False,
                 "drop_duplicates": False},
        "batch_size": 64, "micro_batch_size": 4, "epochs": 2, "max_steps": 100, "seed": 7, "max_grad_norm": 2.0,
        "schedule": {"name": "cosine", "warmup_steps": 20},
        "optimizer": {"name": "adamw", "lr": 3e-4, "weight_decay": 0.01, "betas": [0.9, 0.95]},
        "activation_checkpointing": True, "compile": True, "output_dir": "/data/out",
        "loggers": {"wandb": {"project": "p", "group": "g"}}, "log_every": 5,
        "profile": {"first_step": 4, "num_steps": 3, "record_shapes": True, "with_stack": False, "memory": True},
    }  # fmt: skip
    keys = [problem.split(": ")[0] for problem in found.problems]
    assert keys == ["model.path", "max_steps_per_epoch", "epochs", "lr_scheduler", "optimizer.amsgrad",
                    "metric_logger.colour", "profiler", "brand_new_key"]  # fmt: skip
    (tmp_path / "ours.yaml").write_text(found.yaml())
    compose(tmp_path / "ours.yaml")  # ConfigError if it does not validate


@pytest.mark.parametrize(
    ("change", "ours", "said"),
    [
        ({"clip_grad_norm": None, "lr_scheduler": None}, {"max_grad_norm": None, "schedule.name": "constant"}, ""),
        ({"dtype": "fp16"}, {"model.dtype": "bf16"}, "dtype: fp16 is not trained in here"),
        ({"dtype": "fp32", "device": "cpu"}, {"model.dtype": "fp32", "device": "cpu"}, ""),
        ({"model": {"_component_": "torchtune.models.gemma.qlora_gemma_2b", "apply_lora_to_output": True}},
         {"adapter.quantize_base": True, "adapter.target_modules": QV}, "this model's output is its embedding"),
        ({"model": {"_component_": "torchtune.models.phi3.lora_phi3_mini", "lora_attn_modules": ["q_proj", "v_proj"],
                    "apply_lora_to_mlp": True}},
         {"adapter.target_modules": ["qkv_proj", "gate_up_proj", "down_proj"]}, "q, k and v are one layer"),
        ({"optimizer": {"_component_": "bitsandbytes.optim.PagedAdamW8bit", "lr": "1e-5"}},
         {"optimizer.name": "adamw8bit", "optimizer.lr": 1e-5}, "nothing is paged"),
        ({"optimizer": {"_component_": "my.Lion", "lr": 1e-5}}, {"optimizer.name": "adamw"}, "my.Lion is not known"),
        ({"optimizer": {"_component_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9}},
         {"optimizer.name": "sgd", "optimizer.momentum": 0.9, "optimizer.weight_decay": 0.0}, ""),
        ({"dataset": {"_component_": "torchtune.datasets.alpaca_dataset", "packed": False}},
         {"data.train": "alpaca", "data.train_on": "all"}, "without alpaca's preamble"),
        ({"dataset": {"_component_": "torchtune.datasets.chat_dataset", "source": "a/b", "split": "train[:5%]",
                      "conversation_column": "dialog", "conversation_style": "openai"}},
         {"data.train": "a/b", "data.schema": "openai", "data.columns": {"messages": "dialog"},
          "data.split": "train[:5%]"}, ""),
        ({"dataset": {"_component_": "torchtune.datasets.text_completion_dataset", "source": "a/b", "column": "body",
                      "name": "en", "add_eos": False, "split_across_pack": True}},
         {"data.train": "a/b:en", "data.columns": {"text": "body"}}, "documents are never split"),
        ({"loss": {"_component_": "torchtune.rlhf.loss.DPOLoss", "beta": 0.05, "label_smoothing": 0.1},
          "dataset": {"_component_": "torchtune.datasets.preference_dataset", "source": "json", "data_files": "p.json",
                      "column_map": {"chosen": "good", "rejected": "bad"}}},
         {"recipe": "dpo", "loss": {"name": "sigmoid", "beta": 0.05, "label_smoothing": 0.1}, "data.train": "p.json",
          "data.columns": {"chosen": "good", "rejected": "bad"}}, ""),
        ({"loss": {"_component_": "torchtune.modules.loss.DPOLoss", "loss_type": "hinge"}}, {"loss.name": "hinge"}, ""),
        ({"checkpointer": {"_component_": "torchtune.training.FullModelMetaCheckpointer", "checkpoint_dir": "/d/llama",
                           "checkpoint_files": ["consolidated.00.pth"]}},
         {"model.path": "/d/llama"}, "Meta's files: tt convert /d/llama /d/llama-hf --allow-pickle"),
        ({"checkpointer": {"_component_": "x.HFCheckpointer", "checkpoint_dir": "/d",
                           "recipe_checkpoint": "r.pt", "adapter_checkpoint": "adapter_0.pt",
                           "checkpoint_files": ["pytorch_model.bin"]}},
         {"model.path": "/d"}, "r.pt: a training state of torchtune cannot be resumed"),
        ({"output_dir": "/data/llama"}, {"model.path": "/data/llama/"}, "output_dir: the directory of the model"),
        ({"fsdp_cpu_offload": True, "custom_sharded_layers": ["output"]}, {"parallel.cpu_offload": True},
         "custom_sharded_layers: weights are sharded by block"),
        ({"optimizer_in_bwd": True, "enable_activation_offloading": True},
         {"optimizer_in_backward": True, "activation_offloading": True}, ""),
        ({"metric_logger": {"_component_": "t.CometLogger", "project": "p", "experiment_name": "n"}},
         {"loggers": {"comet": {"project": "p", "name": "n"}}}, ""),
    ],
)  # fmt: skip
def test_a_component_becomes_ours_and_what_differs_is_said(theirs, change, ours, said):
    found = migrate(theirs | change)
    for key, value in ours.items():
        node = found.config
        for part in key.split("."):
            node = node[part]
        assert node == value, key
    assert any(said in problem for problem in found.problems)


def test_distillation_becomes_kd(theirs):
    theirs |= {
        "teacher_model": {"_component_": "torchtune.models.llama3_1.llama3_1_8b"},
        "teacher_checkpointer": {"_component_": "torchtune.training.FullModelHFCheckpointer", "model_type": "LLAMA3",
                                 "checkpoint_dir": "/data/teacher", "checkpoint_files": ["model.safetensors"]},
        "kd_loss": {"_component_": "torchtune.modules.loss.ForwardKLWithChunkedOutputLoss"}, "kd_ratio": 0.25,
    }  # fmt: skip
    found = migrate(theirs)
    assert found.config["recipe"] == "kd"
    assert found.config["kd"] == {
        "teacher": "/data/teacher", "teacher_dtype": "bf16", "divergence": "forward", "cross_entropy_weight": 0.75
    }  # fmt: skip
    (teacher,) = (line for line in found.problems if line.startswith("kd.teacher"))
    assert "hub id of these weights is meta-llama/Meta-Llama-3.1-8B-Instruct" in teacher
    assert not any("not known; look" in line for line in found.problems if "brand_new_key" not in line)
    theirs |= {"kd_loss": {"_component_": "torchtune.modules.loss.ReverseKLLoss"}, "teacher_checkpointer": {}}
    found = migrate(theirs)
    assert found.config["kd"]["divergence"] == "reverse"
    assert found.config["kd"]["teacher"] == "meta-llama/Meta-Llama-3.1-8B-Instruct"


@pytest.mark.parametrize(
    ("quantizer", "section"),
    [({"_component_": "torchtune.training.quantization.Int8DynActInt4WeightQATQuantizer", "groupsize": 32},
      {"weights": "int4", "group_size": 32, "activations": "int8"}),
     ({"_component_": "torchao.quantization.qat.Int4WeightOnlyQATQuantizer"}, {"weights": "int4", "group_size": 256})],
)  # fmt: skip
def test_quantization_aware_training_becomes_qat(theirs, quantizer, section):
    found = migrate(theirs | {"quantizer": quantizer, "fake_quant_after_n_steps": 100})
    assert (found.config["recipe"], found.config["quantization"]) == ("qat", section)
    assert found.config["adapter"]["dropout"] == 0.0  # it was 0.1, which is said
    for said in ("qat has no dropout", "rounded from the first step on", "the sum of base and adapter is rounded"):
        assert any(said in line for line in found.problems), said


def test_data_sets_that_are_read_in_one_way_become_a_list(theirs):
    rows = {"_component_": "torchtune.datasets.chat_dataset", "conversation_style": "openai", "split": "train",
            "conversation_column": "messages"}  # fmt: skip
    several = [rows | {"source": "json", "data_files": "a.json"}, rows | {"source": "someone/chats"}]
    data = migrate(theirs | {"dataset": several}).config["data"]
    assert data["train"] == ["a.json", "someone/chats"]
    assert (data["schema"], data["max_seq_len"]) == ("openai", 4096)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"policy_model": {"_component_": "torchtune.models.mistral.mistral_7b"}}, "PPO is not supported"),
        (
            {"teacher_model": {}, "kd_loss": {"_component_": "torchtune.modules.loss.SymmetricKLLoss"}},
            "forward or reverse",
        ),
        ({"quantizer": {"_component_": "torchtune.training.quantization.SomeQuantizer"}}, "SomeQuantizer is not known"),
        ({"dataset": [{"_component_": "torchtune.datasets.alpaca_dataset"}] * 2}, "alpaca is read in its own way"),
        (
            {
                "dataset": [
                    {"_component_": "torchtune.datasets.text_completion_dataset", "source": "a.jsonl", "column": c}
                    for c in ("text", "story")
                ]
            },
            "they differ in more than their source",
        ),
        ({"dataset": ["a.jsonl"]}, "expected data sets"),
        ({"model": {"_component_": "torchtune.models.llama3_2_vision.llama3_2_vision_11b"}}, "images"),
        ({"dataset": {"_component_": "torchtune.datasets.multimodal.the_cauldron_dataset"}}, "images"),
        ({"dataset": {"_component_": "my.rows"}}, "my.rows is not known"),
        ({"dataset": {"_component_": "torchtune.datasets.instruct_dataset"}}, "dataset.source: missing"),
        ({"dataset": None}, "dataset: missing"),
        ({"output_dir": "${oc.env:HOME}/x"}, "cannot be resolved here"),
    ],
)
def test_what_cannot_be_migrated_is_refused_with_the_reason(theirs, change, why):
    with pytest.raises(ConfigError, match=why):
        migrate(theirs | change)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("model: !!python/object/apply:os.system ['true']\n", "tags"),
        ("a: &x [1]\nb: *x\n", "aliases"),
        ("a: 1\n", "not a config of torchtune"),
        ("- a\n", "not a config of torchtune"),
        ("x: " + "[" * 100 + "]" * 100 + "\n", "nested too deeply"),
        (LORA.replace("lr: 3e-4", "lr: fast"), "a value is of another kind"),
        ("x: '" + "y" * 300_000 + "'\n", "300.0 KB"),
    ],
)
def test_yaml_of_strangers_runs_nothing_and_is_bounded(tmp_path, text, why):
    file = tmp_path / "theirs.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=why):
        migrate_file(file)
