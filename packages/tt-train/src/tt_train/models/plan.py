"""What a run will need: parameters, memory by part, steps and time, from its config and its rows. No weights load."""

import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

import tt_data
import tt_models
from tt_models.limits import weight_bytes
from tt_train.build import (
    build_optimizer,
    build_reference,
    has_reference,
    load_model,
    load_teacher,
    make_objective,
    model_shape,
    preference_loss,
)
from tt_train.config import DPOConfig, KDConfig, PreferenceSection, RunConfig
from tt_train.devices.sharding import ways
from tt_train.errors import ConfigError
from tt_train.inputs.components import parallel_mistakes
from tt_train.inputs.model import check_adapter, teacher_shape
from tt_train.inputs.rows import Kind
from tt_train.job import Job
from tt_train.losses.answers import judged_objective, pair_objective
from tt_train.losses.cross_entropy import Batch, Objective
from tt_train.losses.distill import distillation
from tt_train.memory import DTYPES, blocks, peak_memory_gib
from tt_train.models.trace import Peak, trace_step
from tt_train.optim.master_weights import scratch_bytes
from tt_train.optim.optimizers import make_optimizer
from tt_train.optim.state import state_bytes
from tt_train.references.reference import Reference, adapter_off, log_probs_of, prepared
from tt_train.settings.keys.mistakes import world_mistakes
from tt_train.settings.registry import OPTIMIZERS
from tt_train.step import train_step

Prepare = Callable[[Sequence[Batch]], Sequence[Batch]]
SAMPLED = 50  # steps whose rows are looked at, to find the longest
MOST_ROWS = 1024  # of a micro-batch that is looked for
# what may lower the peak: the words to add to the config, and when they can be added
_SWITCHES: tuple[tuple[str, Callable[[RunConfig], bool]], ...] = (
    ("activation_checkpointing=true", lambda config: not config.activation_checkpointing),
    ("micro_batch_size=1", lambda config: config.micro_batch_size > 1),
    ("optimizer.name=adamw8bit", lambda config: config.optimizer.name in ("adamw", "adam")),
    ("model.dtype=bf16", lambda config: config.model.dtype == "fp32"),
    ("adapter.rank=8", lambda config: config.adapter is None),
    ("adapter.quantize_base=true", lambda config: config.adapter is not None and not config.adapter.quantize_base),
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run needs on each of ``ranks`` processes. Memory is in bytes, beyond what the program itself takes.

    batch: rows and tokens of the largest micro-batch in the steps that were looked at. tokens: of a step over all
    ranks, padding included. flops: floating-point operations of a step over all ranks.
    """

    parameters: int
    trained: int
    ranks: int
    peak: Peak
    batch: tuple[int, int]
    steps: int
    tokens: float
    flops: float


def plan(job: Job[RunConfig], *, ranks: int = 1, cpu: bool | None = None) -> Plan:
    """Trace the largest micro-batch of the run. ``cpu``: plan for a CPU or a GPU; by default for the job's device.

    Raises:
        ConfigError: the batch does not divide by the ranks.
    """
    config = job.config
    if problems := [*world_mistakes(config, ranks), *parallel_mistakes(config, ranks)]:
        raise ConfigError(problems)
    batch, tokens = _largest(job, config.micro_batch_size)
    peak, model = _trace(job, batch, config.batch_size // (config.micro_batch_size * ranks), ranks=ranks, cpu=cpu)
    every = list(model.parameters())
    flops = peak.flops * tokens / batch["input_ids"].numel()
    rows, length = batch["input_ids"].shape
    return Plan(
        parameters=sum(p.numel() for p in every), trained=sum(p.numel() for p in every if p.requires_grad), ranks=ranks,
        peak=peak, batch=(rows, length), steps=job.steps_total, tokens=tokens, flops=flops,
    )  # fmt: skip


def _trace(job: Job[RunConfig], batch: Batch, passes: int, *, ranks: int, cpu: bool | None) -> tuple[Peak, nn.Module]:
    """The peak on one of the ranks, each of which makes so many passes in a step."""
    config = job.config
    cpu = job.device.type == "cpu" if cpu is None else cpu
    model = model_shape(job, device="meta").train()
    objective, prepare, frozen = _work(job, model, loads=False)
    peak = trace_step(
        model, batch, objective, accumulates=passes > 1, prepare=prepare, frozen=frozen,
        narrow=job.lora is None and job.dtype == torch.bfloat16, state_bytes=_state_bytes(config),
        drops_gradients=config.optimizer_in_backward, cpu=cpu,
        scratch=partial(scratch_bytes, together=config.optimizer.name not in OPTIMIZERS),
    )  # fmt: skip
    shard = ways(config, ranks)[1]
    if shard > 1:
        sharded = _sharded(peak.parts, model, frozen, shard, whole_gradients=passes > 1, config=config, cpu=cpu)
        peak = replace(peak, parts=sharded)
    return peak, model


def _work(
    job: Job[RunConfig], model: tt_models.Decoder, *, loads: bool
) -> tuple[Objective, Prepare, list[tt_models.Decoder]]:
    """The objective of the recipe, what it does to the micro-batches first, and the frozen models that both need.

    loads: those models have their weights; else they are on the meta device.
    """
    config = job.config
    if isinstance(config, KDConfig):
        teacher = load_teacher(cast(Job[KDConfig], job)) if loads else teacher_shape(config)
        return partial(distillation, teacher=teacher), list, [teacher]
    if not isinstance(config.loss, PreferenceSection):
        return make_objective(config), list, []
    objective: Objective = partial(
        judged_objective if config.loss.name == "kto" else pair_objective,
        loss=preference_loss(config.loss), beta=config.loss.beta, sft_weight=config.loss.sft_weight,
    )  # fmt: skip
    frozen: list[tt_models.Decoder] = []
    if not has_reference(config) or config.loss.reference_cache is not None:
        reference: Reference | None = _zeros
    elif loads:
        reference = build_reference(cast(Job[DPOConfig], job), model, lambda _: None)
    elif job.lora is not None:
        reference = adapter_off(model)
    else:
        frozen = [tt_models.build(job.model_config, device="meta", dtype=job.dtype).requires_grad_(False)]
        reference = log_probs_of(frozen[0])
    return objective, partial(prepared, model=model, loss=config.loss, reference=reference), frozen


def _zeros(batch: Batch, side: str = "") -> Tensor:
    """What a cache would give, as far as memory is concerned."""
    return torch.zeros(int(batch[f"{side}answer_ids"].max()) + 1)


def _state_bytes(config: RunConfig) -> float:
    """What the optimizer keeps for each trained weight."""
    probe = nn.Parameter(torch.zeros(256, 256))
    return state_bytes(make_optimizer([{"params": [probe]}], config.optimizer)) / probe.numel()


def _largest(job: Job[RunConfig], micro_batch_size: int) -> tuple[Batch, float]:
    """The largest micro-batch in the first steps of the run, and the mean number of tokens of a step."""
    largest: Batch | None = None
    tokens, looked_at = 0, min(SAMPLED, job.steps_total)
    steps = _steps(job, micro_batch_size)
    for _ in range(looked_at):
        for batch in next(steps):
            tokens += batch["input_ids"].numel()
            if largest is None or batch["input_ids"].numel() > largest["input_ids"].numel():
                largest = batch
    assert largest is not None
    return largest, tokens / looked_at


def _steps(job: Job[RunConfig], micro_batch_size: int) -> Iterator[list[Batch]]:
    config = job.config
    return tt_data.batches(
        job.train, batch_size=max(config.batch_size, micro_batch_size), micro_batch_size=micro_batch_size,
        seed=config.seed, shuffle=config.data.shuffle, pad_id=job.tokenizer.pad_id,
    )  # fmt: skip


def _sharded(
    parts: dict[str, int],
    model: nn.Module,
    others: Sequence[nn.Module],
    shard: int,
    *,
    whole_gradients: bool,
    config: RunConfig,
    cpu: bool,
) -> dict[str, int]:
    """The parts on one of ``shard`` ranks: a share of every weight, and what is gathered at a time. A teacher is whole
    on each; what is outside the blocks of a sharded copy stays gathered after its forward pass."""
    every = {p for p in model.parameters() if p.requires_grad}
    trained = sum(p.numel() for p in every)
    gathered = {id(p): p.nbytes for p in model.parameters()}
    block = max(sum(gathered[id(p)] for p in one.parameters()) for one in blocks(model))
    in_blocks = {id(p) for one in blocks(model) for p in one.parameters()}
    root = sum(size for one, size in gathered.items() if one not in in_blocks)
    frozen = parts["weights"] - sum(p.nbytes for p in every)
    reduced = {id(p): 4 * p.numel() for p in every}  # gradients travel in fp32
    largest = max(sum(reduced.get(id(p), 0) for p in one.parameters()) for one in blocks(model))
    outside = sum(size for one, size in reduced.items() if one not in in_blocks)
    accumulated = whole_gradients and not config.parallel.reduce_every_micro_batch
    whole = sum(map(weight_bytes, others))
    if isinstance(config, KDConfig):
        frozen -= whole
    else:
        inside = sum(weight_bytes(one) for other in others for one in blocks(other))
        root, whole = root + whole - inside, 0
    kept = 0 if config.parallel.cpu_offload and not cpu else 1  # shards are in the memory of the machine
    return {
        **parts,
        "weights": kept * (frozen + 4 * trained) // shard + whole + 2 * block + root,
        "gradients": kept * 4 * trained // shard + (4 * trained if accumulated else largest + outside),
        "optimizer": kept * round(parts["optimizer"] / shard),
    }


def largest_micro_batch(job: Job[RunConfig], memory: int, *, ranks: int = 1, cpu: bool | None = None) -> int:
    """The largest ``micro_batch_size`` whose peak fits into ``memory`` bytes of each rank; 0 if not even 1 does.

    Unless the optimizer runs in the backward, gradients of an earlier micro-batch of the step are there.
    """
    passes = 1 if job.config.optimizer_in_backward else 2

    def peak_of(size: int) -> int:
        other = with_config(job, replace(job.config, micro_batch_size=size, batch_size=size))
        return _trace(job, _largest(other, size)[0], passes, ranks=ranks, cpu=cpu)[0].total

    first, second = peak_of(1), peak_of(2)
    if first > memory:
        return 0
    most = min(MOST_ROWS, 1 + int((memory - first) / max(1, second - first)))  # rows differ, so this is a guess
    step = max(1, most // 16)
    while most > 1 and peak_of(most) > memory:
        most = max(1, most - step)
    while most + step <= MOST_ROWS and peak_of(most + step) <= memory:
        most += step
    return most


def with_config(job: Job[RunConfig], config: RunConfig) -> Job[RunConfig]:
    """The job with another config, of the same model and rows."""
    lora = check_adapter(config, job.model_config, job.device, [], processes=None)
    return replace(job, config=config, lora=lora, dtype=DTYPES[config.model.dtype])


def kind_of(config: RunConfig) -> Kind:
    """The kind of rows that the recipe trains on."""
    if not isinstance(config.loss, PreferenceSection):
        return "single"
    return "judged" if config.loss.name == "kto" else "pair"


def switches(config: RunConfig) -> list[str]:
    """The words that may lower the peak of a run with this config, and have not been used."""
    return [word for word, can in _SWITCHES if can(config)]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Seconds and tokens of a step, and the growth of the peak memory in bytes."""

    seconds: float
    tokens: float
    growth: int


def _in_use(device: torch.device) -> int:
    """Bytes on the device, or resident in this process on a CPU; where no system says that, the peak so far."""
    if device.type != "cpu":
        return torch.accelerator.memory_allocated(device)
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return round(peak_memory_gib(device) * 2**30)
    return int(statm.read_text().split()[1]) * resource.getpagesize()


def measure(job: Job[RunConfig], *, steps: int = 3) -> Measured:
    """Load the model and make ``steps`` steps, which nothing keeps. The first one is not counted for the time."""
    before = _in_use(job.device)
    model = load_model(job)
    optimizer = build_optimizer(job, model)
    (objective, prepare, _), batches = _work(job, model, loads=True), _steps(job, job.config.micro_batch_size)
    seconds: list[float] = []
    tokens: list[int] = []
    for _ in range(max(2, steps)):
        began = time.perf_counter()
        micro = [{key: value.to(job.device) for key, value in batch.items()} for batch in next(batches)]
        train_step(model, prepare(micro), objective, optimizer, max_grad_norm=job.config.max_grad_norm)
        seconds.append(time.perf_counter() - began)
        tokens.append(sum(batch["input_ids"].numel() for batch in micro))
    growth = round(peak_memory_gib(job.device) * 2**30) - before
    return Measured(seconds=sum(seconds[1:]) / (len(seconds) - 1), tokens=sum(tokens[1:]) / (len(tokens) - 1),
                    growth=growth)  # fmt: skip
