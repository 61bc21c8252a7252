"""What a run is made of: dataclasses whose fields are the keys of a YAML file, and checks that need no other file."""

import math
import re
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import yaml

from tt_train.composing import compose
from tt_train.errors import did_you_mean
from tt_train.redact import redact_data
from tt_train.values import TEXT, TEXT_OR_NUMBER

__all__ = ["AdapterSection", "DataSection", "LossSection", "ModelSection", "OptimizerSection", "RunConfig", "SFTConfig",
           "SamplesSection", "ScheduleSection", "compose", "missing", "mistakes", "to_dict", "to_yaml"]  # fmt: skip


@dataclass
class ModelSection:
    """``path``: directory, run directory or hub id. ``name`` alone: random weights, with ``tokenizer`` from a path."""

    path: str | None = None
    name: str | None = None
    tokenizer: str | None = None  # where it differs from path
    dtype: str = "bf16"  # of the forward and backward pass: bf16 | fp32; what trains is fp32


@dataclass
class AdapterSection:
    """Absent: full fine-tune. The fields are those of tt_peft.LoRAConfig."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: Annotated[Any, TEXT] = field(default_factory=lambda: ["q_proj", "v_proj"])  # names, or all-linear
    quantize_base: bool = False
    use_dora: bool = False
    use_rslora: bool = False
    exclude_modules: list[str] = field(default_factory=list)
    target_parameters: list[str] = field(default_factory=list)  # stacked expert weights
    modules_to_save: list[str] = field(default_factory=list)  # trained in full beside the adapter
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    init: str = "kaiming"  # kaiming | gaussian | pissa | loftq
    lora_plus_ratio: float = 1.0  # B learns this much faster than A
    dtype: str = "fp32"  # of the adapter's files and forward pass: fp32 | bf16; what trains is fp32
    path: str | None = None  # start from this adapter


@dataclass
class DataSection:
    """Rows to train on, rows held out, and how they become tokens."""

    train: Annotated[Any, TEXT] = None  # file, list of files, directory, hub id, registered name, or {source: weight}
    eval: Annotated[Any, TEXT_OR_NUMBER] = None  # the same, or a fraction of train such as 0.05
    columns: dict[str, str] = field(default_factory=dict)
    max_seq_len: int = 2048
    packing: bool = False
    streaming: bool = False  # read while training; needs max_steps
    train_on: str = "assistant"  # assistant | last | all
    template: str | None = None  # the model's own; or a registered name
    schema: str | None = None  # alpaca, openai, preference, ...: where the columns fit several
    split: str | None = None
    data_dir: str | None = None  # a folder of train, as datasets.load_dataset takes it
    data_files: Annotated[Any, TEXT] = None  # names or patterns in train
    revision: str | None = None  # of train on the hub
    on_bad_row: str = "drop"  # drop | error
    max_dropped_share: float = 0.1  # of the rows: more that cannot be used stop the run
    drop_duplicates: bool = True  # of rows that are the same, keep one; a file that is given twice counts twice
    special_tokens: str = "text"  # text | tokens: what </s> and its like become when they are typed in rows
    num_workers: int = 0  # processes that encode and collate
    worker_timeout_s: float = 300.0  # a process that prepares no batch for so long ends the run
    cache_dir: str | None = None  # keep token rows there, so that the next run need not make them
    shuffle: bool = True


@dataclass
class LossSection:
    """A registered loss, or with --allow-import the dotted path of a function ``(model, batch) -> (sum, count)``."""

    name: str = "cross_entropy"
    label_smoothing: float = 0.0


@dataclass
class OptimizerSection:
    """A registered optimizer of torch.optim, or with --allow-import the dotted path of a class."""

    name: str = "adamw"
    lr: float = 2e-4
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.0  # sgd only


@dataclass
class ScheduleSection:
    """The learning rate over the run; the rules are those of transformers' schedulers, but step 1 is not at rate 0."""

    name: str = "cosine"  # cosine | linear | constant
    warmup_steps: int | None = None  # steps before the full rate; 0: none
    warmup_ratio: float | None = None  # the same as a share of the run, instead of steps; neither: 0.03
    min_lr_ratio: float = 0.0  # where cosine and linear end, as a share of lr


@dataclass
class SamplesSection:
    """Prompts from the rows, answered by the model at every evaluation and at the end, into samples.jsonl."""

    num: int = 3
    max_new_tokens: int = 64


@dataclass
class RunConfig:
    """What every recipe has. The ``Config`` of a recipe of one's own extends it: a field is a key."""

    ROWS = "single"  # no key, but what the recipe trains: single | pair (chosen and rejected) | judged

    recipe: str = "sft"
    recipe_sha256: str | None = None  # of a recipe file: the text that the config was run by
    model: ModelSection = field(default_factory=ModelSection)
    adapter: AdapterSection | None = None
    data: DataSection = field(default_factory=DataSection)
    loss: LossSection = field(default_factory=LossSection)
    batch_size: int = 16
    micro_batch_size: int = 2
    epochs: int = 1
    max_steps: int | None = None
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    max_grad_norm: float | None = 1.0
    eval_every: int | None = None
    early_stop_after: int | None = None  # evaluations in a row without a lower held-out loss
    save_every: int | None = None
    save_async: bool = False  # write checkpoints while training continues, from a copy in memory
    save_last: bool = True  # a checkpoint after the last step, from which a longer run continues
    keep_last: int = 2
    samples: SamplesSection = field(default_factory=SamplesSection)
    activation_checkpointing: bool = False
    on_nonfinite: str = "stop"  # stop | skip
    compile: bool = False
    device: str = "auto"
    seed: int = 0
    output_dir: str | None = None
    loggers: list[str] = field(default_factory=list)


@dataclass
class SFTConfig(RunConfig):
    """Supervised fine-tuning, full or with an adapter."""


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The config as plain containers, ready for YAML or JSON."""
    plain = asdict(config)
    plain["optimizer"]["betas"] = list(plain["optimizer"]["betas"])
    if plain["recipe_sha256"] is None:  # only a recipe file has one
        del plain["recipe_sha256"]
    return plain


def to_yaml(config: RunConfig) -> str:
    """The config as YAML that ``compose`` reads back to an equal one; a secret in it is blanked."""
    return yaml.safe_dump(redact_data(to_dict(config)), sort_keys=False, allow_unicode=True)


_CHOICES = {
    "model.dtype": ("bf16", "fp32"),
    "adapter.dtype": ("bf16", "fp32"),
    "data.train_on": ("assistant", "last", "all"),
    "data.on_bad_row": ("drop", "error"),
    "data.special_tokens": ("text", "tokens"),
    "schedule.name": ("cosine", "linear", "constant"),
    "on_nonfinite": ("stop", "skip"),
}
# what other tools call these values
_ELSEWHERE = {"bfloat16": "bf16", "bfloat": "bf16", "auto": "bf16", "float32": "fp32", "float": "fp32", "full": "fp32",
              "constant_with_warmup": "constant", "cosine_with_min_lr": "cosine", "completion": "assistant",
              "true": "all", "input": "all", "inputs": "all"}  # fmt: skip
_AT_LEAST = {
    "batch_size": 1, "micro_batch_size": 1, "epochs": 1, "max_steps": 1, "eval_every": 1, "early_stop_after": 1,
    "save_every": 1, "keep_last": 2, "data.max_seq_len": 2, "data.num_workers": 0, "schedule.warmup_steps": 0,
    "samples.num": 0, "samples.max_new_tokens": 1, "adapter.rank": 1, "optimizer.weight_decay": 0,
    "optimizer.momentum": 0, "seed": 0, "optimizer.eps": 0,
}  # fmt: skip


def _look_up(plain: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        plain = plain.get(part) or {} if part != key.rsplit(".", 1)[-1] else plain.get(part)  # type: ignore[assignment]
    return plain


def mistakes(config: RunConfig) -> list[str]:
    """Values that cannot be meant, one line each; what needs files is checked by tt_train.validate."""
    plain = to_dict(config)
    found = []
    for key, known in _CHOICES.items():
        value = _look_up(plain, key)
        if key == "model.dtype" and value in ("fp16", "float16", "half"):
            found.append("model.dtype: fp16 overflows in training (its largest number is 65,504); use bf16 or fp32")
        elif value is not None and value not in known:
            hint = did_you_mean(_ELSEWHERE.get(value, value), known)
            found.append(f"{key}: expected one of {', '.join(known)}, got {value!r}{hint}")
    if infinite := _not_finite(plain):
        return found + infinite
    for key, least in _AT_LEAST.items():
        value = _look_up(plain, key)
        if value is not None and value < least:
            unset = "; null is what -1 is elsewhere" if key == "max_steps" and value == -1 else ""
            found.append(f"{key}: must be at least {least}, got {value}{unset}")
    found += _number_mistakes(config)
    steps, ratio = config.schedule.warmup_steps, config.schedule.warmup_ratio
    if steps is not None and ratio is not None:
        found.append(f"schedule: warmup_steps {steps} and warmup_ratio {ratio} are both given; set one of them to null")
    if config.data.train is not None and not config.data.train:
        found.append("data.train: names no source; give a file of rows: data.train=rows.jsonl")
    for name, weight in config.data.train.items() if isinstance(config.data.train, dict) else ():
        if not isinstance(weight, int | float) or isinstance(weight, bool) or not weight > 0:
            found.append(f"data.train: the weight of {name!r} must be a positive number, got {weight!r}")
    if re.fullmatch(r"[\d.]+ *%", str(config.data.eval)):
        found.append(f"data.eval: a share is written 0.05, not {config.data.eval!r}")
    if config.adapter is not None and config.adapter.target_modules in ("all_linear", "all", "linear"):
        found.append(f"adapter.target_modules: did you mean 'all-linear', not {config.adapter.target_modules!r}?")
    if config.data.streaming and isinstance(config.data.eval, float):
        found.append("data.eval: a share of a stream cannot be held out; give a file of its own")
    return found


def missing(config: RunConfig) -> list[str]:
    """What a run needs and the config does not say, one line each."""
    found = []
    if config.model.path is None and config.model.name is None:
        found.append("model.path: missing; give a model directory or hub id: model.path=DIR")
    if config.model.path is None and config.model.name is not None and config.model.tokenizer is None:
        found.append(
            "model.tokenizer: missing; model.name alone has random weights and no tokenizer: model.tokenizer=DIR"
        )
    if config.data.streaming and config.max_steps is None:
        found.append("max_steps: missing; data.streaming reads without knowing how many rows there are: max_steps=1000")
    if config.data.train is None:
        found.append("data.train: missing; give a file of rows: data.train=rows.jsonl")
    return found


def _not_finite(value: Any, key: str = "") -> list[str]:
    """A line for each number anywhere in a config, a recipe's own keys included, that cannot be computed with."""
    if isinstance(value, dict):
        return [line for name, inner in value.items() for line in _not_finite(inner, f"{key}.{name}".lstrip("."))]
    if isinstance(value, list | tuple):
        return [line for inner in value for line in _not_finite(inner, key)]
    if isinstance(value, float) and not math.isfinite(value):
        return [f"{key}: must be a finite number, got {value}"]
    return []


def _number_mistakes(config: RunConfig) -> list[str]:
    found = []
    if not config.optimizer.lr > 0:
        found.append(f"optimizer.lr: must be positive, got {config.optimizer.lr}")
    if not config.data.worker_timeout_s > 0:
        found.append(f"data.worker_timeout_s: must be positive, got {config.data.worker_timeout_s}")
    if config.max_grad_norm is not None and not config.max_grad_norm > 0:
        found.append(f"max_grad_norm: must be positive, or null for no clipping, got {config.max_grad_norm}")
    if config.seed >= 2**64:
        found.append(f"seed: must be below 2^64, torch's range, got {config.seed}")
    if config.adapter is not None and not config.adapter.lora_plus_ratio > 0:
        found.append(f"adapter.lora_plus_ratio: must be positive, got {config.adapter.lora_plus_ratio}")
    shares = {
        "loss.label_smoothing": config.loss.label_smoothing,
        "schedule.min_lr_ratio": config.schedule.min_lr_ratio,
        "schedule.warmup_ratio": config.schedule.warmup_ratio or 0.0,
    }
    if config.adapter is not None:
        shares["adapter.dropout"] = config.adapter.dropout
    for key, value in [*shares.items(), *(("optimizer.betas", beta) for beta in config.optimizer.betas)]:
        if not 0 <= value < 1:
            found.append(f"{key}: must be at least 0 and below 1, got {value}")
    if not 0 <= config.data.max_dropped_share <= 1:
        found.append(f"data.max_dropped_share: must be between 0 and 1, got {config.data.max_dropped_share}")
    batch, micro = config.batch_size, config.micro_batch_size
    if batch >= 1 and micro >= 1 and batch % micro:
        lower, upper = batch // micro * micro, (batch // micro + 1) * micro
        near = " or ".join(str(value) for value in (lower, upper) if value)
        lowered = f"; or set micro_batch_size={batch}" if batch < micro else ""
        found.append(
            f"batch_size: {batch} is not a multiple of micro_batch_size {micro}; nearest that are: {near}{lowered}"
        )
    return found
