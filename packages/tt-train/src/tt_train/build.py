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
from tt_train.job import Job
from tt_train.losses import Objective
from tt_train.memory import checkpoint_activations_, compile_
from tt_train.optim import MasterWeights, decayed, make_optimizer
from tt_train.registry import LOSSES, resolve


def load_model(job: Job[RunConfig]) -> tt_models.Decoder:
    """The model with its weights and, if the config says so, its adapter; ready to train.

    Trained weights are fp32. With bf16 as ``model.dtype``, ``build_optimizer`` makes those of a full model bf16.
    """
    torch.manual_seed(job.config.seed)
    adapter = job.config.adapter
    dtype = torch.float32 if job.lora is None else job.dtype
    if job.model_path is None:
        model = tt_models.build(job.model_config, device=job.device, dtype=dtype)
        if job.lora is not None:
            _adapt(model, job.lora)
    else:
        model = tt_models.build(job.model_config, device="meta", dtype=dtype)
        if job.lora is not None:  # before the weights: a base of 4 bits is quantized tensor by tensor while it loads
            _adapt(model, job.lora)
        tt_ckpt.load_weights(model, job.model_path, dtype=dtype, device=job.device)
        if job.lora is not None:
            torch.manual_seed(job.config.seed)
            tt_peft.init_adapter_(model)
    if adapter is not None and adapter.path is not None:
        tt_peft.load_adapter(model, Path(adapter.path))
    if job.config.activation_checkpointing:
        checkpoint_activations_(model)
    if job.config.compile:
        compile_(model)
    return model.train()


def _adapt(model: tt_models.Decoder, lora: tt_peft.LoRAConfig) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # assemble has said them, in one line
        tt_peft.apply_lora_(model, lora)


def build_optimizer(job: Job[RunConfig], model: tt_models.Decoder) -> MasterWeights:
    """The optimizer that the config names, over the trained parameters of ``model``."""
    narrow = job.lora is None and job.dtype == torch.bfloat16
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
