"""Scores of the quickstart: batched greedy answers against one at a time, exact match, differences of logits."""

from pathlib import Path
from typing import Any

import pytest
import torch

import tt_models
import tt_train
from tt_cli.quickstart import story
from tt_cli.quickstart.rows import Row

QUESTIONS = ["Repeat red", "Repeat the word blue, please, and then green", "black", "Repeat the word red."]
ROWS = [Row("add", "1 + 1", "2"), Row("add", "1 + 2", "3"), Row("sort", "b a", "a b")]


@pytest.fixture(scope="module")
def loaded(model_dir: Path) -> tuple[tt_models.Decoder, Any]:
    return tt_train.load(model_dir, device="cpu")


def test_exact_match_is_letter_by_letter():
    assert story.exact_match(ROWS, ["2", "3", "a b"]) == 1.0
    assert story.exact_match(ROWS, ["2", "3 ", "a  b"]) == pytest.approx(1 / 3)
    assert story.exact_match(ROWS, ["2...", "", "A b"]) == 0.0


def test_each_kind_has_its_own_score():
    assert story.by_kind(ROWS, ["2", "", "a b"]) == {"add": 0.5, "sort": 1.0}


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_answers_do_not_depend_on_the_batch(
    loaded: tuple[tt_models.Decoder, Any], batch: int, monkeypatch: pytest.MonkeyPatch
):
    model, tokenizer = loaded
    monkeypatch.setattr(story, "BATCH", batch)
    expected = []
    for question in QUESTIONS:
        ids = torch.tensor([story.prompt_ids(tokenizer, question)])
        for _ in range(story.MAX_NEW_TOKENS):
            with torch.no_grad():
                ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
            if int(ids[0, -1]) in tokenizer.eos_ids:
                break
        new = ids[0, len(story.prompt_ids(tokenizer, question)) :].tolist()
        ended = new[-1] in tokenizer.eos_ids
        expected.append(tokenizer.decode(new[:-1]) if ended else tokenizer.decode(new) + "...")
    assert story.answers(model, tokenizer, QUESTIONS) == expected


def test_an_answer_stops_at_the_end_token_and_one_without_it_is_marked(
    loaded: tuple[tt_models.Decoder, Any], monkeypatch: pytest.MonkeyPatch
):
    model, tokenizer = loaded
    end, letter = tokenizer.eos_ids[0], tokenizer.encode("a", add_bos=False, add_eos=False)[0]

    def generate(model: object, prompts: torch.Tensor, **settings: Any) -> torch.Tensor:
        new = torch.tensor([[letter, end, letter], [letter, letter, letter]])
        return torch.cat([prompts, new], dim=1)

    monkeypatch.setattr(tt_models, "generate", generate)
    assert story.answers(model, tokenizer, ["x", "y"]) == ["a", "aaa..."]


def test_a_model_differs_from_itself_by_nothing_and_from_another_by_what_was_added(
    loaded: tuple[tt_models.Decoder, Any], model_dir: Path
):
    model, tokenizer = loaded
    other, _ = tt_train.load(model_dir, device="cpu")
    assert story.largest_difference(model, other, tokenizer, QUESTIONS) == 0.0
    with torch.no_grad():
        other.output_weight.mul_(1.25)
    assert story.largest_difference(model, other, tokenizer, QUESTIONS) == pytest.approx(0.25, rel=1e-4)
