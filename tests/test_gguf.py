"""GGUF files of every family, converted by tt_ckpt and computed by tt_models: the same logits as transformers."""

import importlib.util
from pathlib import Path

import pytest
import torch

import tt_ckpt
import tt_models

pytest.importorskip("gguf")
pytest.importorskip("transformers")

SOURCE = Path(__file__).parents[1] / "packages" / "tt-ckpt" / "tests" / "test_gguf.py"
spec = importlib.util.spec_from_file_location("gguf_of_tt_ckpt", SOURCE)
assert spec is not None
assert spec.loader is not None
made = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made)


@pytest.mark.parametrize("case", made.CASES)
def test_a_converted_file_loads_and_computes_what_its_model_does(tmp_path, case):
    arch, config, extra = made.CASES[case]
    model = made.small(config)
    tt_ckpt.convert(made.write_gguf(tmp_path / "model.gguf", model, arch, extra=extra), tmp_path / "hf")
    ours = tt_models.build(tt_models.config_from_hf(tt_ckpt.read_config(tmp_path / "hf")), device="meta")
    tt_ckpt.load_weights(ours, tmp_path / "hf")
    expected = made.logits(model)
    torch.manual_seed(1)
    with torch.no_grad():
        found = ours(torch.randint(3, 96, (2, 40)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
