"""Every config that comes with the package is one that compose accepts."""

import pytest

from tt_train import compose, registry


@pytest.mark.parametrize("name", registry.config_names())
def test_a_registered_config_composes(name):
    config = compose(name)
    assert config.model.path.count("/") == 1
    assert (config.adapter is None) == name.endswith("_full")
    assert (config.adapter is not None and config.adapter.quantize_base) == name.endswith("_qlora")


def test_a_name_nearly_right_is_suggested():
    with pytest.raises(ValueError, match=r"did you mean 'llama2/7b_lora'"):
        compose("llama2/7b_lroa")
