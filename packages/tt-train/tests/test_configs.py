"""Every config that comes with the package is one that compose accepts and that trains a model known here."""

import pytest

import tt_models
from tt_train import compose
from tt_train.job import assemble
from tt_train.settings import registry


@pytest.mark.parametrize("name", registry.config_names())
def test_a_registered_config_composes(name):
    config = compose(name)
    assert config.model.path.count("/") == 1
    assert (config.adapter is None) == name.endswith("_full")
    assert (config.adapter is not None and config.adapter.quantize_base) == name.endswith("_qlora")


@pytest.mark.parametrize("name", registry.config_names())
def test_a_registered_config_trains_a_model_that_can_be_built_on_rows_that_fit(name):
    config = compose(name)
    size = name.rpartition("_")[0].replace("/", "_").replace(".", "_")
    model = tt_models.get_config(size)
    assert config.data.max_seq_len <= model.max_position_embeddings
    assert config.batch_size % config.micro_batch_size == 0


@pytest.mark.parametrize("family", sorted({name.split("/")[0] for name in registry.config_names()}))
def test_a_registered_config_is_one_that_would_run(family, model_dir, rows_file, tmp_path):
    """With a small model and rows from here in place of those of the hub."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "say alpha", "chosen": "alpha", "rejected": "beta"}\n')
    here = [f"model.path={model_dir}", "data.split=null", "data.max_seq_len=128", "device=cpu", "batch_size=16"]
    for name in (name for name in registry.config_names() if name.startswith(f"{family}/")):
        rows = pairs if name.endswith("_dpo") else rows_file
        assemble(compose(name, overrides=[*here, f"data.train={rows}"]))  # ConfigError names what is wrong


def test_the_families_that_are_not_gated_have_configs_of_every_method():
    sizes = {name.rpartition("_")[0] for name in registry.config_names()}
    assert {"qwen2.5/0.5b", "qwen3/0.6b", "smollm2/135m", "smollm3/3b", "olmo2/1b", "phi4/mini", "gemma3/1b"} <= sizes
    assert {f"{size}_{method}" for size in sizes for method in ("full", "lora", "qlora")} | {
        "smollm2/135m_dpo",
        "qwen3/0.6b_dpo",
    } == {*registry.config_names()}


def test_a_name_nearly_right_is_suggested():
    with pytest.raises(ValueError, match=r"did you mean 'llama2/7b_lora'"):
        compose("llama2/7b_lroa")
