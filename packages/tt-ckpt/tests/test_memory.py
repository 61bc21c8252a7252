"""What a process holds while files stream through it: its own memory, and the pages of mapped files. Linux only."""

import os
import threading
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


def forked_peak(tmp_path, action, measure=held, *, every=1):
    """By how much ``measure()`` of a fresh child grows while ``action(progress)`` runs, sampled after each tensor.

    ``every``: only after so many tensors and at the end, since reading all mappings takes long.
    """
    result = tmp_path / "peak"
    child = os.fork()
    if child == 0:
        try:
            start, peak, calls = measure(), 0, 0

            def progress(done, total):
                nonlocal peak, calls
                calls += 1
                if done == total or calls % every == 0:
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
def test_a_conversion_and_the_way_back_hold_neither_the_model_nor_pages_of_its_files(large, tmp_path, to):
    assert (large / "model.safetensors").stat().st_size > 70 * MB
    for source, target, kind in ((large, tmp_path / "there", to), (tmp_path / "there", tmp_path / "back", "hf")):

        def convert(progress, source=source, target=target, kind=kind):
            tt_ckpt.convert(source, target, kind, allow_pickle=True, progress=progress)

        assert forked_peak(tmp_path, convert, lambda: held() + held_of(tmp_path), every=10) < 20 * MB


def test_a_large_tensor_is_converted_cast_and_saved_in_pieces(tmp_path, model_dir):
    source = model_dir(hidden_size=512, vocab_size=40_000, num_hidden_layers=1, tie_word_embeddings=True)  # 82 MB
    half, same = tmp_path / "half", tmp_path / "same"

    def convert(progress):
        tt_ckpt.convert(source, half, dtype=torch.bfloat16, progress=progress)

    def highest(action):  # also inside of a tensor
        def watched(progress):
            stop, thread = threading.Event(), threading.Thread(target=lambda: watch(progress))

            def watch(progress):
                while not stop.wait(0.02):
                    progress(0, 0)

            thread.start()
            action(lambda *_: None)
            stop.set()
            thread.join()

        return forked_peak(tmp_path, watched, lambda: held() + held_of(tmp_path))

    assert highest(convert) < 40 * MB
    model = nn.ModuleDict({"model": nn.ModuleDict({"embed_tokens": nn.Embedding(40_000, 512)})})
    config = {"model_type": "llama"}
    assert highest(lambda progress: tt_ckpt.save_hf(model, same, config=config, progress=progress)) < 40 * MB


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

    assert forked_peak(tmp_path, load, lambda: held_of(large), every=10) == 0
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
