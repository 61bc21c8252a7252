"""config.json files as they were published load unedited, and mean here and written back what they mean elsewhere."""

import copy
import inspect
import json
import logging
import re
import sys
from pathlib import Path

import pytest
import torch

import tt_models
from tt_models.auto import FAMILIES

PUBLISHED = json.loads((Path(__file__).parent / "published_configs.json").read_text())
NOT_MATHS = {  # of those that a reference reads: how it attends, what else it returns, how it trains, parts that see
    *("_attn_implementation", "output_router_logits", "router_aux_loss_coef", "use_cache", "initializer_range"),
    *("get_text_config", "image_token_id", "mm_tokens_per_image", "text_config", "vision_config"),
}


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def maths_keys(model_type):
    """The attributes of a config that the reference's model reads."""
    transformers = pytest.importorskip("transformers")
    kind = transformers.AutoModelForCausalLM._model_mapping[transformers.CONFIG_MAPPING[model_type]]
    return set(re.findall(r"config\.(\w+)", inspect.getsource(sys.modules[kind.__module__]))) - NOT_MATHS


def read_by_reference(config):
    transformers = pytest.importorskip("transformers")
    return transformers.CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))


def test_the_corpus_holds_every_family_and_many_publishers():
    assert len(PUBLISHED) >= 60
    assert {config["model_type"] for config in PUBLISHED.values()} == {*FAMILIES}
    assert len({name.split("/")[0] for name in PUBLISHED}) > 20


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_loads_and_says_the_same_when_it_is_written(name):
    published = PUBLISHED[name]
    config = tt_models.config_from_hf(published)
    written = json.loads(json.dumps(tt_models.config_to_hf(config)))
    assert tt_models.config_from_hf(written) == config
    expected, found = read_by_reference(published), read_by_reference(written)
    for key in maths_keys(published["model_type"]) | {"tie_word_embeddings"}:
        one, other = getattr(found, key), getattr(expected, key)
        if key == "rope_parameters":
            one, other = drop_without_effect(one), drop_without_effect(other)
        assert (one or None) == (other or None), key  # off is off: false, 0 or null
    assert head_dim(found) == head_dim(expected) == config.head_dim
    for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
        assert getattr(found, key) == getattr(expected, key), key


def head_dim(config):
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def drop_without_effect(rope):
    """Rope numbers without the words for how weights were made, and what no rope of that type reads."""
    if "full_attention" in rope:
        return {kind: drop_without_effect(part) for kind, part in rope.items()}
    return {key: value for key, value in rope.items() if key not in ("type", "finetuned", "attn_factor")}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_has_the_parameters_of_the_reference(name):
    transformers = pytest.importorskip("transformers")
    published = PUBLISHED[name]
    with torch.device("meta"):
        reference = transformers.AutoModelForCausalLM.from_config(read_by_reference(published))
    model = tt_models.build(tt_models.config_from_hf(published), device="meta")
    expected = {key: tuple(value.shape) for key, value in reference.named_parameters()}
    assert {key: tuple(value.shape) for key, value in model.named_parameters()} == expected


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_written_config_leaves_no_key_that_the_reference_reads_to_a_default(model_type):
    written = tt_models.config_to_hf(tt_models.config_from_hf({"model_type": model_type}))
    assert not maths_keys(model_type) - written.keys()
    assert {"tie_word_embeddings", "rope_theta", "rope_scaling", "head_dim"} <= written.keys()
