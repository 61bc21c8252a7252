"""The model of a job with its weights and adapter, its optimizer, and its objective."""

import functools
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tt_ckpt
import tt_data
import tt_models
import tt_peft
from tt_train.config import DPOConfig, KDConfig, PreferenceSection, RunConfig
from tt_train.devices.distributed import world
from tt_train.devices.sharding import is_sharded, shard_, ways
from tt_train.errors import ConfigError
from tt_train.inputs.model import folder_of, teacher_shape
from tt_train.job import Job
from tt_train.losses.cross_entropy import Objective
from tt_train.losses.table import LOSSES, PREFERENCE_KEYS, REFERENCE_FREE
from tt_train.memory import DTYPES, blocks, checkpoint_activations_, compile_, offload_activations_
from tt_train.optim.master_weights import MasterWeights
from tt_train.optim.optimizers import HIDDEN, decayed, make_optimizer
from tt_train.references.reference import START, Reference, adapter_off, log_probs_of
from tt_train.references.reference_cache import ReferenceCache, reference_facts
from tt_train.settings.registry import losses_of, resolve


def load_model(job: Job[RunConfig]) -> tt_models.Decoder:
    """The model with its weights and, if the config says so, its adapter and its shards; ready to train.

    Trained weights are fp32. With bf16 as ``model.dtype``, ``build_optimizer`` makes those of a full model bf16; those
    of a sharded full model are gathered in bf16.
    """
    torch.manual_seed(job.config.seed)
    config = job.config
    # on meta until it is loaded: a base of 4 bits is quantized tensor by tensor then, and a rank reads its own slices
    model = model_shape(job, device=job.device if job.model_path is None else "meta")
    _speed_and_shard_(model, job)
    if job.model_path is not None:
        tt_ckpt.load_weights(model, job.model_path, dtype=_kept_dtype(job), device=_home(job))
        if job.lora is not None:
            torch.manual_seed(config.seed)
            tt_peft.init_adapter_(model)
    if config.adapter is not None and config.adapter.path is not None:
        tt_peft.load_adapter(model, Path(config.adapter.path))
    if keeps_start(config):
        tt_peft.copy_adapter_(model, START)
    return model.train()


def model_shape(job: Job[RunConfig], *, device: torch.device | str) -> tt_models.Decoder:
    """The model with its adapter, and with what its activations need. On the meta device it has shapes alone."""
    config = job.config
    model = tt_models.build(job.model_config, device=device, dtype=_kept_dtype(job))
    if job.lora is not None:
        _adapt(model, job.lora)
        if keeps_start(config):
            tt_peft.copy_adapter_(model, START)
    if config.activation_checkpointing:
        checkpoint_activations_(model, config.activation_checkpointing)
    if config.activation_offloading and job.device.type != "cpu":
        offload_activations_(model)
    return model


def _kept_dtype(job: Job[RunConfig]) -> torch.dtype:
    return torch.float32 if job.lora is None else job.dtype


def _speed_and_shard_(model: tt_models.Decoder, job: Job[RunConfig]) -> None:
    """Compiled blocks and shards, as the config asks for them."""
    config, (replicate, shard) = job.config, ways(job.config, world().size)
    if config.compile:
        compile_(model)
    if shard > 1:
        tt_peft.spread_nf4_(model)
        shard_(model, device=job.device, replicate=replicate, shard=shard, cpu_offload=config.parallel.cpu_offload,
               compute_dtype=job.dtype if job.lora is None else None,
               reduce_every_micro_batch=config.parallel.reduce_every_micro_batch)  # fmt: skip


def _home(job: Job[RunConfig]) -> torch.device | str:
    """Where weights are kept between steps."""
    sharded = ways(job.config, world().size)[1] > 1
    return "cpu" if sharded and job.config.parallel.cpu_offload else job.device


def load_teacher(job: Job[KDConfig]) -> tt_models.Decoder:
    """The frozen model that ``kd.teacher`` names, whole on every rank."""
    model, section = teacher_shape(job.config), job.config.kd
    assert section.teacher is not None
    folder, dtype = folder_of(section.teacher, key="kd.teacher"), DTYPES[section.teacher_dtype]
    tt_ckpt.load_weights(model, folder, dtype=dtype, device=job.device)
    return model.eval().requires_grad_(False)


def _adapt(model: tt_models.Decoder, lora: tt_peft.LoRAConfig) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # assemble has said them, in one line
        tt_peft.apply_lora_(model, lora)


def keeps_start(config: RunConfig) -> bool:
    """Whether the model that training starts from, which is the reference, is not the base of the adapter."""
    starts_elsewhere = config.adapter is not None and (
        config.adapter.path is not None or config.adapter.init == "loftq"
    )
    return starts_elsewhere and has_reference(config)


def has_reference(config: RunConfig) -> bool:
    """Whether the loss compares with a reference."""
    return isinstance(config.loss, PreferenceSection) and config.loss.name not in REFERENCE_FREE


def build_reference(job: Job[DPOConfig], model: tt_models.Decoder, say: Callable[[str], None]) -> Reference | None:
    """The model that training starts from, before a checkpoint is restored; None if no step needs it: the loss has no
    reference, or its log-probabilities are in the rows, from ``loss.reference_cache``.

    An adapter is switched off, or back to the one that training started from: this needs no second model. A full run
    gets a frozen copy of its model in ``model.dtype``. ``say`` gets a line if what comes takes its time.
    """
    config = job.config
    if not has_reference(config):
        return None
    if config.loss.reference_cache is None:
        return log_probs_of(_frozen_copy(job, model)) if job.lora is None else adapter_off(model)
    adapter = None if config.adapter is None or config.adapter.path is None else Path(config.adapter.path)
    facts = reference_facts(job, job.model_path, adapter=adapter,
                            quantized=config.adapter is not None and config.adapter.quantize_base)  # fmt: skip
    assert not isinstance(job.train, tt_data.Stream)
    datasets = [job.train, *([job.held_out] if job.held_out is not None else [])]
    cache = ReferenceCache(folder=Path(config.loss.reference_cache), datasets=datasets, facts=facts)
    if not cache.load():
        cache.make(model, log_probs_of(model) if job.lora is None else adapter_off(model), job, say)
    return None


@torch.no_grad()
def _frozen_copy(job: Job[RunConfig], model: tt_models.Decoder) -> tt_models.Decoder:
    """Sharded as ``model`` is; its weights are copied, so that they are not read again and equal to the bit."""
    copy = tt_models.build(job.model_config, device="meta", dtype=job.dtype).requires_grad_(False)
    _speed_and_shard_(copy, job)
    copy.to_empty(device=_home(job))
    for own, other in zip([*copy.parameters(), *copy.buffers()], [*model.parameters(), *model.buffers()], strict=True):
        own.copy_(other)
    return copy.eval()


def build_optimizer(job: Job[RunConfig], model: tt_models.Decoder) -> MasterWeights:
    """The optimizer that the config names, over the trained parameters of ``model``."""
    narrow = job.lora is None and job.dtype == torch.bfloat16 and not is_sharded(model)
    groups = trainable_groups(job, model)
    in_backward = job.config.optimizer_in_backward
    return make_optimizer(groups, job.config.optimizer, narrow=narrow, in_backward=in_backward)


def trainable_groups(job: Job[RunConfig], model: tt_models.Decoder) -> list[dict[str, Any]]:
    """The trained parameters: matrices and vectors, or LoRA+'s groups with their share of the learning rate."""
    section, adapter = job.config.optimizer, job.config.adapter
    if adapter is None or adapter.lora_plus_ratio == 1.0:
        groups = decayed(parameter for parameter in model.parameters() if parameter.requires_grad)
    else:
        groups = tt_peft.lora_plus_groups(
            model, lr=section.lr, ratio=adapter.lora_plus_ratio, weight_decay=section.weight_decay
        )
        groups = [{**group, "lr_scale": group["lr"] / section.lr} for group in groups]
    if section.name != "muon":
        return groups
    hidden = {id(parameter) for parameter in blocks(model).parameters() if parameter.dim() == 2}
    if not any(id(parameter) in hidden for group in groups for parameter in group["params"]):
        raise ConfigError(
            ["optimizer.name: muon is for matrices of blocks, and no matrix of a block trains; use adamw"]
        )
    return [{**group, "params": part, HIDDEN: is_hidden} for group in groups for is_hidden in (True, False)
            if (part := [each for each in group["params"] if (id(each) in hidden) == is_hidden])]  # fmt: skip


def make_objective(config: RunConfig) -> Objective:
    """The loss that the config names."""
    objective = resolve(config.loss.name, LOSSES)
    options = {"label_smoothing": config.loss.label_smoothing} if config.loss.label_smoothing else {}
    found: Objective = functools.partial(objective, **options) if options else objective
    return found


def preference_loss(loss: PreferenceSection) -> Callable[..., Tensor]:
    """The function of ``Pairs`` (of ``Judged`` answers for kto) that the config names, with its keys."""
    function = resolve(loss.name, losses_of(loss))
    accepted = inspect.signature(function).parameters
    options = {key: getattr(loss, key) for key in PREFERENCE_KEYS if key in accepted}
    return functools.partial(function, beta=loss.beta, **options)
