"""torchtune 0.6.1: its Llama, its LoRA and NF4, its loss in chunks, its packed data set."""

import json
from pathlib import Path
from typing import Any

import torch
import torchtune.data
import torchtune.datasets
from measured import Request, Run, epoch, loss_run, plain_step, prompts_of
from measured import train as trained_run
from safetensors.torch import load_file
from torchtune.models.convert_weights import hf_to_tune
from torchtune.models.llama3 import llama3, lora_llama3
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.modules.peft import get_adapter_params, set_trainable_params
from torchtune.modules.transforms.tokenizers import HuggingFaceBaseTokenizer
from torchtune.training import compile_model, set_default_dtype
from workloads import TARGETS, hf_config

NAMES = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "output_proj"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def model_of(request: Request) -> Any:
    config, method = hf_config(request), request.get("method", "full")
    sizes = {
        "vocab_size": config["vocab_size"], "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"], "num_kv_heads": config["num_key_value_heads"],
        "embed_dim": config["hidden_size"], "intermediate_dim": config["intermediate_size"],
        "max_seq_len": config["max_position_embeddings"], "rope_base": config["rope_theta"], "norm_eps": 1e-5,
    }  # fmt: skip
    with set_default_dtype(DTYPES[request["dtype"]]):
        if method == "full":
            model = llama3(**sizes)
        else:
            mlp = "up_proj" in TARGETS[method]
            model = lora_llama3(
                [NAMES[name] for name in TARGETS[method] if name in NAMES], apply_lora_to_mlp=mlp, lora_alpha=16,
                lora_rank=request.get("rank", 8), quantize_base=method == "qlora", **sizes,
            )  # fmt: skip
    state = {}
    for file in sorted(Path(request["folder"]).glob("*.safetensors")):
        state |= load_file(file)
    heads = sizes["num_heads"], sizes["num_kv_heads"], sizes["embed_dim"]
    model.load_state_dict(hf_to_tune(state, *heads), strict=False)
    if method != "full":
        set_trainable_params(model, get_adapter_params(model))
    if request.get("compile"):
        compile_model(model, verbose=False)
    return model.train()


def _step(request: Request) -> tuple[Any, list[Any]]:
    model, loss_fn = model_of(request), CEWithChunkedOutputLoss()
    model.set_num_output_chunks(loss_fn.num_output_chunks)

    def loss_of(batch: Any) -> Any:
        labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        ids = batch["input_ids"] if "input_ids" in batch else batch["tokens"]
        return loss_fn(model(ids, mask=batch.get("mask"), input_pos=batch.get("input_pos")), labels)

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return plain_step(loss_of, parameters), parameters


def train(request: Request) -> Run:
    return trained_run(lambda: _step(request), request)


def sft(request: Request) -> Run:
    from torch.utils.data import DataLoader

    step, parameters = _step(request)

    class Rows(torch.utils.data.Dataset):  # token rows, as its data sets give them
        def __init__(self) -> None:
            with Path(request["rows_file"]).open(encoding="utf-8") as lines:
                self.rows = [json.loads(line) for line in lines]

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"tokens": self.rows[index]["input_ids"], "labels": self.rows[index]["labels"]}

    def run() -> dict[str, Any]:
        packed = torchtune.datasets.PackedDataset(Rows(), max_seq_len=request["length"])
        collate = torchtune.data.padded_collate_packed
        loader = DataLoader(packed, batch_size=request["batch"], shuffle=True, collate_fn=collate)
        return epoch(loader, step, parameters)

    return run


def loss(request: Request) -> Run:
    loss_fn = CEWithChunkedOutputLoss()

    def loss_of(hidden: Any, weight: Any, labels: Any) -> Any:
        chunks = [torch.nn.functional.linear(part, weight) for part in hidden[None].chunk(8, dim=1)]
        return loss_fn(chunks, labels[None])

    return loss_run(loss_of, request)


def data(request: Request) -> Run:
    from torch.utils.data import DataLoader

    class Text(HuggingFaceBaseTokenizer):  # what TextCompletionDataset asks of a tokenizer
        max_seq_len = 1024

    folder = Path(request["folder"])

    def run() -> dict[str, Any]:
        tokenizer = Text(
            str(folder / "tokenizer.json"), tokenizer_config_json_path=str(folder / "tokenizer_config.json")
        )
        source = torchtune.datasets.TextCompletionDataset(
            tokenizer, source="json", data_files=request["rows_file"], split="train", add_eos=True
        )
        packed = torchtune.datasets.PackedDataset(source, max_seq_len=1024)
        collate = torchtune.data.padded_collate_packed
        batch = next(iter(DataLoader(packed, batch_size=4, collate_fn=collate)))
        fill = sum(int((pack["labels"] != -100).sum()) for pack in packed.packs) / (len(packed) * 1024)
        return {
            "work": request["rows"],
            "positive": {"tokens of the first batch": batch["tokens"].numel(), "fill": fill},
        }

    return run


def ckpt(request: Request) -> Run:
    from torchtune.training import FullModelHFCheckpointer

    source, target = Path(request["folder"]), Path(request["scratch"]) / "saved"

    def run() -> dict[str, Any]:
        files = sorted(file.name for file in source.glob("*.safetensors"))
        target.mkdir()
        checkpointer = FullModelHFCheckpointer(
            checkpoint_dir=str(source), checkpoint_files=files, model_type="LLAMA3", output_dir=str(target)
        )
        checkpointer.save_checkpoint(checkpointer.load_checkpoint(), epoch=0)
        return {"work": sum(file.stat().st_size for file in target.rglob("*.safetensors")) / 1e6}

    return run


def decode(request: Request) -> Run:
    from torchtune.generation import generate

    model, prompts, new = model_of({**request, "method": "full"}).eval(), prompts_of(request), request["new"]
    ids = torch.tensor(prompts)  # it has no ragged prompts
    with set_default_dtype(DTYPES[request["dtype"]]):
        model.setup_caches(batch_size=len(prompts), dtype=DTYPES[request["dtype"]],
                           decoder_max_seq_len=ids.shape[1] + new)  # fmt: skip

    def run() -> dict[str, Any]:
        with torch.no_grad():
            answers, _ = generate(model, ids, max_generated_tokens=new, temperature=1.0, top_k=1)
        answers = answers[:, ids.shape[1] :]
        return {"work": answers.numel(), "equal": {"sum of the new tokens": int(answers.sum())}}

    return run
