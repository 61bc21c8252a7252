"""Losses against torch's own, in values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from tt_train.losses import linear_cross_entropy


def pair(vocab=97, rows=23, width=16, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, width, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator, dtype=dtype).requires_grad_()
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels[::4] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_equals_torch_in_value_and_gradient(reduction, smoothing, softcap, chunk):
    hidden, weight, labels = pair(dtype=torch.float32)
    logits = hidden @ weight.T
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = F.cross_entropy(logits, labels, reduction=reduction, label_smoothing=smoothing)
    wanted = torch.autograd.grad(expected * 3, (hidden, weight))
    got = linear_cross_entropy(
        hidden, weight, labels, reduction=reduction, label_smoothing=smoothing, softcap=softcap, chunk_size=chunk
    )
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(torch.autograd.grad(got * 3, (hidden, weight)), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_leading_shape_is_free_and_a_frozen_weight_gets_no_gradient():
    hidden, weight, labels = pair(rows=24, dtype=torch.float32)
    shaped = hidden.detach().reshape(4, 6, -1).requires_grad_()
    loss = linear_cross_entropy(shaped, weight.detach(), labels.reshape(4, 6))
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.T, labels), rtol=1e-5, atol=1e-5)
    loss.backward()
    assert shaped.grad.shape == shaped.shape


def test_no_trained_position_gives_a_zero_sum():
    hidden, weight, labels = pair(dtype=torch.float32)
    assert linear_cross_entropy(hidden, weight, torch.full_like(labels, -100), reduction="sum") == 0


def test_half_precision_sums_in_fp32():
    hidden, weight, labels = (x.bfloat16() if x.is_floating_point() else x for x in pair(rows=400))
    loss = linear_cross_entropy(hidden, weight, labels, reduction="sum")
    assert loss.dtype == torch.float32
    exact = F.cross_entropy((hidden.double() @ weight.double().T), labels, reduction="sum")
    torch.testing.assert_close(loss.double(), exact, rtol=2e-3, atol=0)


def test_many_chunks_in_bf16_lose_no_more_of_the_gradient_than_one():
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(4096, 64, generator=generator) + 0.5).bfloat16()
    weight = (torch.randn(500, 64, generator=generator) * 0.05).bfloat16()
    labels = torch.randint(0, 20, (4096,), generator=generator)
    exact = weight.double().requires_grad_()
    F.cross_entropy(hidden.double() @ exact.T, labels, reduction="sum").backward()

    def error(chunk_size):
        ours = weight.clone().requires_grad_()
        ours.grad_dtype = torch.float32  # as in a run, where gradients are fp32
        linear_cross_entropy(hidden, ours, labels, reduction="sum", chunk_size=chunk_size).backward()
        assert ours.grad.dtype == torch.float32
        return (ours.grad.double() - exact.grad).norm() / exact.grad.norm()

    assert error(8) < 2 * error(4096)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"reduction": "none"}, "reduction must be"), ({"labels": torch.zeros(3, dtype=torch.long)}, "leading shape")],
)
def test_wrong_use_is_named(arguments, words):
    hidden, weight, labels = pair()
    with pytest.raises(ValueError, match=words):
        linear_cross_entropy(**{"hidden": hidden, "weight": weight, "labels": labels, **arguments})
