"""What a process holds while files stream through it: its own memory, and the pages of mapped files. Linux only."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tt_ckpt

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
MB = 2**20


def held(what="RssAnon"):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {what}")


def held_of(folder):
    """Resident pages of mapped files in ``folder``: those of libraries, whose code a child meets anew, do not count."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0]:
            inside = len(words) > 5 and words[5].startswith(str(folder))
        elif inside and words[0] == "Rss:":
            total += int(words[1]) * 1024
    return total


def forked_peak(tmp_path, action, measure=held):
    """By how much ``measure()`` of a fresh child grows while ``action(progress)`` runs, sampled after each tensor."""
    result = tmp_path / "peak"
    child = os.fork()
    if child == 0:
        try:
            start, peak = measure(), 0

            def progress(done, total):
                nonlocal peak
                peak = max(peak, measure() - start)

            action(progress)
            result.write_text(str(peak))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    return int(result.read_text())


@pytest.fixture
def large(model_dir, tmp_path):
    """A model of more than 70 MB whose largest tensor has 2 MB."""
    return model_dir(hidden_size=512, intermediate_size=1024, num_hidden_layers=9, vocab_size=1000)


@pytest.mark.parametrize("to", ["hf", "meta", "torchtune"])
def test_a_conversion_holds_a_tensor_not_the_model(large, tmp_path, to):
    size = (large / "model.safetensors").stat().st_size
    assert size > 70 * MB
    peak = forked_peak(tmp_path, lambda progress: tt_ckpt.convert(large, tmp_path / "out", to, progress=progress))
    assert peak < 20 * MB


def test_the_pages_of_a_mapped_tensor_are_counted(large, tmp_path):
    """So that the measure of the next test can be trusted."""
    tensors = tt_ckpt.open_tensors(large)

    def touch(progress):
        held = [tensors.mapped(name).sum() for name in tensors]
        progress(len(held), len(held))

    assert forked_peak(tmp_path, touch, lambda: held_of(large)) > 10 * MB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_copies_takes_no_page_of_the_files(large, tmp_path, tiny, dtype):
    model = tiny(device="meta", hidden_size=512, intermediate_size=1024, num_hidden_layers=9, vocab_size=1000)

    def load(progress):
        tt_ckpt.load_weights(model, large, dtype=dtype, progress=progress)

    assert forked_peak(tmp_path, load, lambda: held_of(large)) == 0
    expected = (large / "model.safetensors").stat().st_size * dtype.itemsize // 4
    assert forked_peak(tmp_path, load) < expected + 10 * MB


def test_a_quantizing_module_is_fed_tensor_by_tensor(tmp_path):
    class Quantized(nn.Linear):
        def load_base_(self, name, tensor):
            self.packed = tensor.to(torch.float16).view(torch.uint8)[:, ::4].clone()  # an eighth of float32

    with torch.device("meta"):
        model = nn.ModuleList(Quantized(1024, 1024, bias=False) for _ in range(20))
    save_file({f"{i}.weight": torch.ones(1024, 1024) for i in range(20)}, tmp_path / "model.safetensors")

    def load(progress):
        tt_ckpt.load_weights(model, tmp_path, progress=progress)

    peak = forked_peak(tmp_path, load, lambda: held() + held_of(tmp_path))
    assert peak < 45 * MB  # of 80 in the file: 10 packed, what is on its way, and what the allocator keeps
