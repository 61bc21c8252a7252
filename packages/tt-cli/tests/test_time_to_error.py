"""Wrong input is answered by a fresh process: one line, exit 2, no traceback, nothing written."""

import json
import os

import pytest

GOOD = '{"prompt": "a", "completion": "b"}\n'
FILES = {
    "rows.jsonl": GOOD,
    "empty.jsonl": "",
    "broken.jsonl": GOOD + '{"prompt": "a", \n' + GOOD,
    "columns.jsonl": json.dumps({"promt": "a", "answer": "b"}) + "\n",
    "type.yaml": "optimizer:\n  lr: fast\n",
    "key.yaml": "learning_rate: 1\n",
    "unsafe.yaml": "model: !!python/object/apply:os.system [touch canary]\n",
    "broken.yaml": "a: [1\n",
}
CASES = {
    "verb": (["rnu", "sft"], "did you mean 'run'?"),
    "recipe": (["run", "stf", "..."], "did you mean 'sft'?"),
    "config": (["run", "llama2/7b_lroa", "..."], "did you mean 'llama2/7b_lora'?"),
    "key": (["run", "sft", "...", "optimizer.lrr=1"], "did you mean 'optimizer.lr'?"),
    "key in a file": (["run", "key.yaml", "..."], "key.yaml:1: learning_rate"),
    "type": (["run", "sft", "...", "batch_size=many"], "batch_size: expected a whole number, got the text 'many'"),
    "type in a file": (["run", "type.yaml", "..."], "type.yaml:2: optimizer.lr: expected a number"),
    "broken file": (["run", "broken.yaml", "..."], "broken.yaml"),
    "code in a file": (["run", "unsafe.yaml", "..."], "unsafe.yaml:1"),
    "model": (["run", "sft", "...", "model.path=no/where"], "no/where"),
    "rows": (["run", "sft", "...", "data.train=rosw.jsonl"], "rosw.jsonl"),
    "columns": (["run", "sft", "...", "data.train=columns.jsonl"], "columns.jsonl:1"),
    "broken rows": (["run", "sft", "...", "data.train=broken.jsonl"], "broken.jsonl:2"),
    "empty rows": (["run", "sft", "...", "data.train=empty.jsonl"], "empty.jsonl"),
    "option": (["run", "sft", "...", "--dryrun"], "did you mean '--dry-run'?"),
    "run": (["chat", "no/where"], "no/where"),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_input_is_one_line(tt_process, model_dir, tmp_path, case):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    words, part = CASES[case]
    good = [f"model.path={model_dir}", "data.train=rows.jsonl", "adapter.rank=2", "max_steps=1"]
    words = [word for given in words for word in (good if given == "..." else [given])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_TOKEN": "hf_canary_of_the_test"}
    answer = tt_process(*words, cwd=tmp_path, env=environment)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("error: ")
    assert answer.err.count("\n") == 1
    assert part in answer.err
    assert "canary" not in answer.err
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
