"""What bounds a workload: its matrix products alone, one reading of the weights for each token, or a plain copy."""

import shutil
from pathlib import Path
from typing import Any

import torch
from measured import Request, Run
from workloads import hf_config, weight_shapes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "mixed": torch.bfloat16}


def _matrices(request: Request) -> list[Any]:
    """The linear layers' weights and the head, all that a token is multiplied with, without the embedding."""
    shapes = weight_shapes(hf_config(request))
    dtype = DTYPES[request["dtype"]]
    made = [
        torch.randn(shape, dtype=dtype) for name, shape in shapes.items() if len(shape) == 2 and "embed" not in name
    ]
    return (
        made if "lm_head.weight" in shapes else [*made, torch.randn(shapes["model.embed_tokens.weight"], dtype=dtype)]
    )


def train(request: Request) -> Run:
    """Products of a step: forward, gradient of the input and, if the weights train, gradient of the weights."""
    matrices, rows = _matrices(request), request["batch"] * request["length"]
    inputs = {size: torch.randn(rows, size, dtype=matrices[0].dtype) for size in {n for m in matrices for n in m.shape}}

    def products() -> None:
        for weight in matrices:
            torch.mm(inputs[weight.shape[1]], weight.T)
            torch.mm(inputs[weight.shape[0]], weight)
            if request["method"] == "full":
                torch.mm(inputs[weight.shape[0]].T, inputs[weight.shape[1]])

    products()

    def run() -> dict[str, Any]:
        for _ in range(request["steps"]):
            products()
        return {"work": request["batch"] * (request["length"] - 1) * request["steps"]}

    return run


def decode(request: Request) -> Run:
    """Each weight multiplied with the rows of the batch, once for each new token."""
    matrices, rows = _matrices(request), request["batch"]
    inputs = {size: torch.randn(rows, size, dtype=matrices[0].dtype) for size in {m.shape[1] for m in matrices}}

    def run() -> dict[str, Any]:
        for _ in range(request["new"]):
            for weight in matrices:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)
        return {"work": rows * request["new"]}

    return run


def loss(request: Request) -> Run:
    """The products of the head: logits, gradient of the hidden states and, if it trains, of the head."""
    vocabulary, width = request["vocabulary"], request["width"]
    weight = torch.randn(vocabulary, width, dtype=torch.bfloat16)
    hidden, part = torch.randn(request["positions"], width, dtype=torch.bfloat16), 256

    def run() -> dict[str, Any]:
        for rows in hidden.split(part):
            logits = torch.mm(rows, weight.T)
            torch.mm(logits, weight)
            if request["head"] == "trained":
                torch.mm(logits.T, rows)
        return {"work": request["positions"]}

    return run


def ckpt(request: Request) -> Run:
    """A copy of the folder, not synced."""
    target = Path(request["scratch"]) / "saved"

    def run() -> dict[str, Any]:
        shutil.copytree(request["folder"], target)
        return {"work": sum(file.stat().st_size for file in target.glob("*.safetensors")) / 1e6}

    return run


def data(request: Request) -> Run:
    """The tokenizer alone, over the texts of the rows."""
    import json

    from tokenizers import Tokenizer

    def run() -> dict[str, Any]:
        tokenizer = Tokenizer.from_file(str(Path(request["folder"]) / "tokenizer.json"))
        with Path(request["rows_file"]).open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        texts = [row.get("text") or " ".join(turn["content"] for turn in row["messages"]) for row in rows]
        count = sum(len(part.ids) for part in tokenizer.encode_batch(texts))
        return {"work": request["rows"], "positive": {"tokens": count}}

    return run


def layer(request: Request) -> Run:
    """The frozen dense layer: forward and the gradient of its input."""
    dtype = DTYPES[request["dtype"]]
    weight = torch.randn(request["outputs"], request["inputs"], dtype=dtype)
    x = torch.randn(request["rows"], request["inputs"], dtype=dtype)
    grad = torch.randn(request["rows"], request["outputs"], dtype=dtype)

    def run() -> dict[str, Any]:
        for _ in range(request["repeats"]):
            torch.nn.functional.linear(x, weight)
            torch.mm(grad, weight)
        return {"work": request["repeats"]}

    return run
