"""Each preference loss against TRL's own code, in values and gradients, and against hand-made numbers."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import tt_train
from tt_train.losses.preferences import PAIR_LOSSES, Judged, Pairs, kto, log1mexp

TOKENS = torch.tensor([[3, 7, 1, 5], [4, 2, 6, 5]])


def log_probs(seed=0, dtype=torch.float64):
    """Per token, [2 sides, 4 pairs, 7 tokens], 0 beyond the end of each answer."""
    generator = torch.Generator().manual_seed(seed)
    values = -torch.rand(2, 4, 7, generator=generator, dtype=dtype) * 4
    return values * (torch.arange(7) < TOKENS[..., None])


def pairs_of(policy, reference=None):
    sums = (None, None) if reference is None else reference.sum(-1)
    return Pairs(*policy.sum(-1), *TOKENS, *sums)


def trl_loss(name, policy, reference, beta, label_smoothing):
    """``DPOTrainer._compute_loss`` on a model whose log-probabilities are ``policy``."""
    dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    mask = torch.zeros(8, 8, dtype=torch.long)
    mask[:, 1:] = (torch.arange(7) < TOKENS[..., None]).flatten(0, 1)
    flat = policy.flatten(0, 1)
    outputs = SimpleNamespace(
        log_probs=flat, entropy=flat.detach(), mean_logits=flat.detach(), is_top1=torch.zeros_like(flat).bool()
    )
    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=accelerator, aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[name], loss_weights=[1.0], beta=beta,
        label_smoothing=label_smoothing, use_weighting=False, _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros(8, 8, dtype=torch.long), "attention_mask": torch.ones(8, 8), "completion_mask": mask,
        "ref_chosen_logps": reference[0].sum(-1), "ref_rejected_logps": reference[1].sum(-1),
    }  # fmt: skip
    loss = dpo_trainer.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False)
    return loss, trainer._metrics["train"]


@pytest.mark.parametrize(
    ("name", "smoothing"),  # TRL 1.16 ignores label_smoothing in all but robust
    [("sigmoid", 0.0), ("sigmoid_norm", 0.0), ("robust", 0.0), ("robust", 0.2), ("hinge", 0.0), ("ipo", 0.0),
     ("apo_zero", 0.0), ("sppo_hard", 0.0)],
)  # fmt: skip
def test_a_loss_and_its_gradient_equal_trl(name, smoothing):
    policy, reference = log_probs().requires_grad_(), log_probs(1)
    theirs, metrics = trl_loss(name, policy, reference, 0.3, smoothing)
    (wanted,) = torch.autograd.grad(theirs, policy)
    pairs = pairs_of(policy, reference)
    options = {"label_smoothing": smoothing} if smoothing else {}
    ours, chosen, rejected = tt_train.dpo_loss(
        *pairs[:2], *pairs[4:6], beta=0.3, loss_type=name, chosen_tokens=TOKENS[0], rejected_tokens=TOKENS[1], **options
    )
    torch.testing.assert_close(ours.mean(), theirs, rtol=1e-6, atol=1e-9)
    (found,) = torch.autograd.grad(ours.mean(), policy)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)
    assert chosen.mean().item() == pytest.approx(metrics["rewards/chosen"][0], rel=1e-6)
    assert rejected.mean().item() == pytest.approx(metrics["rewards/rejected"][0], rel=1e-6)
    assert (chosen > rejected).double().mean().item() == pytest.approx(metrics["rewards/accuracies"][0])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_simpo_equals_the_cpo_trainer_of_trl(smoothing):
    module = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    accelerator = SimpleNamespace(device="cpu")
    trainer = SimpleNamespace(
        alpha=0.0, loss_type="simpo", simpo_gamma=0.5, beta=2.0, label_smoothing=smoothing, accelerator=accelerator
    )
    policy = log_probs().requires_grad_()
    means = policy.sum(-1) / TOKENS
    theirs, chosen, _ = module.CPOTrainer.cpo_loss(trainer, *means)
    ours = PAIR_LOSSES["simpo"](pairs_of(policy), beta=2.0, margin=0.5, label_smoothing=smoothing)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    wanted, found = (torch.autograd.grad(loss.mean(), policy, retain_graph=True)[0] for loss in (theirs, ours))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)
    rewards = tt_train.dpo_loss(
        *pairs_of(policy)[:2], beta=2.0, loss_type="simpo", chosen_tokens=TOKENS[0], rejected_tokens=TOKENS[1]
    )[1]
    torch.testing.assert_close(rewards, chosen)


def test_orpo_equals_the_formula_of_trl():
    """TRL casts to fp32, so that its code is no oracle at 1e-6 for fp64: its formula is."""
    module = pytest.importorskip("trl.experimental.orpo.orpo_trainer")
    policy = log_probs().requires_grad_()
    means = policy.sum(-1) / TOKENS
    odds = (means[0] - means[1]) - (module.log1mexp(means[0]) - module.log1mexp(means[1]))
    theirs = -0.4 * F.logsigmoid(odds)
    ours = PAIR_LOSSES["orpo"](pairs_of(policy), beta=0.4)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    wanted, found = (torch.autograd.grad(loss.mean(), policy, retain_graph=True)[0] for loss in (theirs, ours))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kl", [0.0, 1.7])
def test_kto_equals_the_formula_of_trl(kl):
    """kto_trainer.py of TRL 1.16, by desirable and undesirable answers and with both weights."""
    policy, reference = log_probs().flatten(0, 1).requires_grad_(), log_probs(1).flatten(0, 1).sum(-1)
    desirable = torch.tensor([True, False, True, True, False, False, True, False])
    ratios = policy.sum(-1) - reference
    chosen = 1 - torch.sigmoid(0.3 * (ratios[desirable] - kl))
    rejected = 1 - torch.sigmoid(0.3 * (kl - ratios[~desirable]))
    theirs = torch.cat((1.5 * chosen, 0.5 * rejected)).mean()
    judged = Judged(policy.sum(-1), reference, desirable, torch.tensor(kl))
    ours = kto(judged, beta=0.3, desirable_weight=1.5, undesirable_weight=0.5).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    wanted, found = (torch.autograd.grad(loss, policy, retain_graph=True)[0] for loss in (theirs, ours))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


def test_kto_pair_is_the_mean_of_torchtunes_two_losses_per_pair():
    policy, reference = log_probs(), log_probs(1)
    c, r = policy.sum(-1) - reference.sum(-1)
    kl_c, kl_r = c.mean().clamp(min=0), r.mean().clamp(min=0)
    theirs = torch.cat((1 - torch.sigmoid(0.3 * (c - kl_r)), 1 - torch.sigmoid(0.3 * (kl_c - r))))
    pairs = pairs_of(policy, reference)
    ours, _, _ = tt_train.dpo_loss(*pairs[:2], *pairs[4:6], beta=0.3, loss_type="kto_pair")
    torch.testing.assert_close(ours.mean(), theirs.mean(), rtol=1e-6, atol=1e-9)


def test_conservative_dpo_is_the_weighted_mean_of_both_directions():
    pairs = pairs_of(log_probs(), log_probs(1))
    swapped = Pairs(pairs[1], pairs[0], pairs[3], pairs[2], pairs[5], pairs[4])
    right, wrong = (PAIR_LOSSES["sigmoid"](each, beta=0.3) for each in (pairs, swapped))
    smoothed = PAIR_LOSSES["sigmoid"](pairs, beta=0.3, label_smoothing=0.2)
    torch.testing.assert_close(smoothed, 0.8 * right + 0.2 * wrong)


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "hinge", "ipo", "robust"])
def test_a_policy_that_is_the_reference_has_the_loss_of_chance(name):
    same = log_probs(dtype=torch.float32)
    loss = PAIR_LOSSES[name](pairs_of(same, same), beta=0.1)
    chance = {"hinge": 1.0, "ipo": 25.0}.get(name, math.log(2))
    assert loss.tolist() == [torch.tensor(chance, dtype=torch.float32).item()] * 4


@pytest.mark.parametrize("name", ["simpo", "ipo", "sigmoid_norm", "orpo"])
def test_a_mean_per_token_is_over_the_tokens_of_its_own_answer(name):
    """Trap 13: two lengths, by hand."""

    def pair(length_c, length_r):
        numbers = torch.tensor([-0.5 * length_c]), torch.tensor([-2.0 * length_r])
        lengths = torch.tensor([length_c]), torch.tensor([length_r])
        return Pairs(*numbers, *lengths, torch.tensor([-1.0 * length_c]), torch.tensor([-1.0 * length_r]))

    odds = (-0.5 + 2.0) - (math.log(1 - math.exp(-0.5)) - math.log(1 - math.exp(-2.0)))
    by_hand = {
        "simpo": math.log1p(math.exp(-0.1 * 1.5)), "ipo": (1.5 - 5) ** 2,
        "sigmoid_norm": math.log1p(math.exp(-0.1 * 1.5)), "orpo": 0.1 * math.log1p(math.exp(-odds)),
    }[name]  # fmt: skip
    for lengths in ((3, 11), (8, 2)):
        assert PAIR_LOSSES[name](pair(*lengths), beta=0.1).item() == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("name", PAIR_LOSSES)
@pytest.mark.parametrize("value", [0.0, -1e-30, -1e-8, -0.69, -200.0, -1e5])
def test_extreme_log_probabilities_and_empty_answers_stay_finite(name, value):
    """Trap 14."""
    policy = torch.full((2, 4), value, requires_grad=True)
    tokens = torch.tensor([[1, 0, 3, 0], [1, 2, 0, 0]])
    zero = torch.zeros(4)
    pairs = Pairs(*policy, *tokens, zero, zero, torch.zeros(()), torch.zeros(()))
    loss = PAIR_LOSSES[name](pairs, beta=0.1)
    (gradient,) = torch.autograd.grad(loss.sum(), policy)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()


def test_log1mexp_is_exact_near_zero_and_far_from_it():
    values = torch.tensor([-1e-7, -1e-3, -0.5, -0.6931, -0.6932, -1.0, -20.0, -80.0])
    exact = torch.log1p(-torch.exp(values.double()))
    torch.testing.assert_close(log1mexp(values).double(), exact, rtol=1e-5, atol=1e-12)
    gradient = torch.autograd.functional.jacobian(log1mexp, values).diagonal()
    torch.testing.assert_close(gradient.double(), -1 / torch.expm1(-values.double()), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"loss_type": "sigmiod"}, "loss_type must be one of sigmoid, "),
        ({"beta": 0.0}, "beta must be positive, got 0"),
        ({"loss_type": "ipo"}, "ipo is per token: give chosen_tokens"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "below 0.5, got 0.5"),
        ({"reference_chosen": None}, "needs the log-probabilities of a reference"),
    ],
)
def test_wrong_use_of_dpo_loss_is_named(arguments, words):
    given = dict(zip(("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected"),
                     torch.zeros(4, 3), strict=True))  # fmt: skip
    with pytest.raises(ValueError, match=words):
        tt_train.dpo_loss(**given | arguments)
