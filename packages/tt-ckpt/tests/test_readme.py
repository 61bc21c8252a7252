import re
from pathlib import Path

import pytest


def test_the_examples_of_the_readme_run_in_order():
    readme = Path(__file__).parents[1] / "README.md"
    if not readme.is_file():
        pytest.skip("the tests run apart from the package's folder")
    blocks = re.findall(r"```python\n(.*?)```", readme.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) >= 5
    namespace: dict[str, object] = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, str(readme), "exec"), namespace)
