"""Seconds and memory until the first packed batch of 200,000 short rows: tt-data, TRL and torchtune, alternated.

    python benchmarks/data_packing.py [--rows N] [--runs 3] [--torchtune PYTHON] > benchmarks/results/data_packing.md

Every contestant reads the same jsonl of seeded made-up sentences with the same 8k byte-level tokenizer, ends each row
with the end token, packs whole rows into 1024 tokens in its own recommended way and gives a batch of 4. Each run is a
process of its own with one thread, nothing cached. torchtune (0.6.1 with torchao 0.15.0) may live in another
interpreter: --torchtune names it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LENGTH, BATCH, EOS = 1024, 4, "<|endoftext|>"


def sentences(seed: int) -> Callable[[int], str]:
    """Seeded sentences of made-up words, frequent and rare ones."""
    rng = random.Random(seed)
    syllables = [a + b for a in "bcdfghjklmnprstvw" for b in ("a", "e", "i", "o", "u", "ai", "ou", "er")]
    words = ["".join(rng.choices(syllables, k=rng.choice([1, 2, 2, 3, 3, 4]))) for _ in range(20_000)]
    weights = list(itertools.accumulate(1 / (i + 10) for i in range(len(words))))
    return lambda count: " ".join(rng.choices(words, cum_weights=weights, k=count)).capitalize() + "."


def prepare(folder: Path, rows: int) -> None:
    """``rows.jsonl`` and a model directory with a tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    sentence, rng = sentences(0), random.Random(1)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8192, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((sentence(200) for _ in range(3000)), trainer)
    (folder / "model").mkdir()
    tokenizer.save(str(folder / "model" / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "pad_token": EOS}
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "torchtune.json").write_text(json.dumps({**config, "bos_token": EOS}))  # it asks for a bos token
    with (folder / "rows.jsonl").open("w") as stream:
        for _ in range(rows):
            stream.write(json.dumps({"text": sentence(rng.randint(8, 40))}) + "\n")


def run_tt(folder: Path) -> tuple[int, float]:
    import tt_data

    tokenizer = tt_data.load_tokenizer(folder / "model")
    dataset = tt_data.load_dataset(folder / "rows.jsonl", tokenizer, max_seq_len=LENGTH, packing=True)
    batch = next(tt_data.batches(dataset, batch_size=BATCH))
    return batch["input_ids"].shape[0], dataset.report["efficiency"]


def run_trl(folder: Path) -> tuple[int, float]:
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    rows = load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train")
    tiny = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8192)
    config = SFTConfig(
        output_dir=str(folder / "out"), packing=True, max_length=LENGTH, per_device_train_batch_size=BATCH,
        report_to=[], use_cpu=True, bf16=False,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    trainer = SFTTrainer(LlamaForCausalLM(tiny), config, train_dataset=rows, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    packs = trainer.train_dataset
    tokens = sum(map(len, packs["input_ids"]))
    return int(bool(batch)), tokens / (len(packs) * LENGTH)


def run_torchtune(folder: Path) -> tuple[int, float]:
    from torch.utils.data import DataLoader
    from torchtune.data import padded_collate_packed
    from torchtune.datasets import PackedDataset, TextCompletionDataset
    from torchtune.modules.transforms.tokenizers import HuggingFaceBaseTokenizer

    class Text(HuggingFaceBaseTokenizer):  # what TextCompletionDataset asks of a tokenizer
        max_seq_len = LENGTH

    tokenizer = Text(
        str(folder / "model" / "tokenizer.json"),
        tokenizer_config_json_path=str(folder / "torchtune.json"),
    )
    source = TextCompletionDataset(
        tokenizer, source="json", data_files=str(folder / "rows.jsonl"), split="train", add_eos=True
    )
    packed = PackedDataset(source, max_seq_len=LENGTH)
    batch = next(iter(DataLoader(packed, batch_size=BATCH, collate_fn=padded_collate_packed)))
    tokens = sum(int((pack["labels"] != -100).sum()) for pack in packed.packs)
    return batch["tokens"].shape[0], tokens / (len(packed) * LENGTH)


CONTESTANTS = {"tt-data": run_tt, "TRL": run_trl, "torchtune": run_torchtune}
IMPORTS = {
    "tt-data": "torch tokenizers tt_data",
    "TRL": "torch tokenizers datasets transformers trl trl.trainer.sft_trainer",
    "torchtune": "torch tokenizers datasets torchtune.datasets torchtune.data",
}


def measure(name: str, folder: Path) -> dict[str, Any]:
    """One run in this process: from after the imports to the first batch."""
    for module in IMPORTS[name].split():
        __import__(module)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cpu, wall = time.process_time(), time.perf_counter()
    rows, fill = CONTESTANTS[name](folder)
    seconds = time.perf_counter() - wall
    return {
        "rows": rows, "fill": fill, "wall": seconds, "cpu": time.process_time() - cpu,
        "peak_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
    }  # fmt: skip


def spawn(python: str, name: str, folder: Path) -> dict[str, Any] | None:
    """``measure`` in a fresh process, with nothing cached. None where the contestant is not installed."""
    with tempfile.TemporaryDirectory() as home:
        environment = {
            **os.environ, "HF_HOME": home, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        command = [python, __file__, "--measure", name, "--folder", str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--torchtune", default=sys.executable)
    parser.add_argument("--measure")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.folder)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, arguments.rows)
        size = (folder / "rows.jsonl").stat().st_size / 1e6
        results: dict[str, list[dict[str, Any]]] = {contestant: [] for contestant in CONTESTANTS}
        for _ in range(arguments.runs):
            for contestant, values in results.items():
                python = arguments.torchtune if contestant == "torchtune" else sys.executable
                found = spawn(python, contestant, folder)
                if found:
                    values.append(found)
    report(results, arguments.rows, size)


def report(results: dict[str, list[dict[str, Any]]], rows: int, size: float) -> None:
    """A table of medians."""
    print(f"# First packed batch of {rows:,} rows of text ({size:.0f} MB), packs of {LENGTH} tokens\n")
    print(f"Python {platform.python_version()}, {platform.machine()}, one thread; medians of alternated runs.\n")
    print("| | CPU s | wall s | peak MB above imports | fill | runs |\n|---|---|---|---|---|---|")
    for contestant, values in results.items():
        if values:
            cpu, wall, peak, fill = (
                statistics.median(value[key] for value in values) for key in ("cpu", "wall", "peak_mb", "fill")
            )
            print(f"| {contestant} | {cpu:.1f} | {wall:.1f} | {peak:.0f} | {fill:.1%} | {len(values)} |")


if __name__ == "__main__":
    main()
