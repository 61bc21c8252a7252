"""Certificates against transformers: passed if the model is the same, failed if it is not."""

import json

import pytest

from tt_train import ConfigError
from tt_train.models.verify import verify

pytest.importorskip("transformers")


def test_a_model_gets_its_certificate(model_dir):
    certificate = verify(model_dir)
    assert certificate["passed"]
    assert certificate["errors"]["logits"] <= certificate["limits"]["logits"]
    assert json.loads(json.dumps(certificate)) == certificate


def test_a_planted_bug_is_refused(model_dir, monkeypatch):
    """An epsilon that is wrong by a little."""
    import tt_train.models.verify as module

    load = module._load

    def wrong(folder):
        model = load(folder)
        model.model.norm.eps *= 100
        return model

    monkeypatch.setattr(module, "_load", wrong)
    certificate = verify(model_dir)
    assert not certificate["passed"]
    assert certificate["errors"]["logits"] > certificate["limits"]["logits"]


def test_an_adapter_is_no_model_to_verify_and_the_cure_is_to_merge_it(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=rf"verify takes a model: tt merge {tmp_path} -o DIR"):
        verify(tmp_path)
