"""A run that is stopped by a signal saves, says where, and goes on when it is asked to."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def wait_until_it_steps(run: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while not (run / "metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_after_saving_and_resume_goes_on(tt, model_dir, rows_file, tmp_path, number, code):
    run = tmp_path / "run"
    words = ["run", "sft", f"model.path={model_dir}", f"data.train={rows_file}", "model.dtype=fp32", "adapter.rank=2"]
    words += ["batch_size=4", "samples.num=0", "-o", str(run)]
    process = subprocess.Popen(
        [sys.executable, "-m", "tt_cli", *words, "max_steps=5000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    wait_until_it_steps(run, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert out == f"{run}\n"
    assert err.splitlines()[-1].startswith(f"stopped by {number.name} after step ")
    assert "Traceback" not in err + (run / "train.log").read_text()
    last = len((run / "metrics.jsonl").read_text().splitlines())
    again = tt(*words, f"max_steps={last + 2}", "--resume", "auto")
    assert again.code == 0, again.err
    assert len((run / "metrics.jsonl").read_text().splitlines()) == last + 2
