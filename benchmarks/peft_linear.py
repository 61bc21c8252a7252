"""One linear layer, forward and backward: LoRA (fused, plain, peft's) and NF4 (ours, torchao's, bitsandbytes').

CPU milliseconds with one thread, medians of alternated runs. `nox -s bench -- peft_linear`, or with `--quick`.
"""

import copy
import importlib.metadata
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tt_peft
from tt_peft import LoRAConfig, LoRALinear

QUICK = "--quick" in sys.argv
RUNS = 3 if QUICK else 11
ROWS = (8, 512) if QUICK else (1, 64, 512, 2048)
SHAPES = ((1024, 1024),) if QUICK else ((1024, 1024), (2048, 5632), (4096, 4096))
Run = Callable[[], object]


def milliseconds(contestants: dict[str, Run]) -> dict[str, float]:
    """Median CPU time of each, alternated."""
    for run in contestants.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(RUNS):
        for name, run in contestants.items():
            begin = time.process_time()
            run()
            times[name].append(time.process_time() - begin)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def step(layer: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Run:
    """Forward, gradient of the input and of what trains."""

    def run() -> None:
        inputs = x.detach().requires_grad_()
        layer(inputs).backward(grad)

    return run


def lora_layers(linear: nn.Linear) -> dict[str, Callable[[Tensor], Tensor]]:
    ours = nn.ModuleDict({"layer": copy.deepcopy(linear)})
    tt_peft.apply_lora_(ours, LoRAConfig(rank=8, target_modules="layer"))
    layer = ours["layer"]

    def switched(fused: bool) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            LoRALinear.fused = fused
            result: Tensor = layer(x)
            LoRALinear.fused = True
            return result

        return forward

    layers: dict[str, Callable[[Tensor], Tensor]] = {"tt (chosen)": switched(True), "tt plain": switched(False)}
    try:
        import peft
    except ImportError:
        return layers
    theirs = peft.get_peft_model(
        nn.Sequential(copy.deepcopy(linear)), peft.LoraConfig(r=8, target_modules=["0"]), autocast_adapter_dtype=False
    )
    return layers | {"peft": theirs}


def nf4_layers(linear: nn.Linear) -> dict[str, Callable[[Tensor], Tensor]]:
    ours = nn.Sequential(copy.deepcopy(linear))
    tt_peft.quantize_nf4_(ours)
    weight = ours[0].weight
    layers: dict[str, Callable[[Tensor], Tensor]] = {
        "tt": ours,
        "torchao": lambda x: F.linear(x, weight),  # its NF4Tensor takes over F.linear
    }
    try:
        import bitsandbytes
    except ImportError:
        return layers
    theirs = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=linear.weight.dtype, quant_type="nf4"
    )
    theirs.load_state_dict(linear.state_dict())
    return layers | {"bitsandbytes": theirs.to("cpu")}


def table(title: str, make: Callable[[nn.Linear], dict[str, Callable[[Tensor], Tensor]]], dtype: torch.dtype) -> None:
    header: list[str] = []
    for n_in, n_out in SHAPES:
        linear = nn.Linear(n_in, n_out, bias=False, dtype=dtype).requires_grad_(False)
        layers = {"frozen dense": linear, **make(linear)}
        for rows in ROWS:
            x, grad = torch.randn(rows, n_in, dtype=dtype), torch.randn(rows, n_out, dtype=dtype)
            found = milliseconds({name: step(layer, x, grad) for name, layer in layers.items()})
            if not header:
                header = list(found)
                print(f"\n{title}, {str(dtype).removeprefix('torch.')}\n")
                print("| in x out | rows |", " | ".join(header), "|\n|---|---|" + "---|" * len(header))
            print(
                f"| {n_in} x {n_out} | {rows} |", " | ".join(f"{found[name]:.2f}" for name in header), "|", flush=True
            )


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    versions = []
    for name in ("torch", "torchao", "peft", "bitsandbytes"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    machine = f"Python {platform.python_version()}, {platform.machine()}, one thread"
    print(f"{', '.join(versions)}; {machine}; CPU ms, median of {RUNS}")
    table("LoRA rank 8, forward and backward", lora_layers, torch.bfloat16)
    table("LoRA rank 8, forward and backward", lora_layers, torch.float32)
    table("NF4, frozen, forward and gradient of the input", nf4_layers, torch.bfloat16)


if __name__ == "__main__":
    main()
