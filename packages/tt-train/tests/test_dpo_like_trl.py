"""Twenty steps of the recipe dpo beside TRL's DPOTrainer on the same pairs in the same order."""

import json

import pytest
import torch

from tt_train import compose
from tt_train.job import assemble
from tt_train.recipes import dpo
from tt_train.records.run_files import read_rows

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau".split()


@pytest.mark.parametrize(("method", "loss"), [("full", "sigmoid"), ("lora", "ipo")])
def test_twenty_steps_are_those_of_trl(words, model_dir, tmp_path, method, loss):
    """Of LoRA, both start from one adapter that peft has made, and TRL's reference is a copy of it."""
    trl = pytest.importorskip("trl")
    transformers = pytest.importorskip("transformers")
    datasets = pytest.importorskip("datasets")
    rows = [
        {"prompt": f"say {WORDS[i % 19]} {WORDS[i * 3 % 19]}", "chosen": f"alpha {WORDS[i * 5 % 19]}",
         "rejected": "beta " + " ".join(WORDS[: i % 4])} for i in range(24)
    ]  # fmt: skip
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [*words, f"data.train={file}", "max_steps=20", "data.shuffle=false", "schedule.name=constant",
                 "schedule.warmup_steps=0", "optimizer.lr=1e-3", "optimizer.weight_decay=0", "samples.num=0",
                 f"output_dir={tmp_path / 'ours'}"]  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    if method == "lora":
        peft = pytest.importorskip("peft")
        torch.manual_seed(0)
        lora = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
        peft.get_peft_model(model, lora).save_pretrained(tmp_path / "start")
        plain = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(plain, tmp_path / "start", is_trainable=True)
        overrides += [
            "adapter.rank=4",
            "adapter.target_modules=[q_proj, up_proj]",
            f"adapter.path={tmp_path / 'start'}",
        ]
    overrides += [f"loss.name={loss}"]
    config = compose("dpo", overrides=overrides)
    ours = list(read_rows(dpo.main(config) / "metrics.jsonl"))

    def split(row):  # of the same ids, so that the trainers are compared, not the templates
        start = next(i for i, label in enumerate(row["chosen_labels"]) if label != -100)
        chosen, rejected = row["chosen_input_ids"], row["rejected_input_ids"]
        return {"prompt_ids": chosen[:start], "chosen_ids": chosen[start:], "rejected_ids": rejected[start:]}

    data = datasets.Dataset.from_list([split(row) for row in assemble(config).train])
    settings = trl.DPOConfig(
        output_dir=str(tmp_path / "theirs"), max_steps=20, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=1e-3, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, beta=0.1, logging_steps=1,
        train_sampling_strategy="sequential", report_to=[], use_cpu=True, bf16=False, save_strategy="no",
        max_grad_norm=1.0, gradient_checkpointing=False, max_length=None, disable_tqdm=True, optim="adamw_torch",
        loss_type=[loss],
    )  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)

    class Trainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset  # ids already

    trainer = Trainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    theirs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(theirs) == len(ours) == 20
    names = {"loss": "loss", "grad_norm": "grad_norm", "rewards_chosen": "rewards/chosen",
             "rewards_rejected": "rewards/rejected", "rewards_margin": "rewards/margins",
             "rewards_accuracy": "rewards/accuracies", "log_probs_chosen": "logps/chosen",
             "log_probs_rejected": "logps/rejected"}  # fmt: skip
    for mine, their in zip(ours, theirs, strict=True):
        for name, other in names.items():
            assert mine[name] == pytest.approx(float(their[other]), rel=1e-4, abs=1e-4), (mine["step"], name)
    assert ours[-1]["loss"] < 0.95 * ours[0]["loss"]
