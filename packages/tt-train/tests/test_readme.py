"""The README's Python examples run, in order, in one namespace."""

import re
from importlib.metadata import metadata


def test_examples_run(model_dir, rows_file, tmp_path, monkeypatch):
    text = metadata("tt-train").get_payload()
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 4
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(rows_file.read_text())
    (tmp_path / "my_losses.py").write_text(examples[1])
    monkeypatch.syspath_prepend(tmp_path)
    namespace = {"model_dir": model_dir}
    for example in examples:
        exec(example, namespace)
    assert (tmp_path / "merged" / "config.json").exists()
    words = [
        f"model.path={model_dir}",
        "data.train=rows.jsonl",
        "max_steps=2",
        "loss.name=my_losses.focal",
        "output_dir=f",
    ]
    run = namespace["sft"].main(namespace["compose"]("sft", overrides=words, allow_import=["my_losses"]))
    assert (run / "model" / "config.json").exists()
