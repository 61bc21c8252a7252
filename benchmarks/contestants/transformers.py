"""transformers with peft: its own loss, attention and padding; bitsandbytes for NF4; lm-eval's ``hf`` model."""

from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from measured import Request, Run, epoch, evaluated, layer_run, loss_run, plain_step, prompts_of
from measured import train as trained_run
from workloads import EOS, TARGETS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "mixed": torch.bfloat16}


def model_of(request: Request) -> Any:
    full = request.get("method", "full") == "full"
    dtype = torch.float32 if full and request["dtype"] == "mixed" else DTYPES[request["dtype"]]
    options: dict[str, Any] = {}
    if request.get("method") == "qlora":
        import bitsandbytes  # noqa: F401  (a missing one is named)

        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(
        request["folder"], dtype=dtype, device_map=request.get("device", "cpu"), attn_implementation="sdpa", **options
    )
    if request.get("checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if not full:
        rank = request.get("rank", 8)
        config = peft.LoraConfig(r=rank, lora_alpha=16, target_modules=TARGETS[request["method"]])
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=request["dtype"] == "mixed")
    if request.get("compile"):
        model.compile()
    return model.train()


def _step(model: Any, request: Request) -> tuple[Any, list[Any]]:
    mixed, device = request["dtype"] == "mixed", request.get("device", "cpu")

    def loss_of(batch: Any) -> Any:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=mixed):
            return model(**batch, use_cache=False).loss

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return plain_step(loss_of, parameters), parameters


def train(request: Request) -> Run:
    return trained_run(lambda: _step(model_of(request), request), request)


def sft(request: Request) -> Run:
    """From token rows on disk to the end of an epoch: padded batches of rows of about the same length."""
    import datasets

    size = max(1, request["batch"] * request["length"] // 256)
    step, parameters = _step(model_of(request), request)
    collate = transformers.DataCollatorForSeq2Seq(transformers.AutoTokenizer.from_pretrained(request["folder"]))

    def run() -> dict[str, Any]:
        rows = datasets.load_dataset("json", data_files=request["rows_file"], split="train").to_list()
        rows.sort(key=lambda row: len(row["input_ids"]))
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        order = torch.randperm(len(parts)).tolist()
        return epoch((dict(collate(parts[index])) for index in order), step, parameters)

    return run


def loss(request: Request) -> Run:
    from transformers.loss.loss_utils import ForCausalLMLoss

    def loss_of(hidden: Any, weight: Any, labels: Any) -> Any:
        logits = torch.nn.functional.linear(hidden, weight)
        return ForCausalLMLoss(logits[None], None, weight.shape[0], shift_labels=labels[None])

    return loss_run(loss_of, request)


def data(request: Request) -> Run:
    """Texts joined and cut into rows of 1024, as run_clm.py does it: documents are cut and mixed."""
    import datasets

    def run() -> dict[str, Any]:
        tokenizer = transformers.AutoTokenizer.from_pretrained(request["folder"])
        rows = datasets.load_dataset("json", data_files=request["rows_file"], split="train")
        rows = rows.map(lambda part: {"input_ids": tokenizer([text + EOS for text in part["text"]])["input_ids"]},
                        batched=True, remove_columns=rows.column_names)  # fmt: skip

        def join(part: Any) -> Any:
            ids = [token for row in part["input_ids"] for token in row]
            return {"input_ids": [ids[i : i + 1024] for i in range(0, len(ids) // 1024 * 1024, 1024)]}

        batch = torch.tensor(rows.map(join, batched=True)[:4]["input_ids"])
        return {"work": request["rows"], "positive": {"tokens of the first batch": batch.numel(), "fill": 1.0}}

    return run


def ckpt(request: Request) -> Run:
    target = Path(request["scratch"]) / "saved"

    def run() -> dict[str, Any]:
        model = transformers.AutoModelForCausalLM.from_pretrained(request["folder"], dtype=torch.bfloat16)
        model.save_pretrained(target, max_shard_size="450MB")
        return {"work": sum(file.stat().st_size for file in target.glob("*.safetensors")) / 1e6}

    return run


def decode(request: Request) -> Run:
    model, prompts, new = model_of({**request, "method": "full"}).eval(), prompts_of(request), request["new"]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "attention_mask": mask}
    with torch.no_grad():
        model.generate(ids, max_new_tokens=2, **settings)

    def run() -> dict[str, Any]:
        answers = model.generate(ids, max_new_tokens=new, **settings)[:, -new:]
        return {"work": answers.numel(), "equal": {"sum of the new tokens": int(answers.sum())}}

    return run


def evaluate(request: Request) -> Run:
    words = {"pretrained": request["folder"], "dtype": str(DTYPES[request["dtype"]]).partition(".")[2], "device": "cpu"}
    return evaluated("hf", words, request)


def layer(request: Request) -> Run:
    linear = torch.nn.Linear(request["inputs"], request["outputs"], bias=False, dtype=DTYPES[request["dtype"]])
    if request["kind"] == "nf4":
        import bitsandbytes

        nf4 = bitsandbytes.nn.Linear4bit(
            request["inputs"], request["outputs"], bias=False, compute_dtype=linear.weight.dtype, quant_type="nf4"
        )
        nf4.load_state_dict(linear.state_dict())
        return layer_run(nf4.to("cpu"), request)
    config = peft.LoraConfig(r=8, target_modules=["0"])
    return layer_run(peft.get_peft_model(torch.nn.Sequential(linear), config, autocast_adapter_dtype=False), request)
