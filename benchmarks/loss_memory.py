"""Memory and time of a loss over 2,048 positions and 128,256 words in bf16: chunked beside the logits held whole.

Each case runs in its own process: forward and backward of cross entropy (sft) or of DPO's log-probabilities (dpo, half
of the positions are the chosen answer), with a trained or a frozen output projection. Memory is the growth of the peak
resident size over what inputs and weights take; gradients count. Time is CPU time.

    python benchmarks/loss_memory.py                 # all cases, alternated
    python benchmarks/loss_memory.py sft frozen ours
"""

import itertools
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

POSITIONS, VOCABULARY, WIDTH = 2048, 128_256, 1024
ROUNDS = 2


def naive_log_probs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """As most trainers compute them: all logits in fp32, and a log-softmax of the same size."""
    logits = F.linear(hidden, weight).float()
    return logits.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)


def loss_of(kind: str, way: str, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    if kind == "sft" and way == "naive":
        return F.cross_entropy(F.linear(hidden, weight).float(), labels)
    if kind == "sft":
        from tt_train import linear_cross_entropy

        return linear_cross_entropy(hidden, weight, labels)
    from tt_train import dpo_loss, linear_log_probs

    found = naive_log_probs(hidden, weight, labels) if way == "naive" else None
    log_probs = linear_log_probs(hidden, weight, labels).log_probs if found is None else found
    chosen, rejected = log_probs.view(2, -1).sum(1, keepdim=True)
    return dpo_loss(chosen, rejected, chosen.detach() - 1, rejected.detach())[0].mean()


def resident() -> int:
    """Bytes at this moment."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure(kind: str, head: str, way: str) -> dict[str, float]:
    """MB and seconds of one case in this process."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(VOCABULARY, WIDTH, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
    hidden = torch.empty(POSITIONS, WIDTH, dtype=torch.bfloat16).normal_(generator=generator).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (POSITIONS,), generator=generator)
    loss_of(kind, way, hidden[:32], weight[:256], labels[:32] % 256).backward()  # kernels and imports are loaded
    weight.requires_grad_(head == "trained")
    hidden.grad = None
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before, began = resident(), time.process_time()
    loss_of(kind, way, hidden, weight, labels).backward()
    seconds = time.process_time() - began
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    assert hidden.grad is not None
    assert (weight.grad is not None) == (head == "trained")
    return {"MB": round((peak - before) / 1e6, 1), "seconds": round(seconds, 1)}


def main() -> None:
    cases = list(itertools.product(("sft", "dpo"), ("frozen", "trained"), ("ours", "naive")))
    found: dict[tuple[str, str, str], list[dict[str, float]]] = {case: [] for case in cases}
    for _ in range(ROUNDS):
        for case in cases:
            output = subprocess.run(
                [sys.executable, __file__, *case], capture_output=True, text=True, check=True
            ).stdout
            found[case].append(json.loads(output.splitlines()[-1]))
            print(*case, output.splitlines()[-1], flush=True)
    print("| loss | projection | way | MB beside inputs and weights | CPU seconds |\n|---|---|---|---|---|")
    for case, values in found.items():
        most, least = max(value["MB"] for value in values), min(value["seconds"] for value in values)
        print(f"| {' | '.join(case)} | {most} | {least} |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) == 4:
        print(json.dumps(measure(*sys.argv[1:])))
    else:
        main()
