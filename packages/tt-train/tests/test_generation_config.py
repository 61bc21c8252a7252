"""generation_config.json, with the meaning that transformers gives it."""

import pytest
import torch

from tt_models.sampling import Sampling, filtered, penalize
from tt_train.errors import ConfigError
from tt_train.models.generation_config import SamplingDefaults, read_defaults


def test_a_file_without_do_sample_is_greedy_and_says_what_that_leaves_out():
    found = read_defaults({"temperature": 0.6, "top_p": 0.9, "top_k": 50, "eos_token_id": [1, 2]}, "g.json")
    assert found == SamplingDefaults(notes=("g.json: temperature, top_p: no effect without do_sample",))
    assert read_defaults({"do_sample": False, "temperature": 1.0, "_from_model_config": True}, "") == SamplingDefaults()


def test_what_a_file_asks_for_and_is_not_supported_is_named_unless_it_changes_nothing():
    found = read_defaults({"num_beams": 4, "typical_p": 1.0, "no_repeat_ngram_size": 3, "new_key": {"a": 1}}, "g.json")
    assert found.notes == (
        "g.json: not supported, no effect here: new_key={'a': 1}, no_repeat_ngram_size=3, num_beams=4",
    )


@pytest.mark.parametrize("settings", [
    {"do_sample": True},
    {"do_sample": True, "temperature": 0.6, "top_p": 0.8, "top_k": 20, "min_p": 0.05},
    {"do_sample": True, "top_k": 0, "repetition_penalty": 1.2},
    {"repetition_penalty": 1.2},
])  # fmt: skip
def test_the_distribution_of_the_next_token_is_that_of_transformers(settings, monkeypatch):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=97, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                      num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=2.0)
    model.generation_config = transformers.GenerationConfig(**settings)
    ids = torch.randint(0, 97, (1, 5))
    seen = []
    draw = torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda p, *args, **rest: seen.append(p) or draw(p, *args, **rest))
    out = model.generate(ids, max_new_tokens=1, return_dict_in_generate=True, output_logits=True, pad_token_id=0)
    ours = read_defaults(settings, "")
    fields = {name: getattr(ours, name) for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")}
    marked = torch.zeros(1, 97, dtype=torch.bool).scatter(1, ids, True)
    logits = penalize(out.logits[0].float(), marked, ours.repetition_penalty)
    if not settings.get("do_sample"):
        assert not seen
        assert ours.temperature == 0
        assert out.sequences[0, -1] == logits.argmax()
        return
    torch.testing.assert_close(filtered(logits, Sampling(**fields)).softmax(-1), seen[0])


@pytest.mark.parametrize("settings", [
    {"do_sample": "yes"}, {"do_sample": True, "temperature": "hot"}, {"do_sample": True, "temperature": -1},
    {"do_sample": True, "top_k": 2.5}, {"do_sample": True, "top_p": 0}, {"do_sample": True, "min_p": True},
    {"repetition_penalty": 0}, {"max_new_tokens": 0}, {"stop_strings": [""]}, {"stop_strings": 3},
    {"do_sample": True, "temperature": float("nan")},
])  # fmt: skip
def test_a_wrong_value_is_refused_with_its_key(settings):
    key = list(settings)[-1]
    with pytest.raises(ConfigError, match=rf"^g.json: {key}: expected "):
        read_defaults(settings, "g.json")
