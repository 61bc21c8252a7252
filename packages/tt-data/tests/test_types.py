"""What mypy --strict sees of tt_data in a program that uses it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import tt_data

PROGRAM = """
import tt_data
from torch import Tensor

tokenizer = tt_data.load_tokenizer("model")
rows: tt_data.TokenDataset = tt_data.load_dataset("rows.jsonl", tokenizer, max_seq_len=64, columns={"text": "body"})
packed: tt_data.PackedDataset = tt_data.load_dataset(["a.jsonl", "b.jsonl"], tokenizer, packing=True, max_seq_len=64)
mix: tt_data.MixedDataset = tt_data.load_dataset({"a.jsonl": 0.7, "b.jsonl": 0.3}, tokenizer)
stream: tt_data.StreamDataset = tt_data.load_dataset([{"text": "a"}], tokenizer, streaming=True)
packs: tt_data.Stream = tt_data.load_dataset("rows.jsonl", tokenizer, streaming=True, packing=True, max_seq_len=64)


def load(streaming: bool) -> tt_data.Dataset | tt_data.Stream:
    return tt_data.load_dataset("rows.jsonl", tokenizer, streaming=streaming)


def lengths(dataset: tt_data.Dataset) -> list[int]:
    row: tt_data.Row = dataset[0]
    ids: list[int] = row["input_ids"]
    return [len(ids), dataset.length(0), dataset.report["truncated"], *(len(text) for text, _ in dataset.rendered(0))]


def use(backend: tt_data.Backend) -> int:
    return backend.vocab_size


every: list[list[int]] = [lengths(dataset) for dataset in (rows, packed, mix, tt_data.Subset(mix, [1]))]
batch: tt_data.Batch = next(tt_data.batches(rows, batch_size=2))
ids: Tensor = batch["input_ids"]
micro: list[tt_data.Batch] = next(tt_data.batches(load(True), batch_size=4, micro_batch_size=2))
mine: tt_data.Batch = next(tt_data.batches([{"input_ids": [1, 2], "labels": [1, 2]}], batch_size=1))
sample: str = tt_data.as_text(tt_data.show(rows, limit=1)[0])
share: float = tt_data.stats(rows)["share_trained"]
lines: list[str] = tt_data.summary_lines(packed.report)
"""
MISTAKES = {
    "tt_data.load_datset": 'Module has no attribute "load_datset"',
    'tt_data.load_dataset("rows.jsonl", tokenizer, max_sequence_len=64)': '"max_sequence_len"',
    'tt_data.load_dataset("rows.jsonl", tokenizer, train_on="user")': "No overload variant",
    'rows[0]["input_id"]': 'TypedDict "Row" has no key "input_id"',
    'rows.report["trunkated"]': 'TypedDict "Report" has no key "trunkated"',
    "rows.wher(0)": '"TokenDataset" has no attribute "wher"',
    'load(False).where("a")': 'Argument 1 to "where" of "Dataset" has incompatible type "str"',
    "len(stream)": 'Argument 1 to "len" has incompatible type "StreamDataset"',
    "next(tt_data.batches(rows, batch_size=2, micro_batch_size=1)).keys()": 'has no attribute "keys"',
    'tokenizer.encode_promt("a")': '"Tokenizer" has no attribute "encode_promt"',
}


def test_mypy_sees_the_types_of_a_program_and_every_mistake_in_one(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    right, wrong = tmp_path / "right.py", tmp_path / "wrong.py"
    right.write_text(PROGRAM)
    wrong.write_text(PROGRAM + "".join(f"{line}\n" for line in MISTAKES))
    (tmp_path / "mypy.ini").write_text("[mypy-torch.*]\nfollow_imports = skip\n")  # half a minute
    source = str(Path(tt_data.__file__).parents[1])
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--cache-dir", str(tmp_path / "cache")]
    told = subprocess.run(
        [*command, str(right), str(wrong)], capture_output=True, text=True, cwd=tmp_path,
        env={"MYPYPATH": source, "PATH": "", "HOME": str(tmp_path)}, timeout=600,
    )  # fmt: skip
    errors = [line for line in told.stdout.splitlines() if "error:" in line]
    assert not [line for line in errors if line.startswith("right.py")], told.stdout
    first = PROGRAM.count("\n") + 1
    found = dict.fromkeys(range(first, first + len(MISTAKES)), "")
    for line in errors:
        if line.startswith("wrong.py"):  # others are about libraries that this package uses
            found[int(line.split(":")[1])] += line
    missing = [text for text, line in zip(MISTAKES.values(), found.values(), strict=True) if text not in line]
    assert not missing, told.stdout
