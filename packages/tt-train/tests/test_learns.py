"""Supervised fine-tuning by each kind of adapter learns a task whose answers can be checked."""

import pytest

from tt_train import compose
from tt_train.recipes import sft
from tt_train.records.run_files import read_rows

LORA = ["adapter.rank=16", "adapter.target_modules=all-linear"]
METHODS = {"lora": LORA, "dora": [*LORA, "adapter.use_dora=true"], "qlora": [*LORA, "adapter.quantize_base=true"]}


@pytest.mark.parametrize("method", METHODS)
def test_a_base_of_random_weights_is_taught_answers_that_it_then_generates(
    words, rows_file, tmp_path, monkeypatch, method
):
    """Of 8 questions none is answered before, and each afterwards, by greedy decoding to the end token. A full
    fine-tune is held to the same by ``test_held_out.py``."""
    monkeypatch.setattr("tt_train.run.finish.write_report", lambda runs, **more: ("", ""))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(rows_file.read_text().splitlines(keepends=True)[:8]))
    more = ["micro_batch_size=8", "max_steps=80", "optimizer.lr=1e-2", "samples.exact_match=8", "samples.num=0"]
    overrides = [*words, *more, *METHODS[method], f"data.train={rows}", f"data.eval={rows}"]
    path = sft.main(compose("sft", overrides=[*overrides, f"output_dir={tmp_path / 'run'}"]))
    found = [row["eval_exact_match"] for row in read_rows(path / "metrics.jsonl") if "eval_exact_match" in row]
    assert found == [0.0, 1.0]
