"""The certificate of a directory, and the bugs that it must catch."""

import json
import math
from pathlib import Path

import pytest
import torch

import tt_models
from tt_models import attention, decoder, rope
from tt_models.auto import FAMILIES
from tt_models.norm import RMSNorm
from tt_models.parity import certify, relative_error, state_error

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
    assert not tt_models.verify(path, load=load, save=save, tolerance=0.0)["passed"]


def test_a_wrong_copy_is_not_certified(directory):
    def save_wrongly(model, path):
        with torch.no_grad():
            model.model.norm.weight[0] += 1e-3
        save(model, path)

    certificate = tt_models.verify(directory("llama"), load=load, save=save_wrongly)
    assert not certificate["passed"]
    assert certificate["errors"]["written_back"] > 1e-5
    assert certificate["errors"]["logits"] < 1e-5


def change_config(path, **changes):
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_copy_with_another_config_is_not_certified(directory):
    def save_wrongly(model, path):
        save(model, path)
        change_config(path, rms_norm_eps=model.config.rms_norm_eps * 1.5)

    certificate = tt_models.verify(directory("llama"), load=load, save=save_wrongly)
    assert not certificate["passed"]
    assert certificate["errors"]["written_back"] > 1e-5


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
        return rope.rotate(pairs, cos, sin)

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
]


@pytest.mark.parametrize(("bug", "model_type", "seed"), BUGS)
def test_planted_bug_is_caught(bug, model_type, seed, random_hf_config, reference_of, monkeypatch):
    config = random_hf_config(model_type, seed)
    if model_type == "mistral":
        config["sliding_window"] = 5
    reference = reference_of(config)
    model = tt_models.build(tt_models.config_from_hf(config)).eval()
    model.load_state_dict(reference.state_dict())
    sound = certify(model, reference)
    assert max(value for value in sound.values() if isinstance(value, float)) <= 1e-5
    bug(model, monkeypatch)
    errors = {name: value for name, value in certify(model, reference).items() if isinstance(value, float)}
    print(f"{bug.__name__:18} {model_type:8} " + " ".join(f"{name}={value:.0e}" for name, value in errors.items()))
    assert max(errors.values()) > 1e-4
