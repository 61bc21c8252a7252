"""What ``tt plan`` says of nine runs, and the growth of the resident memory that each of them has on this CPU.

python benchmarks/plan_memory.py MODEL [RUN ...]

MODEL: a model directory with a tokenizer, such as a SmolLM2-135M. RUN: the names of some of the runs; all by default.
Each run makes three steps in a process of its own.
"""

import json
import random
import sys
import tempfile
from pathlib import Path

import torch
from torch.multiprocessing.spawn import start_processes

from tt_train import compose
from tt_train.job import assemble
from tt_train.models.plan import kind_of, measure, plan

RUNS = {
    "full": ["data.max_seq_len=512"],
    "LoRA": ["data.max_seq_len=512", "adapter.rank=8"],
    "QLoRA": ["data.max_seq_len=512", "adapter.rank=8", "adapter.quantize_base=true"],
    "checkpointing": ["data.max_seq_len=1024", "activation_checkpointing=true"],
    "LoRA, checkpointing": ["data.max_seq_len=1024", "adapter.rank=8", "activation_checkpointing=true"],
    "long": ["data.max_seq_len=2048", "adapter.rank=8", "micro_batch_size=1", "batch_size=2"],
    "packed": ["data.max_seq_len=1024", "data.packing=true", "micro_batch_size=1", "batch_size=2"],
    "dpo": ["data.max_seq_len=512", "adapter.rank=8", "micro_batch_size=1", "batch_size=2"],
    "2 ranks": ["data.max_seq_len=512", "batch_size=8"],
}


def one(rank: int, name: str, model: str, folder: str) -> None:
    torch.set_num_threads(1)
    size = 2 if name == "2 ranks" else 1
    if size > 1:
        torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=size)
    recipe, rows = ("dpo", "pairs") if name == "dpo" else ("sft", "rows")
    words = [f"model.path={model}", f"data.train={folder}/{rows}.jsonl", "max_steps=20", "batch_size=4", *RUNS[name]]
    config = compose(recipe, overrides=words)
    job = assemble(config, rows=kind_of(config))
    said = plan(job, ranks=size).peak.total
    grown = measure(job).growth
    if rank == 0:
        off = 100 * (said / grown - 1)
        print(f"| {name} | {said / 2**30:.2f} | {grown / 2**30:.2f} | {off:+.1f} % |", flush=True)


def main() -> None:
    model, *names = sys.argv[1:]
    if unknown := set(names) - set(RUNS):
        sys.exit(f"no such run: {', '.join(sorted(unknown))}; there are: {', '.join(RUNS)}")
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        words = [f"word{number}" for number in range(5000)]
        with (Path(folder) / "rows.jsonl").open("w") as file:
            for index in range(200):
                ask, say = f"Tell me story {index}", " ".join(draw.choices(words, k=draw.randint(300, 1200)))
                turns = [{"role": "user", "content": ask}, {"role": "assistant", "content": say}]
                file.write(json.dumps({"messages": turns}) + "\n")
        with (Path(folder) / "pairs.jsonl").open("w") as file:
            for index in range(100):
                chosen, rejected = (" ".join(draw.choices(words, k=draw.randint(60, 200))) for _ in range(2))
                row = {"prompt": f"Tell me story {index}", "chosen": chosen, "rejected": rejected}
                file.write(json.dumps(row) + "\n")
        print("| run | planned, GiB | measured, GiB | off |\n|---|---|---|---|")
        for name in names or RUNS:
            processes = 2 if name == "2 ranks" else 1
            start_processes(one, (name, model, folder), nprocs=processes, start_method="spawn")


if __name__ == "__main__":
    main()
