"""The model of a job with its weights and adapter, its optimizer, and its objective."""

import functools
import warnings
from pathlib import Path
from typing import Any

import torch

import tt_ckpt
import tt_models
import tt_peft
from tt_train.config import RunConfig
from tt_train.distributed import world
from tt_train.job import Job
from tt_train.losses import Objective
from tt_train.memory import checkpoint_activations_, compile_
from tt_train.optim import MasterWeights, decayed, make_optimizer
from tt_train.registry import LOSSES, resolve
from tt_train.sharding import is_sharded, shard_, ways


def load_model(job: Job[RunConfig]) -> tt_models.Decoder:
    """The model with its weights and, if the config says so, its adapter and its shards; ready to train.

    Trained weights are fp32. With bf16 as ``model.dtype``, ``build_optimizer`` makes those of a full model bf16; those
    of a sharded full model are gathered in bf16.
    """
    torch.manual_seed(job.config.seed)
    config, (replicate, shard) = job.config, ways(job.config, world().size)
    dtype = torch.float32 if job.lora is None else job.dtype
    # on meta until it is loaded: a base of 4 bits is quantized tensor by tensor then, and a rank reads its own slices
    model = tt_models.build(job.model_config, device=job.device if job.model_path is None else "meta", dtype=dtype)
    if job.lora is not None:
        _adapt(model, job.lora)
    if config.activation_checkpointing:
        checkpoint_activations_(model)
    if config.compile:
        compile_(model)
    if shard > 1:
        shard_(model, device=job.device, replicate=replicate, shard=shard, cpu_offload=config.parallel.cpu_offload,
               compute_dtype=job.dtype if job.lora is None else None,
               reduce_every_micro_batch=config.parallel.reduce_every_micro_batch)  # fmt: skip
    if job.model_path is not None:
        home = "cpu" if shard > 1 and config.parallel.cpu_offload else job.device
        tt_ckpt.load_weights(model, job.model_path, dtype=dtype, device=home)
        if job.lora is not None:
            torch.manual_seed(config.seed)
            tt_peft.init_adapter_(model)
    if config.adapter is not None and config.adapter.path is not None:
        tt_peft.load_adapter(model, Path(config.adapter.path))
    return model.train()


def _adapt(model: tt_models.Decoder, lora: tt_peft.LoRAConfig) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # assemble has said them, in one line
        tt_peft.apply_lora_(model, lora)


def build_optimizer(job: Job[RunConfig], model: tt_models.Decoder) -> MasterWeights:
    """The optimizer that the config names, over the trained parameters of ``model``."""
    narrow = job.lora is None and job.dtype == torch.bfloat16 and not is_sharded(model)
    return make_optimizer(trainable_groups(job, model), job.config.optimizer, narrow=narrow)


def trainable_groups(job: Job[RunConfig], model: tt_models.Decoder) -> list[dict[str, Any]]:
    """The trained parameters: matrices and vectors, or LoRA+'s groups with their share of the learning rate."""
    section, adapter = job.config.optimizer, job.config.adapter
    if adapter is None or adapter.lora_plus_ratio == 1.0:
        return decayed(parameter for parameter in model.parameters() if parameter.requires_grad)
    groups = tt_peft.lora_plus_groups(
        model, lr=section.lr, ratio=adapter.lora_plus_ratio, weight_decay=section.weight_decay
    )
    return [{**group, "lr_scale": group["lr"] / section.lr} for group in groups]


def make_objective(config: RunConfig) -> Objective:
    """The loss that the config names."""
    objective = resolve(config.loss.name, LOSSES)
    options = {"label_smoothing": config.loss.label_smoothing} if config.loss.label_smoothing else {}
    found: Objective = functools.partial(objective, **options) if options else objective
    return found
