"""Importing brings torch and nothing else, and changes nothing."""

import subprocess
import sys

PROBE = """
import sys
import torch
torch_alone = {name.partition(".")[0] for name in sys.modules}
import tt_models
third = {name.partition(".")[0] for name in sys.modules} - torch_alone - set(sys.stdlib_module_names) - {"tt_models"}
for name in ("llama3_2_1b", "gemma3_1b", "qwen3_30b_a3b", "gpt_oss_20b"):
    tt_models.build(name, device="meta")
print(sorted(third), [name for name in ("torch._dynamo", "sympy", "transformers") if name in sys.modules])
"""


def test_import_loads_no_third_party_and_a_model_on_meta_needs_none_of_the_compilers_of_torch():
    """Each of them takes a second."""
    found = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[] []"


def test_version_is_that_of_the_distribution():
    from importlib.metadata import version

    import tt_models

    assert tt_models.__version__ == version("tt-models")


def test_every_public_name_exists():
    import tt_models

    assert all(getattr(tt_models, name) is not None for name in tt_models.__all__)
