"""tt, by its public functions and those of its recipes."""

import functools
import itertools
from pathlib import Path
from typing import Any

import torch
from measured import Request, Run, epoch, evaluated, layer_run, loss_run, prompts_of
from measured import train as trained_run
from workloads import TARGETS, hf_config

import tt_ckpt
import tt_models
import tt_peft
from tt_train.build import preference_loss
from tt_train.config import OptimizerSection, PreferenceSection
from tt_train.evaluate import to_device
from tt_train.losses.answers import pair_objective
from tt_train.losses.cross_entropy import cross_entropy
from tt_train.memory import checkpoint_activations_, compile_, offload_activations_
from tt_train.optim.optimizers import decayed, make_optimizer
from tt_train.references.reference import adapter_off, prepared
from tt_train.step import train_step

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "mixed": torch.bfloat16}


def model_of(request: Request) -> tt_models.Decoder:
    """The model of a request with its weights, and with what the request asks for."""
    dtype, full = DTYPES[request["dtype"]], request.get("method", "full") == "full"
    kept = torch.float32 if full and request["dtype"] == "mixed" else dtype
    config = tt_models.config_from_hf(hf_config(request))
    model = tt_models.build(config, device="meta", dtype=kept)
    if not full:
        lora = tt_peft.LoRAConfig(
            rank=request.get("rank", 8), target_modules=tuple(TARGETS[request["method"]]),
            quantize_base=request["method"] == "qlora", dtype=torch.float32 if request["dtype"] == "mixed" else dtype,
        )  # fmt: skip
        tt_peft.apply_lora_(model, lora)
    if how := request.get("checkpointing"):
        checkpoint_activations_(model, how)
    if request.get("offloading"):
        offload_activations_(model)
    if request.get("compile"):
        compile_(model)
    tt_ckpt.load_weights(model, Path(request["folder"]), dtype=kept, device=request.get("device", "cpu"))
    if not full:
        tt_peft.init_adapter_(model)
    return model.train()


def stepper(model: tt_models.Decoder, request: Request, objective: Any, prepare: Any = list) -> tuple[Any, list[Any]]:
    """The step of the recipes, or in pure bf16 with torch's AdamW over bf16 weights, as the peers have it."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if request["dtype"] == "bf16" and not (request.get("optimizer") or request.get("in_backward")):
        optimizer: Any = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0, fused=True)
    else:
        section = OptimizerSection(name=request.get("optimizer") or "adamw", lr=1e-3, weight_decay=0.0)
        narrow = request["dtype"] != "fp32" and request["method"] == "full"
        in_backward = request.get("in_backward", False)
        optimizer = make_optimizer(decayed(parameters), section, narrow=narrow, in_backward=in_backward)

    def step(batch: Any, norm: bool = False) -> tuple[float, float]:
        result = train_step(model, prepare([batch]), objective, optimizer)
        return result.loss, result.grad_norm

    return step, parameters


def train(request: Request) -> Run:
    return trained_run(lambda: stepper(model_of(request), request, cross_entropy), request)


def sft(request: Request) -> Run:
    """From token rows on disk to the end of an epoch, packed."""
    model = model_of(request)
    return _epoch(request, *stepper(model, request, cross_entropy))


def dpo(request: Request) -> Run:
    """From pairs of texts on disk to the end of an epoch, packed; the reference is the model without its adapter."""
    section, model = PreferenceSection(), model_of(request)
    prepare = functools.partial(prepared, model=model, loss=section, reference=adapter_off(model))
    objective = functools.partial(pair_objective, loss=preference_loss(section), beta=section.beta)
    return _epoch(request, *stepper(model, request, objective, prepare))


def _epoch(request: Request, step: Any, parameters: list[Any]) -> Run:
    import tt_data

    def run() -> dict[str, Any]:
        tokenizer, packing = tt_data.load_tokenizer(Path(request["folder"])), request.get("packing", True)
        size = request["batch"] if packing else max(1, request["batch"] * request["length"] // 256)
        rows = tt_data.load_dataset(request["rows_file"], tokenizer, max_seq_len=request["length"], packing=packing)
        count = tt_data.steps_per_epoch(len(rows), size)
        made = itertools.islice(tt_data.batches(rows, batch_size=size), count)
        device = torch.device(request.get("device", "cpu"))
        return epoch((to_device(batch, device) for batch in made), step, parameters)

    return run


def loss(request: Request) -> Run:
    from tt_train import linear_cross_entropy, linear_log_probs

    def loss_of(hidden: Any, weight: Any, labels: Any) -> Any:
        if request["loss"] == "cross entropy":
            return linear_cross_entropy(hidden, weight, labels)
        return -linear_log_probs(hidden, weight, labels).log_probs.mean()

    return loss_run(loss_of, request)


def data(request: Request) -> Run:
    import tt_data

    def run() -> dict[str, Any]:
        tokenizer = tt_data.load_tokenizer(Path(request["folder"]))
        options = {"packing": request["packing"], "streaming": request.get("streaming", False)}
        rows = tt_data.load_dataset(request["rows_file"], tokenizer, max_seq_len=1024, **options)
        batch = next(tt_data.batches(rows, batch_size=4))
        fill = {} if options["streaming"] or not options["packing"] else {"fill": rows.report["efficiency"]}
        return {"work": request["rows"], "positive": {"tokens of the first batch": batch["input_ids"].numel()} | fill}

    return run


def ckpt(request: Request) -> Run:
    source, target = Path(request["folder"]), Path(request["scratch"]) / "saved"

    def run() -> dict[str, Any]:
        if request["way"] == "convert":
            tt_ckpt.convert(source, target, "hf")
        else:
            config = tt_ckpt.read_config(source)
            model = tt_models.build(tt_models.config_from_hf(config), device="meta", dtype=torch.bfloat16)
            tt_ckpt.load_weights(model, source)
            tt_ckpt.save_hf(model, target, config=config, source=source)
        return {"work": sum(file.stat().st_size for file in target.glob("*.safetensors")) / 1e6}

    return run


def decode(request: Request) -> Run:
    model = model_of({**request, "method": "full", "compile": False}).eval()
    if request.get("int8"):
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model, Int8WeightOnlyConfig())
    prompts, new = prompts_of(request), request["new"]
    options = {"temperature": 0.0, "compile": request.get("compile", False)}
    tt_models.generate(model, prompts, max_new_tokens=new if options["compile"] else 2, **options)

    def run() -> dict[str, Any]:
        ids = tt_models.generate(model, prompts, max_new_tokens=new, **options)[:, -new:]
        return {"work": ids.numel(), "equal": {"sum of the new tokens": int(ids.sum())}}

    return run


def evaluate(request: Request) -> Run:
    import tt_train.evals.harness  # noqa: F401  (registers the model)

    return evaluated("tt", {"path": request["folder"], "dtype": request["dtype"]}, request)


def layer(request: Request) -> Run:
    linear = torch.nn.Linear(request["inputs"], request["outputs"], bias=False, dtype=DTYPES[request["dtype"]])
    model = torch.nn.ModuleDict({"layer": linear})
    if request["kind"] == "nf4":
        tt_peft.quantize_nf4_(model)
        weight = model["layer"].weight
        return layer_run(
            (lambda x: torch.nn.functional.linear(x, weight)) if request.get("torchao") else model["layer"], request
        )  # torchao's NF4Tensor takes over F.linear
    tt_peft.apply_lora_(model, tt_peft.LoRAConfig(rank=8, target_modules="layer"))
    tt_peft.LoRALinear.fused = not request.get("plain", False)
    return layer_run(model["layer"], request)
