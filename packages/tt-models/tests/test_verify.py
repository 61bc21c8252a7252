"""The certificate of a directory, and the bugs that it must catch."""

import importlib
import json
import logging
import math
from pathlib import Path

import pytest
import torch

import tt_models
from tt_models import attention, decoder
from tt_models.auto import FAMILIES
from tt_models.cpu import elementwise
from tt_models.kv_cache import LayerCache
from tt_models.norm import RMSNorm
from tt_models.parity import (
    FACTOR,
    LEAST,
    certify,
    in_fp64,
    is_within,
    load_reference,
    not_reached,
    relative_error,
    state_error,
)

safetensors = pytest.importorskip("safetensors.torch")
pytest.importorskip("transformers")


def load(path: Path):
    config = json.loads((path / "config.json").read_text())
    model = tt_models.build(tt_models.config_from_hf(config))
    files = safetensors.load_file(path / "model.safetensors")
    sources = getattr(model, "hf_sources", lambda name: [name])
    join = getattr(model, "join_from_hf", lambda name, parts: parts[0])
    state = {name: join(name, [files[key] for key in sources(name)]) for name, _ in model.named_parameters()}
    model.load_state_dict(state)
    return model


def save(model, path: Path):
    split = getattr(model, "split_for_hf", lambda name, tensor: {name: tensor})
    tensors = {}
    for name, value in model.state_dict().items():
        tensors |= {key: piece.contiguous() for key, piece in split(name, value).items()}
    safetensors.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(tt_models.config_to_hf(model.config)))


@pytest.fixture
def directory(tmp_path, random_hf_config, reference_of):
    def make(model_type, seed=1):
        reference_of(random_hf_config(model_type, seed)).save_pretrained(tmp_path)
        return tmp_path

    return make


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_good_directory_gets_its_certificate(model_type, directory):
    path = directory(model_type)
    certificate = tt_models.verify(path, load=load, save=save)
    assert certificate["passed"], certificate
    assert json.loads(json.dumps(certificate)) == certificate
    assert certificate["errors"]["written_back"] == 0.0
    assert certificate["versions"]["tt_models"] == tt_models.__version__
    assert certificate["errors"].keys() == certificate["limits"].keys()
    assert not tt_models.verify(path, load=load, save=save, factor=0.0)["passed"]


def test_a_wrong_copy_is_not_certified(directory):
    def save_wrongly(model, path):
        with torch.no_grad():
            model.model.norm.weight[0] += 1e-3
        save(model, path)

    certificate = tt_models.verify(directory("llama"), load=load, save=save_wrongly)
    assert not certificate["passed"]
    assert certificate["errors"]["written_back"] > certificate["limits"]["written_back"]
    assert certificate["errors"]["logits"] <= certificate["limits"]["logits"]


def change_config(path, **changes):
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_copy_with_another_config_is_not_certified(directory):
    def save_wrongly(model, path):
        save(model, path)
        change_config(path, rms_norm_eps=model.config.rms_norm_eps * 1.5)

    certificate = tt_models.verify(directory("llama"), load=load, save=save_wrongly)
    assert not certificate["passed"]
    assert certificate["errors"]["written_back"] > certificate["limits"]["written_back"]


def test_a_copy_with_nan_is_not_certified(directory):
    def save_wrongly(model, path):
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
        save(model, path)

    certificate = tt_models.verify(directory("llama"), load=load, save=save_wrongly)
    assert not certificate["passed"]
    assert certificate["errors"]["written_back"] == "inf"
    assert json.loads(json.dumps(certificate, allow_nan=False)) == certificate


@pytest.mark.parametrize("settings", [{"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 1}])
def test_settings_for_generation_are_no_part_of_the_certificate(settings, directory):
    path = directory("llama")
    (path / "generation_config.json").write_text(json.dumps(settings))
    certificate = tt_models.verify(path, load=load, save=save)
    assert certificate["passed"], certificate


def test_a_short_context_is_certified(directory):
    path = directory("llama")
    change_config(path, max_position_embeddings=16, rope_scaling=None, rope_parameters=None)
    certificate = tt_models.verify(path, load=load, save=save)
    assert certificate["passed"], certificate


def test_errors_are_relative_to_the_largest_value():
    assert relative_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])) == 0.5
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative_error(torch.ones(2), torch.zeros(2)) == math.inf
    assert relative_error(torch.ones(2), torch.zeros(2), floor=4.0) == 0.25
    assert relative_error(torch.tensor([math.nan]), torch.ones(1)) == math.inf
    assert relative_error(torch.ones(1), torch.tensor([math.inf])) == math.inf
    one, broken = {"a": torch.ones(1), "b": torch.ones(1)}, {"a": torch.ones(1), "b": torch.tensor([math.nan])}
    assert state_error(broken, one) == math.inf
    assert state_error({"a": torch.ones(1)}, {"b": torch.ones(1)}) == math.inf
    assert state_error({"a": torch.ones(1)}, {"a": torch.ones(2)}) == math.inf


def swapped_heads(model, monkeypatch):
    for layer in model.model.layers:
        weight = layer.self_attn.q_proj.weight
        weight.data = weight.data.view(2, -1, weight.shape[1]).flip(0).reshape(weight.shape)


def other_epsilon(model, monkeypatch):
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.eps *= 1.1


def other_theta(model, monkeypatch):
    for one in model.model.ropes:
        one.__init__(one.dim, theta=one.theta * 1.01, scaling=one.scaling or None, max_position_embeddings=128)


def no_qk_norm(model, monkeypatch):
    for layer in model.model.layers:
        monkeypatch.setattr(layer.self_attn.q_norm, "forward", lambda x: x)
        monkeypatch.setattr(layer.self_attn.k_norm, "forward", lambda x: x)


def no_softcap(model, monkeypatch):
    for layer in model.model.layers:
        layer.self_attn.softcap = None


def no_logit_softcap(model, monkeypatch):
    model.logit_softcap = None


def wider_window(model, monkeypatch):
    model.model.windows = [window and window + 1 for window in model.model.windows]


def interleaved_rope(model, monkeypatch):
    def rotate(x, cos, sin):
        half = cos.shape[-1] // 2
        pairs = torch.stack((x[..., :half], x[..., half:]), -1).flatten(-2)
        return elementwise.rotate(pairs, cos, sin)

    monkeypatch.setattr(attention, "rotate", rotate)


def no_amplitude(model, monkeypatch):
    for one in model.model.ropes:
        one.amplitude = 1.0


def leaking_documents(model, monkeypatch):
    monkeypatch.setattr(decoder, "document_starts", lambda positions, **_: torch.zeros_like(positions))


def no_embed_scale(model, monkeypatch):
    model.model.embed_scale = None


def no_sinks(model, monkeypatch):
    for layer in model.model.layers:
        layer.self_attn.sinks.data.fill_(-1e4)


def other_routing(model, monkeypatch):
    for layer in model.model.layers:
        route = layer.mlp.route
        layer.mlp.route = lambda logits, route=route: (lambda w, e: (w * 1.01, e))(*route(logits))


def other_scale(model, monkeypatch):
    model.model.layers[0].self_attn.scale *= 1.01


def one_weight_off(model, monkeypatch):
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] += 0.02


def lost_gradient(model, monkeypatch):
    layer = model.model.layers[0].self_attn.k_proj
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda x: forward(x).detach())


def forgetful_cache(model, monkeypatch):
    update = LayerCache.update

    def forgetting(self, keys, values, length):
        keys, values = update(self, keys, values, length)
        return keys, values if length == 0 else values * (torch.arange(values.shape[2]) != 1)[:, None]

    monkeypatch.setattr(LayerCache, "update", forgetting)


def second_best(model, monkeypatch):
    monkeypatch.setattr(
        importlib.import_module("tt_models.generate"), "sample", lambda logits, *_, **__: logits.topk(2).indices[:, 1]
    )


BUGS = [
    (swapped_heads, "llama", 1),
    (other_epsilon, "llama", 1),
    (other_theta, "llama", 0),
    (interleaved_rope, "llama", 0),
    (no_amplitude, "llama", 4),
    (leaking_documents, "llama", 0),
    (wider_window, "mistral", 0),
    (no_qk_norm, "qwen3", 0),
    (no_softcap, "gemma2", 0),
    (no_logit_softcap, "gemma2", 0),
    (no_embed_scale, "gemma", 0),
    (no_sinks, "gpt_oss", 0),
    (other_routing, "mixtral", 0),
    (other_scale, "qwen2", 0),
    (one_weight_off, "llama", 0),
    (lost_gradient, "llama", 0),
    (forgetful_cache, "llama", 0),
    (second_best, "llama", 0),
]


@pytest.mark.parametrize(("bug", "model_type", "seed"), BUGS)
def test_planted_bug_is_caught(bug, model_type, seed, random_hf_config, reference_of, monkeypatch):
    config = random_hf_config(model_type, seed)
    if model_type == "mistral":
        config["sliding_window"] = 5
    reference = reference_of(config)
    model = tt_models.build(tt_models.config_from_hf(config)).eval()
    model.load_state_dict(reference.state_dict())
    assert is_within(certify(model, reference))
    bug(model, monkeypatch)
    certificate = certify(model, reference)
    assert not is_within(certificate)
    assert not is_within(certify(model, reference, factor=10 * FACTOR))  # there is room for rounding, not for bugs


def test_a_model_that_rounding_takes_far_is_equal_if_the_reference_is_as_far_from_fp64(random_hf_config, reference_of):
    reference = reference_of(random_hf_config("llama", 1) | {"num_hidden_layers": 8})
    with torch.no_grad():
        for layer in reference.model.layers:  # sharp attention multiplies every rounding
            layer.self_attn.q_proj.weight *= 60
    model = tt_models.build(tt_models.config_from_hf(reference.config.to_dict())).eval()
    model.load_state_dict(reference.state_dict())
    certificate = certify(model, reference)
    assert max(certificate["reference_errors"].values()) > FACTOR * LEAST
    assert is_within(certificate), certificate
    other_epsilon(model, None)
    assert not is_within(certify(model, reference))


def test_the_reference_has_its_weights_and_settings_back(random_hf_config, reference_of):
    reference = reference_of(random_hf_config("mixtral", 1))
    before, experts = {**reference.state_dict()}, reference.config._experts_implementation
    with in_fp64(reference) as truth:
        assert {value.dtype for value in truth.parameters()} == {torch.float64}
    assert all(value.dtype == before[name].dtype for name, value in reference.state_dict().items())
    assert all(value.equal(before[name]) for name, value in reference.state_dict().items())
    assert reference.config._experts_implementation == experts


def test_a_reference_without_a_weight_is_not_compared_with(directory):
    path = directory("llama")
    tensors = safetensors.load_file(path / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    safetensors.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"transformers finds no weights for model.layers.1.mlp.up_proj.weight"):
        load_reference(path)


def test_other_libraries_are_quiet_meanwhile_and_talk_again_afterwards(directory, capfd):
    from transformers.utils import logging as theirs

    bars, disabled = theirs.is_progress_bar_enabled(), logging.root.manager.disable
    path, _ = directory("llama"), capfd.readouterr()
    tt_models.verify(path, load=load, save=save)
    assert capfd.readouterr() == ("", "")
    assert (theirs.is_progress_bar_enabled(), logging.root.manager.disable) == (bars, disabled)


@pytest.mark.parametrize(("window", "reached"), [(23, True), (24, False), (40, False), (None, True)])
def test_a_window_that_the_compared_texts_do_not_reach_is_named(window, reached):
    config = {"model_type": "mistral", "hidden_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
    config |= {"num_hidden_layers": 1, "vocab_size": 9, "sliding_window": window, "max_position_embeddings": 64}
    found = not_reached(tt_models.build(tt_models.config_from_hf(config), device="meta"))
    assert found == ([] if reached else [f"the sliding window of {window} tokens: 24 are compared"])
