"""What is measured of a workload, for every contestant: seconds, memory, and whether the work was done.

A workload is a function of a request that imports what it needs and returns the function that is timed. That one
returns ``work`` (tokens, rows, MB) and what shows that the work was done: ``equal`` (figures that are those of the
other contestants) and ``positive`` (figures above 0).
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from workloads import SHAPES, tokens, trained

Request = dict[str, Any]
Run = Callable[[], dict[str, Any]]


def memory_mb(key: str) -> float:
    """VmRSS (resident now) or VmHWM (the most since the last reset), in MB of 10^6 bytes."""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) * 1024 / 1e6


def reset_peak() -> None:
    """VmHWM starts again at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def cpu_seconds() -> float:
    """Of this process and its children, those that still run included."""
    own, ticks = os.times(), os.sysconf("SC_CLK_TCK")
    children = " ".join(file.read_text() for file in Path("/proc/self/task").glob("*/children")).split()
    stats = [Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split() for child in children]
    return sum(own[:4]) + sum(int(spent) for stat in stats for spent in stat[11:15]) / ticks


def timed(run: Run) -> dict[str, Any]:
    """What ``run`` returns, with CPU and wall seconds and peak memory: whole, and above what was there before."""
    before, cpu, wall = memory_mb("VmRSS"), cpu_seconds(), time.perf_counter()
    reset_peak()
    found = run()
    seconds = {"cpu_s": cpu_seconds() - cpu, "wall_s": time.perf_counter() - wall}
    peak = memory_mb("VmHWM")
    return {**seconds, "peak_mb": peak, "grown_mb": peak - before} | found


def train(build: Callable[[], tuple[Callable[..., tuple[float, float]], list[Any]]], request: Request) -> Run:
    """The run of a workload that trains: ``build`` loads a model and returns its step and its trained parameters.

    ``step(batch, norm=True)`` returns the loss and the norm of the gradient. The first one is not timed. With ``ranks``
    this many processes share the rows of the batch; their CPU seconds are added up.
    """
    import torch

    size, device = request.get("ranks", 1), request.get("device", "cpu")
    batch = {name: values.to(device) for name, values in tokens(request).items()}
    work = trained(batch) * request["steps"]

    def one(rank: int) -> dict[str, Any]:
        torch.set_num_threads(request.get("threads", 1))
        torch.manual_seed(0)
        own = {name: values[rank::size] for name, values in batch.items()}
        before = memory_mb("VmRSS")
        reset_peak()
        step, parameters = build()
        loading = memory_mb("VmHWM") - before
        sums = sums_of(parameters)
        first, norm = step(own, norm=True)
        loss = first
        reset_peak()
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(request["steps"]):
            loss, _ = step(own)
        if device != "cpu":
            torch.cuda.synchronize()
        seconds = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
        peak = memory_mb("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated() / 1e6
        moved = math.dist(sums, sums_of(parameters))
        checks = {"gradient norm": norm, "change of the parameters": moved}
        if request["method"] == "full":  # with an adapter it may fall by less than bf16 can show
            checks["fall of the loss"] = first - loss
        return {**seconds, "peak_mb": peak, "grown_mb": peak - (before if device == "cpu" else 0), "work": work,
                "loading_mb": loading, "equal": {"first loss": first}, "positive": checks}  # fmt: skip

    return (lambda: one(0)) if size == 1 else lambda: _ranks(one, size, request["folder"])


def sums_of(parameters: list[Any]) -> list[float]:
    """The sum of the absolute values of each parameter: another one after an update."""
    return [float(parameter.detach().double().abs().sum()) for parameter in parameters]


def _ranks(one: Callable[[int], dict[str, Any]], size: int, folder: str) -> dict[str, Any]:
    """``one`` on ranks joined by gloo: CPU seconds and memory added up, the rest of rank 0."""
    import tempfile

    from torch.multiprocessing import start_processes

    with tempfile.TemporaryDirectory(dir=folder) as name:
        start_processes(_rank, (one, size, name), nprocs=size, start_method="fork")
        found = [json.loads((Path(name) / f"{rank}.json").read_text()) for rank in range(size)]
    return found[0] | {key: sum(each[key] for each in found) for key in ("cpu_s", "peak_mb", "grown_mb")}


def _rank(rank: int, one: Callable[[int], dict[str, Any]], size: int, folder: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=size)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(one(rank)))


def plain_step(
    loss_of: Callable[[Any], Any], parameters: list[Any], lr: float = 1e-3
) -> Callable[..., tuple[float, float]]:
    """A step as most people write it: fused AdamW, no clipping."""
    import torch

    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=True)

    def step(batch: Any, norm: bool = False) -> tuple[float, float]:
        loss = loss_of(batch)
        loss.backward()
        found = math.hypot(*(float(p.grad.double().norm()) for p in parameters if p.grad is not None)) if norm else 0.0
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach()), found

    return step


def epoch(batches: Iterable[Any], step: Callable[..., tuple[float, float]], parameters: list[Any]) -> dict[str, Any]:
    """A step for each batch of a whole data set."""
    before, work, first, norms = sums_of(parameters), 0, math.nan, []
    for batch in batches:
        loss, norm = step(batch, norm=not norms)
        first, norms = (first if norms else loss), [*norms, norm]
        work += trained(batch)
    moved = math.dist(before, sums_of(parameters))
    checks = {"gradient norm": norms[0], "change of the parameters": moved}
    return {"work": work, "equal": {"first loss": first, "trained tokens": work}, "positive": checks}


def loss_run(loss_of: Callable[[Any, Any, Any], Any], request: Request) -> Run:
    """Forward and backward of ``loss_of(hidden [N, D], weight [V, D], labels [N])``, a mean, over a frozen or trained
    head. What it takes beside inputs and weights is ``grown_mb``."""
    import torch

    positions, vocabulary, width = request["positions"], request["vocabulary"], request["width"]
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(vocabulary, width, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
    hidden = torch.empty(positions, width, dtype=torch.bfloat16).normal_(generator=generator).requires_grad_()
    labels = torch.randint(0, vocabulary, (positions,), generator=generator)
    loss_of(hidden[:32], weight[:256], labels[:32] % 256).backward()  # kernels and imports are loaded
    weight.requires_grad_(request["head"] == "trained")
    hidden.grad = None

    def run() -> dict[str, Any]:
        loss = loss_of(hidden, weight, labels)
        loss.backward()
        norms = {"gradient of the hidden states": float(hidden.grad.float().norm())}
        if request["head"] == "trained":
            norms["gradient of the head"] = float(weight.grad.norm())
        return {"work": positions, "equal": {"loss": float(loss.detach())}, "positive": norms}

    return run


def layer_run(layer: Callable[[Any], Any], request: Request) -> Run:
    """Forward and backward of one linear layer, ``repeats`` times after the first."""
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[request["dtype"]]
    x = torch.randn(request["rows"], request["inputs"], dtype=dtype, requires_grad=True)
    grad = torch.randn(request["rows"], request["outputs"], dtype=dtype)
    layer(x).backward(grad)

    def run() -> dict[str, Any]:
        for _ in range(request["repeats"]):
            x.grad = None
            layer(x).backward(grad)
        return {"work": request["repeats"], "positive": {"gradient of the input": float(x.grad.float().norm())}}

    return run


def prompts_of(request: Request) -> list[list[int]]:
    """``batch`` prompts of ``prompt`` tokens; ragged ones are between a quarter as long and that."""
    import random

    draw, longest = random.Random(3), request["prompt"]
    sizes = [draw.randint(longest // 4, longest) if request.get("ragged") else longest for _ in range(request["batch"])]
    return [[draw.randrange(1, SHAPES[request["shape"]][0]) for _ in range(size)] for size in sizes]


def evaluated(model: str, words: dict[str, Any], request: Request) -> Run:
    """One task of lm-eval by a model that it knows; loading is not timed, making requests of rows is."""
    import lm_eval
    import transformers  # noqa: F401  (lm-eval imports it for its report, if nobody has before)
    from lm_eval.api.registry import get_model
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=request["tasks"], include_defaults=False)
    built = get_model(model)(**words, batch_size=request["batch"])
    _ = built.max_length  # of tt: its weights load with the first question

    def run() -> dict[str, Any]:
        name = f"bench_{request['task']}"
        found = lm_eval.simple_evaluate(built, tasks=[name], task_manager=manager, bootstrap_iters=0)
        values = {key: value for key, value in found["results"][name].items() if isinstance(value, float)}
        answers = [sample["resps"] for sample in found["samples"][name]]
        return {"work": request["rows"], "equal": values | {"sum of the answers": _sum(answers)}}

    return run


def _sum(answers: Any) -> float:
    """Log-likelihoods added up, and the lengths of texts."""
    if isinstance(answers, list | tuple):
        return sum(map(_sum, answers))
    return float(len(answers) if isinstance(answers, str) else answers)
