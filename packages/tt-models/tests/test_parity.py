"""Every family against transformers: logits, gradients, packed rows, cached decoding, greedy text."""

import pytest
import torch

import tt_models
from tt_models.auto import FAMILIES
from tt_models.parity import certify, is_within, relative_error


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("model_type", FAMILIES)
def test_family_equals_transformers(model_type, seed, random_hf_config, reference_of, in_small_blocks):
    if seed == 4:  # so that the small tensors of this test are cut into blocks of rows, too
        in_small_blocks(64)
    config = random_hf_config(model_type, seed)
    reference = reference_of(config)
    model = tt_models.build(tt_models.config_from_hf(config), device="meta")
    model.to_empty(device="cpu").load_state_dict(reference.state_dict())
    certificate = certify(model.eval(), reference)
    assert is_within(certificate), (config, certificate)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_bf16_is_close_too(model_type, random_hf_config, reference_of):
    config = random_hf_config(model_type, 0)
    reference = reference_of(config)
    model = tt_models.build(tt_models.config_from_hf(config), dtype=torch.bfloat16).eval()
    model.load_state_dict(reference.state_dict())
    ids = torch.randint(0, config["vocab_size"], (2, 16))
    expected = reference(ids).logits
    found, rounded = model(ids), reference.bfloat16()(ids).logits
    assert found.dtype == torch.bfloat16
    own = max(relative_error(rounded, expected), torch.finfo(torch.bfloat16).eps)  # of transformers
    assert relative_error(found, expected) <= 4 * own
