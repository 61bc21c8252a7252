"""Every named size has the parameter names, shapes and count of transformers' class on the published config."""

import pytest
import torch

import tt_models

PARAMETERS = {  # published or counted once with transformers 5.23: sum(p.numel() for p in AutoModelForCausalLM...)
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama3_1_8b": 8_030_261_248,
    "llama3_2_1b": 1_235_814_400,
    "mistral_7b": 7_241_732_096,
    "gemma_2b": 2_506_172_416,
    "gemma2_2b": 2_614_341_888,
    "gemma3_1b": 999_885_952,
    "qwen2_5_7b": 7_615_616_512,
    "qwen3_8b": 8_190_735_360,
    "qwen3_30b_a3b": 30_532_122_624,
    "phi3_mini": 3_821_079_552,
    "phi3_5_mini": 3_821_079_552,
    "phi4_mini": 3_836_021_760,
    "olmo2_7b": 7_298_617_344,
    "mixtral_8x7b": 46_702_792_704,
    "smollm3_3b": 3_075_098_624,
}


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_size_has_the_published_number_of_parameters(name, count):
    model = getattr(tt_models, name)(device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert not list(model.buffers())


@pytest.mark.parametrize("name", tt_models.list_models())
def test_size_has_the_names_and_shapes_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    config = tt_models.get_config(name)
    assert tt_models.config_from_hf(tt_models.config_to_hf(config)) == config
    with torch.device("meta"):
        reference = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**tt_models.config_to_hf(config))
        )
    expected = {key: tuple(value.shape) for key, value in reference.named_parameters()}
    model = tt_models.build(name, device="meta", dtype=torch.bfloat16)
    assert {key: tuple(value.shape) for key, value in model.named_parameters()} == expected
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    assert {value.device.type for value in model.parameters()} == {"meta"}
