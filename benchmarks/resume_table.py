"""Exact resume: runs stopped twice by a signal, in the middle of an epoch, against the same runs left alone.

Each row is a method with a feature, on one process and on two (gloo). A run is stopped by SIGTERM to its last rank
after step 3 and again after step 7, resumed each time, and compared with an undisturbed run of 12 steps: every loss,
gradient norm, held-out loss and digest of the rows, and every byte of the result.

Usage: python benchmarks/resume_table.py [--only WORD] [--ranks 1 2]
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch._dynamo  # once, before ranks fork
import torch.distributed.fsdp

ROOT = Path(__file__).parents[1]
STOPS = (3, 7)
LORA = ["adapter.rank=4", "adapter.dropout=0.1", "adapter.target_modules=all-linear"]
METHODS = {
    "full": [],
    "full, bf16": ["model.dtype=bf16"],
    "LoRA": LORA,
    "LoRA, sharded": [*LORA, "parallel.shard=2"],
    "DoRA": [*LORA, "adapter.use_dora=true"],
    "QLoRA": [*LORA, "adapter.quantize_base=true"],
    "dpo, LoRA": [*LORA[:1], *LORA[2:]],
    "dpo, full": [],
    "kd, full": ["kd.teacher_dtype=fp32"],
    "kd, LoRA": [*LORA, "kd.teacher_dtype=fp32"],
    "qat, full": [],
    "qat, LoRA": [*LORA[:1], *LORA[2:]],
}
FEATURES = {
    "": [],
    "packing": ["data.packing=true"],
    "streaming": ["data.streaming=true"],
    "streaming, packing": ["data.streaming=true", "data.packing=true"],
    "2 workers": ["data.num_workers=2"],
    "saved in the background": ["save_async=true", "save_every=2"],
    "checkpointing": ["activation_checkpointing=true"],
    "best step": ["data.eval=0.2", "eval_every=2", "save_every=4"],
}
ONLY_BASE = {
    "full, bf16",
    "LoRA, sharded",
    "DoRA",
    "QLoRA",
    "kd, full",
    "kd, LoRA",
    "qat, full",
    "qat, LoRA",
}  # with these two features only: the rest is shared code
FEW = {"", "packing"}


def cases():
    for method, words in METHODS.items():
        for feature, more in FEATURES.items():
            if (method in ONLY_BASE and feature not in FEW) or (method.startswith("dpo") and "streaming" in feature):
                continue
            yield method, feature, [*words, *more]


def make_inputs(folder):
    """A tiny Llama with a tokenizer, 60 rows of several lengths and 60 pairs."""
    sys.path.insert(0, str(ROOT / "packages" / "tt-cli" / "tests"))
    from conftest import WORDS, write_model

    write_model(folder / "model")
    with (folder / "rows.jsonl").open("w") as rows, (folder / "pairs.jsonl").open("w") as pairs:
        for number in range(60):
            said = " ".join(WORDS[(number * k) % len(WORDS)] for k in range(1, 2 + number % 5))
            prompt = f"Repeat {said} {number}."
            rows.write(json.dumps({"instruction": prompt, "output": said}) + "\n")
            pairs.write(json.dumps({"prompt": prompt, "chosen": said, "rejected": f"no, {WORDS[number % 8]}"}) + "\n")


def stopped_console(stop_at, is_last):
    from tt_train.run.console import Console

    class Silent(Console):
        def note(self, text):
            pass

        warn = note

        def step(self, row):
            if is_last and row["step"] == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)

    return Silent()


def train(rank, size, store, recipe, words, stop_at, resume):
    torch.set_num_threads(1)
    import tt_train.run.finish
    from tt_train import Interrupted, compose
    from tt_train.recipes import dpo, kd, qat, sft

    tt_train.run.finish.write_report = lambda runs: ("", "")
    if size > 1:
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.FileStore(str(store), size), rank=rank, world_size=size
        )
    module = {"sft": sft, "dpo": dpo, "kd": kd, "qat": qat}[recipe]
    try:
        module.main(compose(recipe, overrides=words), console=stopped_console(stop_at, rank == size - 1), resume=resume)
        assert stop_at is None, "the signal came too late"
    except Interrupted as stop:
        if stop.exit_code != 143:
            raise


def start(folder, number, size, *arguments):
    store = folder / f"store{number}"
    torch.multiprocessing.start_processes(train, args=(size, store, *arguments), nprocs=size, start_method="fork")


def measure(folder, method, words, size):
    from tt_train.run.compare import compare

    recipe = method.partition(",")[0]
    recipe = recipe if recipe in ("dpo", "kd", "qat") else "sft"
    words = [*words, f"kd.teacher={folder / 'model'}"] if recipe == "kd" else words
    base = [f"model.path={folder / 'model'}", "model.dtype=fp32", "device=cpu", "batch_size=8", "micro_batch_size=2",
            "max_steps=12", "samples.num=0", "data.max_seq_len=96", "optimizer.lr=2e-3", "save_every=5",
            f"data.train={folder / ('pairs' if recipe == 'dpo' else 'rows')}.jsonl", *words]  # fmt: skip
    runs = [folder / name for name in ("whole", "parts")]
    for run in runs:
        shutil.rmtree(run, ignore_errors=True)
    whole, parts = ([*base, f"output_dir={run}"] for run in runs)
    start(folder, time.monotonic_ns(), size, recipe, whole, None, None)
    for stop_at, resume in ((STOPS[0], None), (STOPS[1], "auto"), (None, "auto")):
        start(folder, time.monotonic_ns(), size, recipe, parts, stop_at, resume)
    same, lines = compare(runs[1], runs[0])
    return "exact" if same and lines[0].endswith("with the same result") else lines[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="methods and features with this word")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder)
        print("| method | with | " + " | ".join(f"{size} processes" for size in options.ranks) + " |", flush=True)
        print("|---|---|" + "---|" * len(options.ranks), flush=True)
        for method, feature, words in cases():
            if options.only not in f"{method} {feature}":
                continue
            found = ["-" if method == "LoRA, sharded" and size == 1 else measure(folder, method, words, size)
                     for size in options.ranks]  # fmt: skip
            failed += sum(one not in ("exact", "-") for one in found)
            print(f"| {method} | {feature or '-'} | {' | '.join(found)} |", flush=True)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
