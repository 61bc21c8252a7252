"""What a verb imports: counted in a process of its own, since seconds differ from machine to machine."""

import json
import subprocess
import sys

# Verbs one after the other in one process, each with the modules that it may not have loaded so far.
SCRIPT = """
import json, sys
from tt_cli.main import main

for words, unwanted in json.loads(sys.argv[1]):
    code = main(words)
    found = [name for name in unwanted if name in sys.modules]
    print("LOADED", json.dumps([code, found]), file=sys.stderr)
"""
COMPILER = ["torch._dynamo", "torch._inductor", "sympy", "torch.distributed.tensor"]
LIBRARIES = ["torchao", "datasets", "pyarrow", "pandas", "transformers", "lm_eval", "huggingface_hub", "matplotlib"]


def test_a_verb_loads_only_what_its_work_needs(model_dir, rows_file, tmp_path):
    config = [f"model.path={model_dir}", f"data.train={rows_file}"]
    run = str(tmp_path / "run")
    train = ["run", "sft", *config, "adapter.rank=4", "max_steps=1", "samples.num=1", "samples.max_new_tokens=2"]
    verbs = [
        (["ls"], ["torch", "numpy", *LIBRARIES]),
        (["cat", "sft", *config], ["torch", "numpy", *LIBRARIES]),
        (["data", "show", str(rows_file), "--tokenizer", str(model_dir)], ["torch", "numpy", *LIBRARIES]),
        (["validate", "sft", *config, "adapter.rank=4"], [*COMPILER, *LIBRARIES]),
        ([*train, "-o", run], [*COMPILER, *LIBRARIES]),
        (["generate", run, "Repeat", "--max-new-tokens", "2"], [*COMPILER, *LIBRARIES]),
        (["eval", run, "--data", str(rows_file), "--limit", "1"], [*COMPILER, *LIBRARIES]),
        (["merge", run, "-o", str(tmp_path / "merged")], [*COMPILER, *LIBRARIES]),
    ]
    command = [sys.executable, "-c", SCRIPT, json.dumps(verbs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    loaded = [json.loads(line[7:]) for line in done.stderr.splitlines() if line.startswith("LOADED ")]
    assert {words[0]: answer for (words, _), answer in zip(verbs, loaded, strict=True)} == {
        words[0]: [0, []] for words, _ in verbs
    }, done.stderr
