"""torchtune's YAML of fine-tuning, 0.1 to 0.6, as ours: what each key means here, and which keys mean nothing here.

The YAML is data: nothing that it names is imported. A key that is neither carried over nor known is reported.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tt_train.errors import ConfigError
from tt_train.settings.keys.text import NotPlainError, compose_text, read_text
from tt_train.settings.keys.values import of_node
from tt_train.settings.torchtune import tables
from tt_train.settings.torchtune.carry import Carry
from tt_train.settings.torchtune.methods import carry_quantizer, carry_teacher
from tt_train.settings.torchtune.rows import carry_rows
from tt_train.settings.torchtune.training import carry_memory, carry_optimizer, carry_output, carry_steps
from tt_train.settings.torchtune.verbs import evaluation, quantization

_METHODS = {"teacher_model": "kd", "quantizer": "qat"}  # key that only its recipe has -> ours
LONGEST = 131_072  # tokens of a row, where torchtune cut none: as long as any of its models' rows


@dataclass
class Migration:
    """``config``: our keys and values. ``problems``: ``key: why``, what could not be carried over or differs."""

    config: dict[str, Any]
    problems: list[str]

    def yaml(self) -> str:
        """The config as YAML."""
        return yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True)


def migrate_file(path: Path, *, devices: int = 1) -> Migration:
    """Ours for a YAML file of torchtune; ConfigError says why there is none.

    devices: how many GPUs torchtune ran on; its ``batch_size`` is that of one.
    """
    try:
        node = compose_text(read_text(path, "YAML file of torchtune"))
        values = of_node(node, Any) if isinstance(node, yaml.MappingNode) else None
    except NotPlainError as error:
        raise ConfigError([f"{path}:{error.place}: {error}"]) from None
    if not isinstance(values, dict) or not any("_component_" in str(value) for value in values.values()):
        raise ConfigError(
            [
                f"{path}: not a config of torchtune, which has components (_component_); give its YAML file "
                "(for axolotl and LLaMA-Factory: docs/coming-from.md)"
            ]
        )
    try:
        return migrate(values, devices=devices)
    except ConfigError as error:
        raise ConfigError([f"{path}: {problem}" for problem in error.problems]) from None
    except (TypeError, ValueError, AttributeError) as error:  # a text that is no number, a list that is no mapping
        raise ConfigError([f"{path}: a value is of another kind than torchtune takes: {error}; correct it"]) from None


def migrate(values: dict[str, Any], *, devices: int = 1) -> Migration:
    """The same for values that were read."""
    _refuse_other_recipes(values)
    theirs = _resolved(_flat(values))
    carry = Carry(theirs, devices=devices, is_old=any("torchtune.utils." in str(value) for value in theirs.values()))
    is_preference = _carry_loss(carry)
    recipe = "dpo" if is_preference else next((ours for key, ours in _METHODS.items() if key in values), "sft")
    carry.ours = {"recipe": recipe, "model": {}, **carry.ours}
    if recipe == "kd":
        carry_teacher(carry)
    _carry_model(carry)
    if recipe == "qat":
        carry_quantizer(carry)
    carry_rows(carry, longest=LONGEST)
    carry_steps(carry)
    carry_optimizer(carry)
    carry_memory(carry)
    carry_output(carry)
    for key, value in carry.theirs.items():
        if key in tables.SILENT or value in (None, False, [], {}):
            continue
        why = tables.DROPPED.get(key.partition(".")[0] if key.partition(".")[0] in tables.DROPPED else key)
        carry.say(key, why or "not known; look for it with tt cat sft, or leave it out")
    order = (
        "recipe",
        "model",
        "adapter",
        "kd",
        "quantization",
        "data",
        "loss",
        "batch_size",
        "micro_batch_size",
        "epochs",
        "max_steps",
    )
    ours = {key: carry.ours[key] for key in (*order, *carry.ours) if key in carry.ours}
    return Migration(ours, carry.problems)


def _refuse_other_recipes(values: dict[str, Any]) -> None:
    """ConfigError for a recipe that has no counterpart, with what to do instead."""
    text = str(values)
    model = str((values.get("model") or {}).get("_component_", "")) if isinstance(values.get("model"), dict) else ""
    family = model.split(".")[2] if model.startswith("torchtune.models.") and model.count(".") > 2 else ""
    if family in tables.NO_MODELS:
        raise ConfigError([f"model: {model}: {tables.NO_MODELS[family]}"])
    for mark, why in (
        ("policy_model", "PPO is not supported; tt run dpo trains on preferences"),
        ("PPOLoss", "PPO is not supported; tt run dpo trains on preferences"),
        ("reward_and_value_model", "PPO is not supported; tt run dpo trains on preferences"),
    ):
        if mark in text:
            raise ConfigError([f"{mark}: {why}"])
    if "tasks" in values and "optimizer" not in values:
        raise ConfigError([f"tasks: an evaluation: it is a verb, {evaluation(_resolved(_flat(values)))}"])
    for mark, why in (
        ("max_new_tokens", "a generation: it is a verb, tt generate MODEL -p PROMPT"),
        ("prompt", "a generation: it is a verb, tt generate MODEL -p PROMPT"),
    ):
        if mark in values and "optimizer" not in values:
            raise ConfigError([f"{mark}: {why}"])
    if "quantizer" in values and "optimizer" not in values:
        raise ConfigError([f"quantizer: a quantization: it is a verb, {quantization(_resolved(_flat(values)))}"])
    for key in ("model", "optimizer"):
        if not isinstance(values.get(key), dict):
            raise ConfigError([f"{key}: missing; a config of torchtune's fine-tuning has it, with a _component_"])
    if not isinstance(values.get("dataset"), dict | list):
        raise ConfigError(["dataset: missing; a config of torchtune's fine-tuning has it, with a _component_"])


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value and not (prefix + str(key)).endswith("column_map"):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _resolved(flat: dict[str, Any]) -> dict[str, Any]:
    """``${key}`` in texts as the value of that key, once; nothing else is interpolated."""
    plain = {key: str(value) for key, value in flat.items() if isinstance(value, str | int) and "${" not in str(value)}
    for key, value in flat.items():
        if isinstance(value, str) and "${" in value:
            for name, found in plain.items():
                value = value.replace(f"${{{name}}}", found)
            if "${" in value:
                raise ConfigError([f"{key}: {value!r} cannot be resolved here; write the value"])
            flat[key] = value
    return flat


def _carry_loss(carry: Carry) -> bool:
    """Whether the loss compares two answers."""
    path = carry.component("loss")
    options, name = carry.section("loss"), path.rpartition(".")[2]
    if name in tables.PREFERENCE_LOSSES:
        ours, beta = tables.PREFERENCE_LOSSES[name]
        kind = options.get("loss_type")
        defaults = {"beta": 2.0 if ours == "simpo" else 0.1}
        carry.set("loss.name", kind or ours)
        carry.set("loss.beta", options.get(beta, defaults["beta"]))
        if options.get("label_smoothing"):
            carry.set("loss.label_smoothing", options["label_smoothing"])
        if ours == "simpo":
            carry.set("loss.margin", options.get("gamma", 0.5))
        return True
    if name and name not in tables.CROSS_ENTROPIES:
        carry.say("loss", f"{path} is not known; the loss is cross_entropy")
    if options.get("label_smoothing"):
        carry.set("loss", {"label_smoothing": options["label_smoothing"]})
    return False


def _carry_model(carry: Carry) -> None:
    """``model`` and ``adapter``."""
    path = carry.component("model")
    builder, options = path.rpartition(".")[2], carry.section("model")
    method = next((prefix for prefix in ("qlora_", "lora_") if builder.startswith(prefix)), "")
    builder = builder.removeprefix(method)
    hub, _ = tables.MODELS.get(builder, ("", None))
    kind, files = carry.component("checkpointer").rpartition(".")[2], carry.take("checkpointer.checkpoint_files")
    listed = carry.section("checkpointer.checkpoint_files")
    folder = carry.take("checkpointer.checkpoint_dir")
    carry.set("model.path", folder or hub or None)
    if not folder and not hub:
        carry.say("model.path", "missing; give a model directory or hub id")
    elif folder and not Path(str(folder)).is_dir():
        carry.say("model.path", f"{folder} is not here{f'; the hub id of these weights is {hub}' if hub else ''}")
    _say_which_files(carry, kind, str(files or listed.get("filename_format") or ""), str(folder))
    if not hub:
        carry.say("model", f"{path} is not known; the architecture comes from config.json of model.path")
    for key in ("checkpointer.adapter_checkpoint", "checkpointer.recipe_checkpoint", "resume_from_checkpoint"):
        if value := carry.take(key):
            cure = "tt convert FILE.pt DIR --to peft, and set adapter.path" if "adapter" in key else "start a new run"
            carry.say(key, f"{value}: a training state of torchtune cannot be resumed; {cure}")
    dtype = str(carry.take("dtype", "bf16"))
    carry.set("model.dtype", "fp32" if dtype in ("fp32", "float32") else "bf16")
    if dtype not in ("bf16", "bfloat16", "fp32", "float32"):
        carry.say("dtype", f"{dtype} is not trained in here; bf16")
    if method or "lora_rank" in options:
        _carry_adapter(carry, options, builder, quantized=method == "qlora_")
    elif dtype.startswith("bf"):
        carry.say("dtype", "trained weights are fp32 here, and only the forward and backward pass bf16: the result is "
                  "better, and it takes more memory")  # fmt: skip
    _check_reference(carry, folder)
    for key in options:
        if not key.startswith(("lora_", "apply_lora", "use_dora", "quantize_base")):
            carry.say(f"model.{key}", "the architecture comes from config.json of model.path")


def _check_reference(carry: Carry, folder: Any) -> None:
    """The reference of preference tuning is the start, as in torchtune's own configs."""
    carry.component("ref_checkpointer")
    reference = carry.section("ref_checkpointer").get("checkpoint_dir")
    if reference and Path(str(reference)) != Path(str(folder)):
        carry.say("ref_checkpointer.checkpoint_dir", f"{reference}: the reference is always the start of the training")


def _say_which_files(carry: Carry, kind: str, files: str, folder: str) -> None:
    """torchtune names weight files one by one; here a directory has them."""
    if kind == "FullModelMetaCheckpointer" or "consolidated" in files:
        there = f"{folder}-hf"
        carry.say("checkpointer", f"Meta's files: tt convert {folder} {there} --allow-pickle, then model.path={there}")
    elif kind == "FullModelTorchTuneCheckpointer":
        carry.say(
            "checkpointer", f"torchtune's files are converted first: tt convert {folder} {folder}-hf --allow-pickle"
        )
    elif ".bin" in files or ".pt" in files:
        carry.say("checkpointer.checkpoint_files", "pickles are not trained from; download the model's safetensors, or "
                  f"tt convert {folder} {folder}-hf --allow-pickle")  # fmt: skip


def _carry_adapter(carry: Carry, options: dict[str, Any], builder: str, *, quantized: bool) -> None:
    given = options.get("lora_attn_modules") or ["q_proj", "v_proj"]
    modules = [tables.MODULES.get(str(name), str(name)) for name in given]
    modules += tables.MLP * bool(options.get("apply_lora_to_mlp"))
    if builder.startswith(tables.FUSED):
        fused = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj") | dict.fromkeys(
            tables.MLP[:2], "gate_up_proj"
        )
        if {"q_proj", "k_proj", "v_proj"} - set(modules) and {"q_proj", "k_proj", "v_proj"} & set(modules):
            carry.say(
                "model.lora_attn_modules", "q, k and v are one layer in this model's files; all three get the adapter"
            )
        modules = list(dict.fromkeys(fused.get(name, name) for name in modules))
    if options.get("apply_lora_to_output"):
        if builder.startswith(tables.TIED):
            carry.say("model.apply_lora_to_output", "this model's output is its embedding, which gets no adapter")
        else:
            modules.append("lm_head")
    carry.set("adapter", {
        "rank": options.get("lora_rank", 8), "alpha": options.get("lora_alpha", 16),
        "dropout": options.get("lora_dropout", 0.0), "target_modules": modules,
    })  # fmt: skip
    if quantized or options.get("quantize_base"):
        carry.set("adapter.quantize_base", True)
    if options.get("use_dora"):
        carry.set("adapter.use_dora", True)
