"""torchtune 0.1.0's recipes and configs by name. A config is what its YAML there says, carried over by ``migrate``."""

from dataclasses import dataclass
from typing import Any

from tt_train.settings.torchtune.verbs import EVALUATION, GENERATION, QUANTIZATION, evaluation, generation, quantization

# its recipes and ours; None: no recipe here, and ELSEWHERE says what to do
RECIPES: dict[str, str | None] = {
    "full_finetune_single_device": "sft",
    "full_finetune_distributed": "sft",
    "lora_finetune_single_device": "sft",
    "lora_finetune_distributed": "sft",
    "lora_dpo_single_device": "dpo",
    "generate": None,
    "eleuther_eval": None,
    "quantize": None,
}
_GENERATE = f"a verb here: {generation(GENERATION)}"  # with the values of torchtune's config
_EVAL = f"a verb here: {evaluation(EVALUATION)}"  # with the values of torchtune's config
_QUANTIZE = f"a verb here: {quantization(QUANTIZATION)}"
ELSEWHERE = {"generate": _GENERATE, "generation": _GENERATE, "eleuther_eval": _EVAL, "eleuther_evaluation": _EVAL,
             "quantize": _QUANTIZE, "quantization": _QUANTIZE}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Config:
    """The values in which the training configs differ. ``batch``, ``accumulation``: of one device."""

    recipe: str
    model: str
    modules: str = ""  # letters of q, k, v, o; m: mlp; l: output
    rank: int = 8
    rows: str = "alpaca_dataset"
    batch: int = 2
    accumulation: int = 1
    epochs: int = 3
    lr: float
    decay: float | None = None  # None: the optimizer's own
    warmup: int | None = 100  # None: no schedule
    checkpointing: bool = True
    low_memory: bool = False  # paged AdamW, within the backward pass


_SFT_LORA = {"recipe": "lora_finetune_distributed", "rows": "alpaca_cleaned_dataset", "epochs": 1, "decay": 0.01}
_MISTRAL = {"model": "lora_mistral_7b", "modules": "qkvml", "rank": 64, "batch": 4, "lr": 2e-5}
_FULL: dict[str, Any] = {"recipe": "full_finetune_distributed", "warmup": None}
_LOW: dict[str, Any] = {"recipe": "full_finetune_single_device", "warmup": None, "low_memory": True}
_ONE = {"recipe": "lora_finetune_single_device"}
_CONFIGS: dict[str, dict[str, Any]] = {
    "llama2/7B_full": {**_FULL, "model": "llama2_7b", "lr": 2e-5},
    "llama2/13B_full": {**_FULL, "model": "llama2_13b", "lr": 2e-5},
    "llama2/7B_full_low_memory": {**_LOW, "model": "llama2_7b", "lr": 2e-5},
    "llama2/7B_lora": {**_SFT_LORA, "model": "lora_llama2_7b", "modules": "qv", "accumulation": 32, "lr": 3e-4,
                       "checkpointing": False},
    "llama2/13B_lora": {**_SFT_LORA, "model": "lora_llama2_13b", "modules": "qvkml", "accumulation": 16, "lr": 2e-4,
                        "checkpointing": False},
    "llama2/7B_lora_single_device": {**_SFT_LORA, **_ONE, "model": "lora_llama2_7b", "modules": "qv",
                                     "accumulation": 64, "lr": 3e-4},
    "llama2/7B_qlora_single_device": {**_SFT_LORA, **_ONE, "model": "qlora_llama2_7b", "modules": "qvkom",
                                      "accumulation": 16, "lr": 3e-4},
    "llama2/7B_lora_dpo_single_device": {
        "recipe": "lora_dpo_single_device", "model": "lora_llama2_7b", "modules": "qv", "batch": 4, "accumulation": 16,
        "rows": "stack_exchanged_paired_dataset", "epochs": 1, "lr": 5e-4, "decay": 0.05},
    "mistral/7B_full": {**_FULL, "model": "mistral_7b", "lr": 5e-6},
    "mistral/7B_full_low_memory": {**_LOW, "model": "mistral_7b", "lr": 5e-6},
    "mistral/7B_lora": {**_MISTRAL, "recipe": "lora_finetune_distributed"},
    "mistral/7B_lora_single_device": {**_MISTRAL, **_ONE, "accumulation": 4},
    "mistral/7B_qlora_single_device": {**_MISTRAL, **_ONE, "model": "qlora_mistral_7b", "modules": "qkvm",
                                       "accumulation": 4},
    "gemma/2B_full": {**_FULL, "model": "gemma_2b", "lr": 2e-5},
}  # fmt: skip
PAIRS: dict[str, str] = {
    **{name: str(values["recipe"]) for name, values in _CONFIGS.items()},
    "generation": "generate", "eleuther_evaluation": "eleuther_eval", "quantization": "quantize",
}  # fmt: skip


def own_name(name: str) -> str | None:
    """The name of a torchtune config, whatever its capitals; None if there is no such config."""
    return {known.lower(): known for known in PAIRS}.get(name.lower())


def config_text(name: str, devices: int = 1) -> str:
    """The YAML of a training config that is here what torchtune's is there, as a text with what differs in comments.

    devices: the processes that train, since torchtune's batch size is that of one GPU.
    """
    from tt_train.settings.torchtune.migrate import migrate

    config = _Config(**_CONFIGS[name])
    found = migrate(_as_theirs(config), devices=devices)
    said = [f"torchtune's config for {PAIRS[name]}. tt run {PAIRS[name]} --config {name}"]
    said += [line for line in found.problems if not line.startswith("batch_size")]
    said += [f"batch_size: torchtune's {config.batch * config.accumulation} of a GPU, times the number of processes"]
    return "".join([*(f"# {line}\n" for line in said), found.yaml()])


def _as_theirs(config: _Config) -> dict[str, Any]:
    """The values of its YAML that mean something here."""
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "output_proj"}
    model: dict[str, Any] = {"_component_": f"torchtune.models.{config.model}"}
    if config.modules:
        model |= {
            "lora_attn_modules": [names[letter] for letter in config.modules if letter in names],
            "apply_lora_to_mlp": "m" in config.modules, "apply_lora_to_output": "l" in config.modules,
            "lora_rank": config.rank, "lora_alpha": 16,
        }  # fmt: skip
    optimizer = "bitsandbytes.optim.PagedAdamW" if config.low_memory else "torch.optim.AdamW"
    theirs = {
        "model": model,
        "checkpointer": {"_component_": "torchtune.utils.FullModelHFCheckpointer"},
        "dataset": {"_component_": f"torchtune.datasets.{config.rows}"},
        "batch_size": config.batch, "gradient_accumulation_steps": config.accumulation, "epochs": config.epochs,
        "optimizer": {"_component_": optimizer, "lr": config.lr}
        | ({} if config.decay is None else {"weight_decay": config.decay}),
        "enable_activation_checkpointing": config.checkpointing, "optimizer_in_bwd": config.low_memory,
        "dtype": "bf16", "device": "cuda", "seed": None, "shuffle": True,
    }  # fmt: skip
    if config.warmup is not None:
        scheduler = "torchtune.modules.get_cosine_schedule_with_warmup"
        theirs["lr_scheduler"] = {"_component_": scheduler, "num_warmup_steps": config.warmup}
    if config.recipe == "lora_dpo_single_device":
        loss = {
            "_component_": "torchtune.modules.loss.DPOLoss",
            "beta": 0.1,
            "label_smoothing": 0,
            "loss_type": "sigmoid",
        }
        theirs |= {"loss": loss, "max_steps_per_epoch": 1000}
    return theirs
