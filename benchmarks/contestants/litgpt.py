"""litgpt 0.5.13: its GPT, its LoRA, its loss in chunks; rows are padded."""

import json
from pathlib import Path
from typing import Any

import litgpt.lora
import litgpt.model
import torch
from litgpt.config import Config, name_to_config
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint, copy_weights_hf_llama
from litgpt.utils import chunked_cross_entropy
from measured import Request, Run, epoch, loss_run, plain_step, prompts_of
from measured import train as trained_run
from safetensors.torch import load_file
from workloads import TARGETS, hf_config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _config(request: Request) -> dict[str, Any]:
    config = hf_config(request)
    return {
        "name": "bench", "hf_config": {"org": "meta-llama", "name": "Llama-2-bench"}, "rotary_percentage": 1.0,
        "block_size": config["max_position_embeddings"], "vocab_size": config["vocab_size"],
        "padded_vocab_size": config["vocab_size"], "n_head": config["num_attention_heads"],
        "n_layer": config["num_hidden_layers"], "n_embd": config["hidden_size"],
        "n_query_groups": config["num_key_value_heads"], "parallel_residual": False, "bias": False, "norm_eps": 1e-5,
        "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "intermediate_size": config["intermediate_size"],
        "rope_base": int(config["rope_theta"]),
    }  # fmt: skip


def model_of(request: Request) -> Any:
    targets, sizes, state = TARGETS[request.get("method", "full")], _config(request), {}
    for file in sorted(Path(request["folder"]).glob("*.safetensors")):
        state |= load_file(file)
    weights: dict[str, Any] = {}
    qkv: dict[int, Any] = {}
    copy_weights_hf_llama(Config(**sizes), qkv, weights, state)
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[request["dtype"]])
    try:
        if targets:
            chosen = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "projection": "o_proj", "mlp": "up_proj"}
            lora = {f"lora_{name}": target in targets for name, target in chosen.items()}
            config = litgpt.lora.Config(**sizes, lora_r=request.get("rank", 8), lora_alpha=16, **lora)
            model = litgpt.lora.GPT(config)
        else:
            model = litgpt.model.GPT(Config(**sizes))
    finally:
        torch.set_default_dtype(before)
    model.load_state_dict(weights, strict=not targets)
    if targets:
        litgpt.lora.mark_only_lora_as_trainable(model)
    if request.get("compile"):
        model = torch.compile(model)
    return model.train()


def _step(request: Request) -> tuple[Any, list[Any]]:
    model = model_of(request)

    def loss_of(batch: Any) -> Any:
        logits = model(batch["input_ids"], lm_head_chunk_size=128)  # as its fine-tuning has it
        logits[-1] = logits[-1][:, :-1]
        return chunked_cross_entropy(logits, batch["labels"][:, 1:], chunk_size=128)

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return plain_step(loss_of, parameters), parameters


def train(request: Request) -> Run:
    return trained_run(lambda: _step(request), request)


def sft(request: Request) -> Run:
    size = max(1, request["batch"] * request["length"] // 256)
    step, parameters = _step(request)

    def padded(rows: list[dict[str, Any]]) -> dict[str, Any]:
        width = max(len(row["input_ids"]) for row in rows)
        return {name: torch.tensor([row[name] + [fill] * (width - len(row[name])) for row in rows])
                for name, fill in (("input_ids", 0), ("labels", -100))}  # fmt: skip

    def run() -> dict[str, Any]:
        with Path(request["rows_file"]).open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        order = torch.randperm(len(rows)).tolist()  # litgpt does not sort by length
        parts = [[rows[index] for index in order[start : start + size]] for start in range(0, len(rows), size)]
        return epoch(map(padded, parts), step, parameters)

    return run


def loss(request: Request) -> Run:
    def loss_of(hidden: Any, weight: Any, labels: Any) -> Any:
        chunks = [torch.nn.functional.linear(part, weight) for part in hidden[None].split(128, dim=1)]
        return chunked_cross_entropy(chunks, labels[None], chunk_size=128)

    return loss_run(loss_of, request)


def ckpt(request: Request) -> Run:
    from litgpt.scripts.convert_lit_checkpoint import convert_lit_checkpoint

    source, scratch = Path(request["folder"]), Path(request["scratch"])
    name_to_config["bench"] = _config(request)

    def run() -> dict[str, Any]:
        between = scratch / "between"
        between.mkdir()
        for file in source.iterdir():
            (between / file.name).symlink_to(file)
        convert_hf_checkpoint(between, model_name="bench")
        convert_lit_checkpoint(between, scratch / "saved")
        return {"work": sum(file.stat().st_size for file in (scratch / "saved").iterdir()) / 1e6}

    return run


def decode(request: Request) -> Run:
    from litgpt.generate.base import generate

    model, prompts, new = model_of({**request, "method": "full"}).eval(), prompts_of(request), request["new"]
    ids = torch.tensor(prompts[0])  # one prompt at a time
    model.max_seq_length = len(ids) + new
    model.set_kv_cache(batch_size=1, dtype=DTYPES[request["dtype"]])

    def run() -> dict[str, Any]:
        with torch.no_grad():
            answers = generate(model, ids, len(ids) + new, temperature=0.0)[len(ids) :]
        return {"work": answers.numel(), "equal": {"sum of the new tokens": int(answers.sum())}}

    return run
