"""Memory that is freed and taken again."""

import os
import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource, torch, tt_models
if {warm}:
    from tt_models.rows import keep_freed_memory
    keep_freed_memory()
def forward():
    buffers = [torch.zeros(8 * 2**20, dtype=torch.uint8) for _ in range(3)]
forward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    forward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_freed_buffers_are_not_mapped_again():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    cold, warm = (
        int(
            subprocess.run(
                [sys.executable, "-c", COUNT_FAULTS.format(warm=warm)], env=environment, capture_output=True, check=True
            ).stdout
        )
        for warm in (False, True)
    )
    if cold < 2**20 * 8:
        pytest.skip("this allocator keeps freed memory anyway")
    assert warm < cold / 10
