"""Files of a run directory: manifest, rows, config, training state and lock, and the page that is made of them."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from tt_train.models.origin import find_origin
from tt_train.models.prompt_form import trained_on
from tt_train.records.run_files import read_manifest, read_rows
from tt_train.report.page import page
from tt_train.report.read import read_runs
from tt_train.report.summary import part_name, tokens_per_second, training_loss
from tt_train.run.listing import list_runs
from tt_train.run.lock import writer_of
from tt_train.run.saved import check_state

MANIFEST = {
    "format": 1, "state": "finished", "recipe": "sft", "method": "qlora", "base_model": "org/base",
    "imports": {"m": "ab"}, "tokenizer": "f" * 64, "started": "2026-01-01T00:00:00+00:00",
    "device": "cuda:0", "command": "tt run sft a=1",
    "config": {"model": {"path": "base", "dtype": "bf16"}, "adapter": {"rank": 8}, "data": {"template": None}},
    "data": {"rows": 3, "report": {"schema": "openai", "form": "chat", "dropped": {"empty": 1}}, "held_out_rows": 0},
    "environment": {"devices": ["a", "b"], "cpu": "c", "packages": {"torch": "2"}}, "git": {"commit": "a" * 40},
    "summary": {"steps": 2, "loss_last": 1.0}, "parameters": 10, "trainable": 2, "extension": None,
}  # fmt: skip
ROWS = [
    {"step": step, "epoch": step / 2, "loss": 1.0 / (step + 1), "lr": 1e-4, "grad_norm": 1.0, "tokens": 9 * step}
    | {"tokens_per_s": 5.0, "memory_gib": 1.0, "elapsed_s": 1.0 * step, "eta_s": 1.0, "eval_loss": 2.0}
    for step in range(12)
]
SAMPLE = {"step": 0, "prompt": "p", "turns": [{"role": "user", "content": "p"}], "expected": "a", "generation": "b"}
CONFIG = (
    "recipe: sft\nmodel:\n  path: base\n  dtype: bf16\nadapter:\n  rank: 8\n  alpha: 16.0\ndata:\n  train: rows.jsonl\n"
)
STATE = {
    "step": 2, "tokens": 9, "elapsed_s": 1.0, "row": {"step": 2, "loss": 1.0}, "best": {"step": 1, "eval_loss": 1.0},
    "evaluations_since_best": 1, "judged": 1, "data": "abc", "steps_total": 6,
}  # fmt: skip
LOCK = {"pid": 4711, "host": "node-3", "born": "8a1f 912345"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    logging.getLogger("tt_train").setLevel(logging.CRITICAL)
    folder = tmp_path / "runs" / "one"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "."}')
    (folder / "manifest.json").write_text(json.dumps(MANIFEST))
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "samples.jsonl").write_text(json.dumps(SAMPLE) + "\n")
    return folder


def test_any_manifest_is_read_or_one_of_our_errors(run: Path, fuzz: Any) -> None:
    def read(manifest: object) -> None:
        (run / "manifest.json").write_text(json.dumps(manifest))
        list_runs(run.parent)
        page(read_runs([run]))
        json.dumps(read_manifest(run))
        trained_on(run)
        find_origin(run)

    fuzz(read, fuzz.mutated_json(MANIFEST))


def test_any_bytes_of_a_manifest_are_read_or_one_of_our_errors(run: Path, fuzz: Any) -> None:
    def read(data: bytes) -> None:
        (run / "manifest.json").write_bytes(data)
        list_runs(run.parent)
        read_manifest(run)

    fuzz(read, fuzz.mutated(json.dumps(MANIFEST, indent=2).encode()))


def test_any_rows_are_summed_up(run: Path, fuzz: Any) -> None:
    def read(rows: object) -> None:
        lines = "".join(json.dumps(row) + "\n" for row in (rows if isinstance(rows, list) else [rows]))
        for name in ("metrics.jsonl", "samples.jsonl"):
            (run / name).write_text(lines)
        found = list(read_rows(run / "metrics.jsonl"))
        training_loss(found), part_name(found), tokens_per_second(found)
        list_runs(run.parent)
        page(read_runs([run]))

    fuzz(read, fuzz.mutated_json([*ROWS, SAMPLE, {**SAMPLE, "step": 3}]))


def test_any_bytes_of_rows_and_config_are_a_page(run: Path, fuzz: Any) -> None:
    def read(data: bytes) -> None:
        for name in ("metrics.jsonl", "samples.jsonl", "config.yaml"):
            (run / name).write_bytes(data)
        list_runs(run.parent)
        page(read_runs([run]))

    fuzz(read, fuzz.mutated("".join(json.dumps(row) + "\n" for row in [*ROWS, SAMPLE]).encode(), CONFIG.encode()))


def test_any_state_is_a_runs_or_one_of_our_errors(tmp_path: Path, fuzz: Any) -> None:
    fuzz(lambda state: check_state(tmp_path, 2, state), fuzz.mutated_json(STATE))


def test_any_lock_has_a_writer_or_none(tmp_path: Path, fuzz: Any) -> None:
    def read(data: bytes) -> None:
        (tmp_path / "run.lock").write_bytes(data)
        writer_of(tmp_path)

    fuzz(read, fuzz.mutated(json.dumps(LOCK).encode()))
