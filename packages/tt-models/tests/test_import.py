"""Importing brings torch and nothing else, quickly, and changes nothing."""

import subprocess
import sys

PROBE = """
import sys, time
import torch
torch_alone = {name.partition(".")[0] for name in sys.modules}
start = time.process_time()
import tt_models
seconds = time.process_time() - start
third = {name.partition(".")[0] for name in sys.modules} - torch_alone - set(sys.stdlib_module_names) - {"tt_models"}
built = time.process_time()
for name in ("llama3_2_1b", "gemma3_1b", "qwen3_30b_a3b", "gpt_oss_20b"):
    tt_models.build(name, device="meta")
print(seconds, sorted(third), time.process_time() - built, "torch._dynamo" in sys.modules or "sympy" in sys.modules)
"""


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_import_costs_little_and_loads_no_third_party():
    found = [run(PROBE) for _ in range(3)]
    assert min(float(one[0]) for one in found) <= 0.1, "CPU seconds on top of import torch"
    assert all(one[1] == "[]" for one in found)
    assert min(float(one[2]) for one in found) <= 0.3, "CPU seconds for four models on the meta device"
    assert all(one[3] == "False" for one in found), "a model on the meta device needs neither of torch's compilers"


def test_version_is_that_of_the_distribution():
    from importlib.metadata import version

    import tt_models

    assert tt_models.__version__ == version("tt-models")


def test_every_public_name_exists():
    import tt_models

    assert all(getattr(tt_models, name) is not None for name in tt_models.__all__)
