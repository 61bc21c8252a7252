"""``tt eval`` gives lm-evaluation-harness the numbers of its own ``hf`` model, on a real one, tuned or not."""

from types import SimpleNamespace

import pytest

LONGEST = 96  # tokens that both may read, so that requests below, at and over it are quick
SEA = "The old harbour lies at the mouth of the river, and ships carried wool, salt and timber from here. "
CHOICES = [
    ("The capital of France is", [" Paris", " Berlin", " a fish"]),
    ("Two and two make", [" four", " five"]),
    (SEA * 5, [" The warehouses have become shops.", " Plants use the light of the sun."]),
]
PROMPTS = ["Question: What is the capital of France?\nAnswer:", "Once upon a time", SEA * 5]


def requests(rows):
    return [SimpleNamespace(args=row, task_name="made") for row in rows]


@pytest.fixture(scope="session")
def quantized(tt, model, folder):
    """The model with int8 linear layers; what is left of it in fp32, so that both compute in it."""
    tt("quantize", model, "-o", folder / "int8-fp32", "--to", "int8", "--dtype", "fp32")
    return folder / "int8-fp32"


@pytest.mark.parametrize("kind", ["model", "merged", "tuned", "quantized"])
def test_a_real_model_is_scored_as_by_hf_at_and_over_the_context_length(request, kind, model):
    from lm_eval.models.huggingface import HFLM

    from tt_train.evals.harness import TT

    folder = request.getfixturevalue(kind)
    base, more = (model, {"peft": str(folder / "adapter")}) if kind == "tuned" else (folder, {})
    ours = TT(str(folder), device="cpu", dtype="fp32", max_length=LONGEST, tell=list)
    theirs = HFLM(str(base), device="cpu", dtype="float32", max_length=LONGEST, batch_size=1, **more)
    asked = requests([(context, choice) for context, choices in CHOICES for choice in choices])
    for (value, greedy), (expected, expected_greedy) in zip(
        ours.loglikelihood(asked), theirs.loglikelihood(asked), strict=True
    ):
        assert value == pytest.approx(expected, abs=1e-4, rel=1e-4)
        assert greedy == expected_greedy
    texts = requests([(SEA * number,) for number in (1, 5, 12)])
    assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), rel=1e-4)
    prompts = requests([(prompt, {"until": ["\n\n"], "max_gen_toks": 16}) for prompt in PROMPTS])
    assert ours.generate_until(prompts) == theirs.generate_until(prompts)
