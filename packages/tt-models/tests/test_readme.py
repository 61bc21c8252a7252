"""The examples of the README run, in order, in one namespace."""

import re
from importlib.metadata import metadata
from pathlib import Path

import pytest


def test_examples_of_the_readme_run(capsys):
    beside = Path(__file__).parents[1] / "README.md"
    text = beside.read_text() if beside.exists() else metadata("tt-models").get_payload()
    examples = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(examples) >= 6
    namespace: dict[str, object] = {}
    for example in examples:
        exec(compile(example, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "nearest known key 'hidden_size'" in printed
    assert "torch.Size([2, 12])" in printed


@pytest.mark.parametrize(
    "name", ["llama2_7b", "llama3_2_1b", "qwen3_0_6b", "phi4_mini", "olmo2_7b", "mistral_nemo_12b"]
)
def test_sizes_that_the_readme_names_exist(name):
    import tt_models

    assert name in tt_models.list_models()
