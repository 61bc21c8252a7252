"""TRL's trainers, from rows on disk to the end of an epoch, with its own packing."""

import math
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
import transformers
import trl
import trl.trainer.dpo_trainer
import trl.trainer.sft_trainer
from contestants.transformers import DTYPES
from measured import Request, Run, loss_run, sums_of
from workloads import TARGETS


class _Seen(transformers.TrainerCallback):
    """The losses that the trainer logs."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def _run(trainer_class: Any, config_class: Any, request: Request, **options: Any) -> Run:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        request["folder"], dtype=DTYPES[request["dtype"]], attn_implementation="sdpa"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(request["folder"])
    adapter = None
    if request["method"] != "full":
        adapter = peft.LoraConfig(r=request.get("rank", 8), lora_alpha=16, target_modules=TARGETS[request["method"]])
    seen, work = _Seen(), 0

    class Counting(trainer_class):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, **words: Any) -> Any:
            nonlocal work
            kept = inputs["labels"][:, 1:] != -100 if "labels" in inputs else inputs["completion_mask"][:, 1:] != 0
            work += int(kept.sum())
            return super().compute_loss(model, inputs, **words)

    def run() -> dict[str, Any]:
        rows = datasets.load_dataset("json", data_files=request["rows_file"], split="train")
        config = config_class(
            output_dir=f"{request['scratch']}/trl", max_length=request["length"], report_to=[], use_cpu=True,
            bf16=False, num_train_epochs=1, logging_steps=1, save_strategy="no", max_grad_norm=0.0, learning_rate=1e-3,
            weight_decay=0.0, gradient_checkpointing=False, lr_scheduler_type="constant", disable_tqdm=True, **options,
        )  # fmt: skip
        trainer = Counting(model, args=config, train_dataset=rows, processing_class=tokenizer, callbacks=[seen],
                           peft_config=adapter)  # fmt: skip
        parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        before = sums_of(parameters)
        trainer.train()
        moved = {"change of the parameters": math.dist(before, sums_of(parameters))}
        return {"work": work, "equal": {"first loss": seen.losses[0], "trained tokens": work}, "positive": moved}

    return run


def sft(request: Request) -> Run:
    return _run(trl.SFTTrainer, trl.SFTConfig, request, packing=True, per_device_train_batch_size=request["batch"])


def dpo(request: Request) -> Run:
    rows = max(1, request["batch"] * request["length"] // 256)  # TRL 1.16 does not pack pairs
    return _run(trl.DPOTrainer, trl.DPOConfig, request, per_device_train_batch_size=rows // 2 or 1)


def loss(request: Request) -> Run:
    from trl.trainer.utils import selective_log_softmax

    def loss_of(hidden: Any, weight: Any, labels: Any) -> Any:
        return -selective_log_softmax(torch.nn.functional.linear(hidden, weight), labels).mean()

    return loss_run(loss_of, request)


def data(request: Request) -> Run:
    model = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8192
    )

    def run() -> dict[str, Any]:
        rows = datasets.load_dataset("json", data_files=request["rows_file"], split="train")
        config = trl.SFTConfig(
            output_dir=f"{request['scratch']}/trl", packing=request["packing"], max_length=1024, report_to=[],
            per_device_train_batch_size=4, use_cpu=True, bf16=False, disable_tqdm=True,
        )  # fmt: skip
        tokenizer = transformers.AutoTokenizer.from_pretrained(Path(request["folder"]))
        trainer = trl.SFTTrainer(transformers.LlamaForCausalLM(model), config, train_dataset=rows,
                                 processing_class=tokenizer)  # fmt: skip
        batch, packs = next(iter(trainer.get_train_dataloader())), trainer.train_dataset
        fill = sum(map(len, packs["input_ids"])) / (len(packs) * 1024)
        positive = {"tokens of the first batch": batch["input_ids"].numel()}
        return {"work": request["rows"], "positive": positive | ({"fill": fill} if request["packing"] else {})}

    return run
