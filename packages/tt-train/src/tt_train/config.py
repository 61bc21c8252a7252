"""What a run is made of: dataclasses whose fields are the keys of a YAML file, and checks that need no other file."""

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import yaml

from tt_ckpt.redaction import redact_data

# of Annotated[Any, ...]: what such a key takes, alone, as a list, or as the names of a mapping of numbers; a key that
# takes numbers also takes a mapping of names to sources
TEXT, TEXT_OR_NUMBER = "text", "text or number"
OPTIONS = "options"  # of Annotated[Any, ...]: a list of names, or names with their options: {wandb: {project: p}}


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
    eval: Annotated[Any, TEXT_OR_NUMBER] = None  # the same, a fraction of train such as 0.05, or {name: source}
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
    num_workers: int = 0  # processes that encode and collate; 0: spare cores encode rows after the first 8,192
    worker_timeout_s: float = 300.0  # a process that prepares no batch for so long ends the run
    cache_dir: str | None = None  # keep token rows there, so that the next run need not make them
    shuffle: bool = True


@dataclass
class LossSection:
    """A registered loss, or with --allow-import the dotted path of a function ``(model, batch) -> Summed``."""

    name: str = "cross_entropy"
    label_smoothing: float = 0.0


@dataclass
class PreferenceSection(LossSection):
    """A registered preference loss, or with --allow-import the dotted path of a function ``(Pairs, *, beta, ...)``.

    Keys that a loss does not have are refused: docs/preference.md has a table.
    """

    name: str = "sigmoid"
    beta: float = 0.1  # how far the policy may go from the reference: less with a larger beta
    margin: float = 0.0  # simpo only, its gamma: by how much beta times the mean log-probabilities must differ
    sft_weight: float = 0.0  # of the chosen answers' cross entropy, which is added
    desirable_weight: float = 1.0  # kto only
    undesirable_weight: float = 1.0  # kto only
    reference_cache: str | None = None  # folder: log-probabilities of the reference are computed once and kept there


@dataclass
class QuantizationSection:
    """How the weights will be stored, and so how the linear layers of the blocks compute while they train."""

    weights: str = "int4"  # int4 | int8
    group_size: int | None = 32  # weights of a row that share a scale; null: all of a row
    activations: str | None = None  # int8: inputs are rounded too, for each token; null: they are not


@dataclass
class DistillationSection:
    """The model to learn from, and how."""

    teacher: str | None = None  # directory, run directory or hub id, of the same tokenizer
    teacher_dtype: str = "bf16"  # bf16 | fp32
    divergence: str = "forward"  # forward: KL(teacher || student) | reverse: KL(student || teacher)
    temperature: float = 1.0  # of both distributions
    cross_entropy_weight: float = 0.5  # of the plain loss; the divergence has the rest


@dataclass
class OptimizerSection:
    """A registered optimizer of torch.optim or torchao.optim, or with --allow-import the dotted path of a class."""

    name: str = "adamw"
    lr: float = 2e-4
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.0  # sgd, rmsprop and muon, where 0 means 0.95
    options: dict[str, Any] = field(default_factory=dict)  # further arguments of the class, such as {amsgrad: true}


@dataclass
class ScheduleSection:
    """The learning rate over the run; the rules are those of transformers' schedulers, but step 1 is not at rate 0."""

    name: str = "cosine"  # cosine | linear | constant | wsd: constant, and a decay over the last steps
    warmup_steps: int | None = None  # steps before the full rate; 0: none
    warmup_ratio: float | None = None  # the same as a share of the run, instead of steps; neither: 0.03
    min_lr_ratio: float = 0.0  # where cosine, linear and wsd end, as a share of lr
    num_cycles: float = 0.5  # of cosine: waves until the end; 0.5 falls once
    decay: str = "cosine"  # of wsd: cosine | linear | 1-sqrt
    decay_steps: int | None = None  # of wsd
    decay_ratio: float | None = None  # the same as a share of the run, instead of steps; neither: 0.1


@dataclass
class ParallelSection:
    """How the weights are kept on many devices. One process ignores this section.

    ``replicate`` x ``shard`` is the number of processes. A full fine-tune shards over all of them unless a number says
    otherwise; with an adapter every process keeps the whole frozen base, so that nothing has to be gathered.
    """

    shard: int | None = None  # processes that share one copy of the weights, gradients and optimizer state
    replicate: int | None = None  # such groups, each with a copy of its own
    cpu_offload: bool = False  # shards stay in CPU memory; the optimizer works there
    reduce_every_micro_batch: bool = False  # less memory with accumulation: gradients are never whole; more traffic


@dataclass
class SamplesSection:
    """Prompts from the rows, answered by the model at every evaluation and at the end, into samples.jsonl."""

    num: int = 3
    max_new_tokens: int = 64
    exact_match: int = 0  # held-out rows, of each named set, whose answers are compared at every evaluation


@dataclass
class ProfileSection:
    """Absent: no profile. A Chrome trace of some steps and, on CUDA, a memory snapshot, in ``profile/`` of the run."""

    first_step: int = 5  # the step before it warms the profiler up
    num_steps: int = 2
    record_shapes: bool = True
    with_stack: bool = False  # where in the Python code an operation was called
    memory: bool = True  # allocations in the trace; on CUDA also a snapshot for pytorch.org/memory_viz


@dataclass
class RunConfig:
    """The keys of every recipe. The ``Config`` of your own recipe extends it: each field is a key."""

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
    max_grad_norm_of: str = "model"  # model | parameter: of all gradients together, or of each parameter's
    eval_every: int | None = None
    early_stop_after: int | None = None  # evaluations in a row without a lower held-out loss
    save_every: int | None = None
    save_async: bool = False  # write checkpoints while training continues, from a copy in memory
    save_last: bool = True  # a checkpoint after the last step, from which a longer run continues
    keep_last: int = 2
    samples: SamplesSection = field(default_factory=SamplesSection)
    activation_checkpointing: Any = False  # false | true or full | selective | n: every n-th block
    activation_offloading: bool = False  # keep what the backward pass needs in CPU memory
    optimizer_in_backward: bool = False  # update each parameter, and free its gradient, during the backward pass
    parallel: ParallelSection = field(default_factory=ParallelSection)
    on_nonfinite: str = "stop"  # stop | skip
    process_group_timeout_s: float = 600.0  # of several processes: one that the others wait for so long ends the run
    compile: bool = False
    device: str = "auto"
    seed: int = 0
    output_dir: str | None = None
    log_every: int = 1  # steps: of these steps the figures are written, and of evaluations and the last step
    profile: ProfileSection | None = None
    loggers: Annotated[Any, OPTIONS] = field(default_factory=list)  # names, or names with options


@dataclass
class SFTConfig(RunConfig):
    """Supervised fine-tuning, full or with an adapter."""


@dataclass
class DPOConfig(RunConfig):
    """Preference tuning. ``batch_size`` counts pairs, or judged answers for kto."""

    loss: PreferenceSection = field(default_factory=PreferenceSection)


@dataclass
class KDConfig(RunConfig):
    """Distillation: a student (``model``) follows the distribution of a frozen teacher."""

    kd: DistillationSection = field(default_factory=DistillationSection)


@dataclass
class QATConfig(RunConfig):
    """Supervised fine-tuning of a model that computes with the weights as they will be stored."""

    quantization: QuantizationSection = field(default_factory=QuantizationSection)


SCHEMAS: dict[str, type[RunConfig]] = {
    "sft": SFTConfig,
    "dpo": DPOConfig,
    "kd": KDConfig,
    "qat": QATConfig,
}  # by recipe


def named_sets(source: object) -> dict[str, Any]:
    """The sets of held-out rows that ``data.eval`` names, as ``{news: a.jsonl}`` does; {} if it names none.

    ``{a.jsonl: 0.7}`` is a mix by weights: its values are numbers.
    """
    return source if isinstance(source, dict) and any(isinstance(each, str | list) for each in source.values()) else {}


def method_of(config: RunConfig) -> str:
    """``full``, ``lora``, ``qlora`` or ``dora``."""
    adapter = config.adapter
    if adapter is None:
        return "full"
    return "qlora" if adapter.quantize_base else "dora" if adapter.use_dora else "lora"


def logger_options(config: RunConfig) -> dict[str, dict[str, Any]]:
    """The loggers of a config by name, each with its options; both forms of ``loggers`` give the same."""
    if isinstance(config.loggers, dict):
        return {name: dict(options or {}) for name, options in config.loggers.items()}
    return {name: {} for name in config.loggers or ()}


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
