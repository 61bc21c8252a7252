"""Importing tt_data is cheap and has no effects."""

from __future__ import annotations

import json
import subprocess
import sys

HEAVY = ("torch", "datasets", "pyarrow", "numpy", "jinja2", "tokenizers", "sentencepiece", "transformers", "pandas")
SIBLINGS = ("tt_models", "tt_peft", "tt_ckpt", "tt_train", "tt_cli")


def test_nothing_heavy_is_imported_until_it_is_needed() -> None:
    code = "import os; before = dict(os.environ); import json, sys, tt_data; assert before == dict(os.environ);"
    code += "print(json.dumps(sorted({m.partition('.')[0] for m in sys.modules})))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(HEAVY + SIBLINGS) & set(json.loads(out.stdout))
    assert not out.stderr


def test_text_needs_neither_torch_nor_datasets(chatml_dir: object) -> None:
    code = (
        "import json, sys, tt_data; tok = tt_data.load_tokenizer(sys.argv[1]);"
        "turns = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}];"
        "assert len(tt_data.load_dataset([{'messages': turns}], tok)[0]['input_ids']);"
        "print(json.dumps(sorted({m.partition('.')[0] for m in sys.modules})))"
    )
    out = subprocess.run([sys.executable, "-c", code, str(chatml_dir)], capture_output=True, text=True, check=True)
    assert not {"torch", "datasets", "pyarrow", "numpy"} & set(json.loads(out.stdout))
