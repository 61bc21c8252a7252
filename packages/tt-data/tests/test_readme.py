"""The examples of the README run, in order, in one namespace."""

from __future__ import annotations

import json
import re
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import pytest

from tt_data.rows import schemas
from tt_data.template import prompts


def test_examples_of_the_readme_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chatml_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beside = Path(__file__).parents[1] / "README.md"
    text = beside.read_text(encoding="utf-8") if beside.exists() else str(metadata("tt-data").get_payload())
    examples = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(examples) >= 8
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(schemas, "SCHEMAS", dict(schemas.SCHEMAS))
    (tmp_path / "my-model").symlink_to(chatml_dir)
    answers = ["Yes.", "No, blue.", "A cat sat.", "Hello!", ""]
    for name in ("rows", "more"):
        rows = [turns(f"Is the {name if i else 'sea'} {i or 'salty'}?", answer) for i, answer in enumerate(answers)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    namespace: dict[str, Any] = {}
    try:
        for example in examples:
            exec(compile(example, "README.md", "exec"), namespace)
    finally:
        prompts.INSTRUCT_TEMPLATES.pop("quiz", None)
    printed = capsys.readouterr().out
    for line in re.findall(r"^# +(.*)$", examples[0], flags=re.MULTILINE):
        assert line in printed


def turns(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
