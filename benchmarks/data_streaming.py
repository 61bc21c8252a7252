"""Seconds from load_dataset to the first batch of a large jsonl: streamed, and streamed with packing.

python benchmarks/data_streaming.py [--rows 1000000] > benchmarks/results/data_streaming.md
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from data_packing import prepare

CASES = {"streamed": {}, "streamed, packed": {"packing": True}, "resumed in the middle": {"start": 0.5}}


def measure(folder: Path, case: str, rows: int) -> dict[str, float]:
    import torch  # noqa: F401

    import tt_data

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    options = dict(CASES[case])
    start = int(options.pop("start", 0) * rows) // 16
    tokenizer = tt_data.load_tokenizer(folder / "model")
    dataset = tt_data.load_dataset(folder / "rows.jsonl", tokenizer, max_seq_len=1024, streaming=True, **options)
    next(tt_data.batches(dataset, batch_size=16, start_step=start))
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"wall": time.perf_counter() - begin, "cpu": time.process_time(), "peak_mb": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--case")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(arguments.folder, arguments.case, arguments.rows)))
        return
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), arguments.rows)
        size = (Path(name) / "rows.jsonl").stat().st_size / 1e6
        print(
            f"# First batch of 16 from {arguments.rows:,} rows of text ({size:.0f} MB), with a buffer of 10,000 rows\n"
        )
        print("| | wall s | peak MB above imports |\n|---|---|---|")
        for case in CASES:
            command = [sys.executable, __file__, "--case", case, "--folder", name, "--rows", str(arguments.rows)]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found = json.loads(out.splitlines()[-1])
            print(f"| {case} | {found['wall']:.2f} | {found['peak_mb']:.0f} |")


if __name__ == "__main__":
    main()
