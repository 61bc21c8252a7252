"""Losses against torch's own, in values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import tt_models
import tt_peft
from tt_models.cpu import products
from tt_train.losses.chunks import probabilities
from tt_train.losses.cross_entropy import cross_entropy, linear_cross_entropy

CONFIG = {
    "model_type": "llama", "vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "initializer_range": 0.2, "hidden_act": "silu",
}  # fmt: skip


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
def test_equals_torch_in_value_and_gradient(reduction, smoothing, softcap, chunk, monkeypatch):
    monkeypatch.setattr("tt_train.losses.chunks.CACHED_BYTES", 3 * 4 * 97)  # blocks of 3 rows
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


@pytest.mark.parametrize("scale", [0.01, 5.0, 80.0])
def test_probabilities_and_their_normalizer_are_as_exact_as_those_of_log_softmax(scale):
    logits = torch.randn(7, 30_000, generator=torch.Generator().manual_seed(0)) * scale
    logits[0] += 1e4
    logits[1, 5:] = -torch.inf
    exact = logits.double()
    p, log_z = probabilities(logits)
    own_error = (logits.log_softmax(-1)[2:] - exact.log_softmax(-1)[2:]).abs().max()
    last_digits = torch.finfo(torch.float32).eps * exact.logsumexp(-1).abs()
    assert ((log_z - exact.logsumexp(-1)).abs() <= own_error + 2 * last_digits).all()
    torch.testing.assert_close(p.double(), exact.softmax(-1), rtol=3e-5, atol=1e-12)


def test_no_trained_position_gives_a_zero_sum():
    hidden, weight, labels = pair(dtype=torch.float32)
    assert linear_cross_entropy(hidden, weight, torch.full_like(labels, -100), reduction="sum") == 0


@pytest.mark.parametrize("head", ["matrix", "adapter"])
@pytest.mark.parametrize("packed", [False, True])
def test_ignored_labels_cost_no_row_of_a_product_with_the_head(head, packed):
    model = tt_models.build(tt_models.config_from_hf(CONFIG))
    if head == "adapter":
        tt_peft.apply_lora_(model, tt_peft.LoRAConfig(target_modules=("q_proj", "lm_head")))
    ids, positions = torch.randint(0, 90, (2, 12)), torch.arange(12).expand(2, -1)
    labels = torch.full_like(ids, -100)
    labels[0, 3:5], labels[1, 11] = ids[0, 3:5], ids[1, 11]
    batch = {"input_ids": ids, "labels": labels} | ({"position_ids": positions % 6} if packed else {})
    rows = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            shapes = [tuple(x.shape) for x in args if isinstance(x, torch.Tensor)]
            if "mm" in str(func) and any(90 in shape for shape in shapes):
                rows.append({size for shape in shapes for size in shape} - {90, 32, 8})
            return func(*args, **(kwargs or {}))

    with Products():
        cross_entropy(model, batch).loss.backward()
    assert len(rows) >= 2
    assert all(sizes == {3} for sizes in rows)


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


@pytest.mark.parametrize("packed", [False, True])
def test_one_trained_token_has_the_loss_of_that_token(packed):
    """Token t is predicted from those before it: of labels shifted twice or not at all, each loss is another."""
    torch.manual_seed(3)
    model = tt_models.build(tt_models.config_from_hf(CONFIG))
    ids, positions = torch.randint(0, 90, (1, 12)), torch.arange(12)[None]
    if packed:
        positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    log_probs = model(ids, positions).float().log_softmax(-1)
    for token in range(12):
        labels = torch.full_like(ids, -100)
        labels[0, token] = ids[0, token]
        found = cross_entropy(model, {"input_ids": ids, "labels": labels, "position_ids": positions})
        if token == 0:  # nothing predicts it
            assert (float(found.loss.detach()), found.count) == (0.0, 0)
            continue
        expected = -log_probs[0, token - 1, ids[0, token]]
        torch.testing.assert_close(found.loss, expected, rtol=1e-5, atol=1e-5)
        assert found.count == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"reduction": "none"}, "reduction must be"), ({"labels": torch.zeros(3, dtype=torch.long)}, "leading shape")],
)
def test_wrong_use_is_named(arguments, words):
    hidden, weight, labels = pair()
    with pytest.raises(ValueError, match=words):
        linear_cross_entropy(**{"hidden": hidden, "weight": weight, "labels": labels, **arguments})


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize("chosen", [True, False])
def test_gradients_in_fp32_are_near_fp64_whichever_library_multiplies(chosen, monkeypatch):
    monkeypatch.setattr(products, "BY_ONEDNN", {torch.float32} if chosen else set())
    monkeypatch.setattr(products, "WORTH", 0)
    monkeypatch.setattr(products, "BUFFER", 500)  # several parts, the last one smaller
    called, inner = [], products.by_onednn
    monkeypatch.setattr(products, "by_onednn", lambda *words: called.append(words) or inner(*words))
    labels, leaves = torch.randint(0, 90, (50,)), [torch.randn(50, 24), torch.randn(90, 24)]
    exact = [leaf.double().requires_grad_() for leaf in leaves]
    found = [leaf.clone().requires_grad_() for leaf in leaves]
    expected = F.cross_entropy(exact[0] @ exact[1].T, labels)
    loss = linear_cross_entropy(*found, labels, chunk_size=20)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(torch.autograd.grad(loss, found), torch.autograd.grad(expected, exact), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)
    assert bool(called) == chosen
