"""Where the CPU time of a training step goes, and how far that is from the limits of this machine.

    nox -s bench -- profiles --shape 134M     # or python benchmarks/profiles.py in an environment that has tt

Every operation is timed in CPU seconds of its thread by a dispatch mode, so a busy machine changes the shares little.
Python is what is left of a step that runs without the mode. The limits are measured here: the rate of a large product,
and that of copying memory that no cache holds. ``--operations 20`` lists the slowest operations, too.
"""

import argparse
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from workloads import SHAPES, TARGETS, hf_config

import tt_models
import tt_peft
from tt_train.config import OptimizerSection
from tt_train.losses.cross_entropy import cross_entropy
from tt_train.optim.optimizers import decayed, make_optimizer
from tt_train.step import train_step

CASES = [("full", "fp32"), ("full", "mixed"), ("lora q,v", "mixed"), ("lora", "mixed"), ("qlora", "mixed")]
KINDS = ("products", "attention", "loss", "optimizer", "NF4", "elementwise")
KIND_OF_FILE = {"attention.py": "attention", "chunks.py": "loss", "cross_entropy.py": "loss", "nf4.py": "NF4",
                "master_weights.py": "optimizer", "optimizer.py": "optimizer", "adamw.py": "optimizer"}  # fmt: skip
OWN_KIND = {"elementwise.py", "blocks.py", "decoder.py", "lora.py", "products.py"}  # by the operation's name


class Timed(TorchDispatchMode):
    """CPU seconds, calls, floating-point operations and bytes of each kind of operation."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)
        self.flops: dict[str, int] = defaultdict(int)
        self.bytes: dict[str, int] = defaultdict(int)
        self.names: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind, kwargs = kind_of(func), kwargs or {}
        began = time.thread_time()
        out = func(*args, **kwargs)
        seconds = time.thread_time() - began
        self.seconds[kind] += seconds
        each = self.names[kind, func.overloadpacket.__name__]
        each[0], each[1] = each[0] + seconds, each[1] + 1
        if func.overloadpacket in flop_registry:
            self.flops[kind] += flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
        if not func.is_view:
            every = (*args, *(out if isinstance(out, tuple | list) else [out]))
            self.bytes[kind] += sum(x.nbytes for x in every if isinstance(x, Tensor))
        return out


def kind_of(func: Any) -> str:
    """By the name of the operation, and by the file that calls it."""
    name, frame = func.overloadpacket.__name__, sys._getframe(2)
    if "scaled_dot_product" in name:
        return "attention"
    kind, caller = "elementwise", frame.f_back
    while caller is not None:
        file = Path(caller.f_code.co_filename).name
        if file in OWN_KIND:
            break
        if file in KIND_OF_FILE:
            kind = KIND_OF_FILE[file]
            break
        caller = caller.f_back
    is_product = name in ("mm", "addmm", "addmm_")  # attention in blocks has batched ones
    return "products" if is_product else kind


def seconds_of(run: Callable[[], object], times: int) -> float:
    """CPU seconds, the median."""
    found = []
    for _ in range(times):
        began = time.process_time()
        run()
        found.append(time.process_time() - began)
    return statistics.median(found)


def limits() -> dict[str, float]:
    """GFLOP/s of a product of two squares of 2048 in fp32 and bf16, and GB/s of a copy of 128 MB, both ways counted."""
    found = {}
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        square = torch.randn(2048, 2048).to(dtype)
        found[name] = 2 * 2048**3 / seconds_of(lambda: torch.mm(square, square), 5) / 1e9  # noqa: B023
    source, target = torch.ones(2**27, dtype=torch.uint8), torch.ones(2**27, dtype=torch.uint8)
    found["memory"] = 2 * source.nbytes / seconds_of(lambda: target.copy_(source), 5) / 1e9
    return found


def attention_flops(options: argparse.Namespace) -> int:
    """Both products of causal attention forward, and the five of its backward, half of each square."""
    _, width, _, layers, *_ = SHAPES[options.shape]
    return 7 * layers * options.batch * options.length**2 * width


def stepper(shape: str, method: str, dtype: str) -> Callable[[Tensor], object]:
    """The step of the recipes, on random weights."""
    full = method == "full"
    kept = torch.float32 if full or dtype == "fp32" else torch.bfloat16
    model = tt_models.build(tt_models.config_from_hf(hf_config({"shape": shape})), dtype=kept).train()
    if not full:
        targets, quantize = tuple(TARGETS[method]), method == "qlora"
        config = tt_peft.LoRAConfig(rank=8, target_modules=targets, quantize_base=quantize, dtype=torch.float32)
        tt_peft.apply_lora_(model, config)
    groups = decayed(parameter for parameter in model.parameters() if parameter.requires_grad)
    optimizer = make_optimizer(groups, OptimizerSection(lr=1e-3), narrow=full and dtype == "mixed")
    return lambda ids: train_step(model, [{"input_ids": ids, "labels": ids}], cross_entropy, optimizer)


def profile(options: argparse.Namespace, method: str, dtype: str, best: dict[str, float]) -> None:
    """Print a row of the table, and the operations that cost most."""
    torch.manual_seed(0)
    step, steps = stepper(options.shape, method, dtype), options.steps
    ids = torch.randint(0, SHAPES[options.shape][0], (options.batch, options.length))
    step(ids)
    plain = seconds_of(lambda: step(ids), 2 * steps - 1)
    with Timed() as timed:
        for _ in range(steps):
            step(ids)
    each = {kind: timed.seconds[kind] / steps / plain for kind in KINDS}
    shares = " | ".join(f"{100 * share:.0f} %" for share in (*each.values(), max(0.0, 1 - sum(each.values()))))
    product = timed.flops["products"] / timed.seconds["products"] / 1e9
    attention = attention_flops(options) * steps / timed.seconds["attention"] / 1e9
    moved = timed.bytes["elementwise"] / timed.seconds["elementwise"] / 1e9
    calls = sum(count for _, count in timed.names.values()) / steps
    limit, memory = best["fp32" if dtype == "fp32" else "bf16"], best["memory"]
    print(f"| {method} {dtype} | {1e3 * plain:.0f} | {shares} | {calls:.0f} | {product:.0f} ({product / limit:.2f}) "
          f"| {attention:.0f} ({attention / limit:.2f}) | {moved:.0f} ({moved / memory:.1f}) |",
          flush=True)  # fmt: skip
    slowest = sorted(timed.names.items(), key=lambda item: -item[1][0])
    for (kind, name), (seconds, count) in slowest[: options.operations]:
        print(f"    {kind:12} {name:50} {1e3 * seconds / steps:7.1f} ms, {count // steps:.0f} calls")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="10.5M")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2, help="Timed steps, with and without the dispatch mode.")
    parser.add_argument("--operations", type=int, default=0, metavar="N", help="Also list the N slowest operations.")
    parser.add_argument("--only", default="", help="Only the cases whose name begins with this text.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    best, capability = limits(), torch.backends.cpu.get_cpu_capability()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    print(f"{(names or ['CPU'])[0]}, {capability}, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}. Limits: "
          f"products {best['fp32']:.0f} GFLOP/s in fp32 and {best['bf16']:.0f} in bf16, memory "
          f"{best['memory']:.0f} GB/s.\n")  # fmt: skip
    kinds = " | ".join((*KINDS, "Python"))
    print(f"| {options.shape}, {options.batch} x {options.length} | ms | {kinds} | operations | GFLOP/s of products "
          "(of the limit) | GFLOP/s of attention (of the limit) | GB/s of elementwise (of memory) |")  # fmt: skip
    print("|---" * (len(KINDS) + 7) + "|")
    for method, dtype in CASES:
        if f"{method} {dtype}".startswith(options.only):
            profile(options, method, dtype, best)


if __name__ == "__main__":
    main()
