"""The smallest proof that models build, run and generate; the parity tests are the real ones."""

import dataclasses

import pytest
import torch

import tt_models


@pytest.mark.parametrize("name", ["llama2_7b", "llama3_2_1b", "mistral_7b"])
def test_cached_greedy_decoding_equals_the_full_forward(name):
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = dataclasses.replace(
        tt_models.get_config(name), **sizes, **heads, bos_token_id=None, eos_token_id=None, initializer_range=0.3
    )
    torch.manual_seed(0)
    model = tt_models.build(config)
    ids = torch.randint(0, 61, (2, 5))
    out = tt_models.generate(model, ids, max_new_tokens=6, temperature=0)
    expected = ids
    for _ in range(6):
        expected = torch.cat((expected, model(expected)[:, -1:].argmax(-1)), dim=1)
    assert out.tolist() == expected.tolist()
    assert tt_models.config_from_hf(tt_models.config_to_hf(config)) == config


def test_named_functions_build_on_meta():
    model = tt_models.llama2_7b(device="meta", dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == 6_738_415_616
    assert next(model.parameters()).dtype == torch.bfloat16
