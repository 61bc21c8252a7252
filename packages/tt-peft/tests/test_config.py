import dataclasses

import pytest
import torch

from tt_peft import LoRAConfig


@pytest.mark.parametrize("rank", [0, -1, 2.5, "8", True])
def test_a_rank_that_is_not_a_positive_number_is_refused(rank):
    with pytest.raises(ValueError, match="rank must be a positive whole number, got"):
        LoRAConfig(rank=rank)
    with pytest.raises(ValueError, match=r"rank_pattern\['q_proj'\] must be a positive whole number"):
        LoRAConfig(rank_pattern={"q_proj": rank})


@pytest.mark.parametrize("alpha", [0, -1.0, float("nan"), float("inf"), "16"])
def test_an_alpha_that_is_no_positive_number_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha must be a positive number, got"):
        LoRAConfig(alpha=alpha)
    with pytest.raises(ValueError, match=r"alpha_pattern\['q_proj'\] must be a positive number"):
        LoRAConfig(alpha_pattern={"q_proj": alpha})


@pytest.mark.parametrize("dropout", [-0.1, 1.0, 2])
def test_a_dropout_outside_of_zero_to_one_is_refused(dropout):
    with pytest.raises(ValueError, match="dropout must be at least 0 and below 1"):
        LoRAConfig(dropout=dropout)


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ValueError, match="init must be one of kaiming, gaussian, pissa, loftq, got 'magic'"):
        LoRAConfig(init="magic")
    with pytest.raises(ValueError, match="init='loftq' needs quantize_base=True"):
        LoRAConfig(init="loftq")
    with pytest.raises(ValueError, match="target_modules is empty"):
        LoRAConfig(target_modules=(), modules_to_save="lm_head")
    with pytest.raises(ValueError, match="target_parameters works with dropout=0"):
        LoRAConfig(target_parameters=("experts.up",), dropout=0.1)
    with pytest.raises(ValueError, match="init='pissa' with use_dora=True needs dropout=0"):
        LoRAConfig(init="pissa", use_dora=True, dropout=0.1)
    with pytest.raises(ValueError, match="layers_pattern=.* needs layers_to_transform"):
        LoRAConfig(layers_pattern="blocks")
    with pytest.raises(ValueError, match="dtype must be a floating point type"):
        LoRAConfig(dtype=torch.int8)


def test_lists_and_single_names_become_tuples():
    config = LoRAConfig(target_modules=["q_proj"], modules_to_save="norm", layers_to_transform=3)
    assert config.target_modules == ("q_proj",)
    assert config.modules_to_save == ("norm",)
    assert config.layers_to_transform == (3,)
    assert LoRAConfig(target_modules="q_proj").target_modules == "q_proj"  # it may be an expression
    assert LoRAConfig(exclude_modules=".*mlp.*").exclude_modules == ".*mlp.*"
    assert LoRAConfig(target_modules="all-linear").target_modules == "all-linear"


@pytest.mark.parametrize("given", ["all-linear", ["all-linear"], ("all-linear",)])
def test_all_linear_may_come_in_a_list(given):
    assert LoRAConfig(target_modules=given).target_modules == "all-linear"


def test_scaling_is_alpha_over_rank_or_over_its_root():
    assert LoRAConfig(alpha=6.0).scaling(4, 6.0) == 1.5
    assert LoRAConfig(alpha=6.0, use_rslora=True).scaling(4, 6.0) == 3.0


def test_a_config_is_frozen_and_copied_with_changes():
    config = LoRAConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 4
    assert config.with_(rank=4) == LoRAConfig(rank=4)
    with pytest.raises(ValueError, match="LoRAConfig has no field 'rnk'"):
        config.with_(rnk=4)
