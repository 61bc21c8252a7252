"""Log-probabilities without logits, against log_softmax of all logits; one way for plain, tied and adapted heads."""

import pytest
import torch
import torch.nn.functional as F

import tt_models
import tt_peft
from tt_train.losses import chunks
from tt_train.losses.chunks import WeightGradient
from tt_train.losses.cross_entropy import cross_entropy, linear_cross_entropy
from tt_train.losses.log_probs import linear_log_probs, token_log_probs


def inputs(vocab=97, rows=23, width=16):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, width, generator=generator).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator).requires_grad_()
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels[::4] = -100
    return hidden, weight, labels


def reference(hidden, weight, labels, softcap):
    """The same by torch, of all logits in fp64."""
    logits = hidden.double() @ weight.double().T
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    picked = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    keep = labels != -100
    return torch.where(keep, picked, 0.0), torch.where(keep, logits.mean(-1), 0.0)


@pytest.mark.parametrize("frozen", ["nothing", "weight", "hidden"])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_log_probs_and_both_gradients_equal_those_of_all_logits(frozen, softcap, chunk, monkeypatch):
    monkeypatch.setattr("tt_train.losses.chunks.CACHED_BYTES", 3 * 4 * 97)  # blocks of 3 rows
    hidden, weight, labels = inputs()
    upstream = torch.randn(labels.shape, generator=torch.Generator().manual_seed(2))  # a different one per position
    trained = [x for name, x in (("hidden", hidden), ("weight", weight)) if name != frozen]
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        tensor.requires_grad_(name != frozen)
    expected, mean = reference(hidden, weight, labels, softcap)
    wanted = torch.autograd.grad((expected * upstream).sum(), trained)
    found = linear_log_probs(hidden, weight, labels, softcap=softcap, chunk_size=chunk)
    torch.testing.assert_close(found.log_probs.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.mean_logits.double(), mean, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(torch.autograd.grad((found.log_probs * upstream).sum(), trained), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize(("heads", "computed"), [(0, 24), (1, 8), (2, 0)])
def test_logits_of_at_most_two_heads_are_kept_for_one_backward_pass(heads, computed, softcap, monkeypatch):
    monkeypatch.setattr(chunks, "KEPT_HEADS", heads)
    hidden, weight, labels = inputs(rows=24)
    product, rows = chunks.multiply_, []
    monkeypatch.setattr(
        chunks, "multiply_", lambda out, *factors, **kind: rows.append(len(out)) or product(out, *factors, **kind)
    )
    labels = labels.clamp(min=0)
    total = (linear_log_probs(hidden, weight, labels, softcap=softcap, chunk_size=4).log_probs * labels).sum()
    rows.clear()
    first = torch.autograd.grad(total, [hidden, weight], retain_graph=True)
    assert sum(count for count in rows if count == 4) == computed  # those of the gradient of the head have 97
    for ours, again in zip(first, torch.autograd.grad(total, [hidden, weight]), strict=True):
        assert torch.equal(ours, again)
    (expected, _), wanted = reference(hidden, weight, labels, softcap), [hidden, weight]
    for ours, theirs in zip(first, torch.autograd.grad((expected * labels).sum(), wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_a_shape_of_rows_is_kept_and_no_trained_position_gives_zeros():
    hidden, weight, labels = inputs(rows=24)
    rows = linear_log_probs(hidden.reshape(4, 6, -1), weight, labels.reshape(4, 6))
    torch.testing.assert_close(rows.log_probs, linear_log_probs(hidden, weight, labels).log_probs.reshape(4, 6))
    none = linear_log_probs(hidden, weight, torch.full_like(labels, -100)).log_probs
    none.sum().backward()
    assert none.tolist() == [0.0] * 24
    assert hidden.grad.abs().sum() == 0 == weight.grad.abs().sum()


def test_labels_of_another_shape_are_refused():
    hidden, weight, labels = inputs()
    with pytest.raises(ValueError, match="leading shape"):
        linear_log_probs(hidden, weight, labels[1:])


def test_without_gradient_nothing_is_computed_for_one(monkeypatch):
    monkeypatch.setattr(WeightGradient, "__init__", lambda *_: pytest.fail("a gradient that nobody asked for"))
    hidden, weight, labels = inputs()
    with torch.no_grad():
        assert not linear_log_probs(hidden, weight, labels).log_probs.requires_grad
        assert not linear_cross_entropy(hidden, weight, labels).requires_grad


def test_the_gradients_of_cross_entropy_are_given_away_once():
    hidden, weight, labels = inputs()
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass only"):
        loss.backward()


# ---- heads ---------------------------------------------------------------------------------------------------------


def model_of(head, *, tied=False, softcap=None, width=16):
    torch.manual_seed(3)
    config = tt_models.config_from_hf(
        {
            "model_type": "llama", "vocab_size": 61, "hidden_size": width, "intermediate_size": 32,
            "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": tied, "initializer_range": 0.3,
        }
    )  # fmt: skip
    model = tt_models.build(config)
    model.logit_softcap = softcap
    if head is not None:
        tt_peft.apply_lora_(model, tt_peft.LoRAConfig(rank=4, **head))
        with torch.no_grad():  # an adapter that was trained a little
            for name, parameter in tt_peft.adapter_parameters(model).items():
                parameter.add_(torch.randn_like(parameter), alpha=0.2 if "magnitude" not in name else 0.05)
    return model.train()


HEADS = {
    "plain": (None, False),
    "tied": (None, True),
    "lora": ({"target_modules": ["q_proj", "lm_head"]}, False),
    "dora": ({"target_modules": ["q_proj", "lm_head"], "use_dora": True}, False),
    "saved": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
    "tied and adapted below": ({"target_modules": ["q_proj", "v_proj"]}, True),
    "quantized": (
        {"target_modules": ["q_proj", "lm_head"], "quantize_base": True, "quantize_skip": ["lm_head"]},
        False,
    ),
}


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("head", HEADS)
def test_every_head_goes_by_chunks_and_equals_all_logits(head, softcap, monkeypatch):
    settings, tied = HEADS[head]
    model = model_of(settings, tied=tied, softcap=softcap)
    monkeypatch.setattr("tt_train.losses.chunks.CHUNK_BYTES", 1)  # 16 positions at a time
    monkeypatch.setattr(type(model), "logits", lambda *_: pytest.fail("all logits"))
    largest = []
    for module, name in ((F, "linear"), (torch, "mm")):
        product = getattr(module, name)
        noted = lambda *a, product=product, **k: largest.append(product(*a, **k)) or largest[-1]  # noqa: E731
        monkeypatch.setattr(module, name, noted)
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, 61, (3, 30), generator=generator)
    labels = ids.clone()
    labels[:, :5] = -100
    trained = [p for p in model.parameters() if p.requires_grad]

    def gradients(loss):
        return torch.autograd.grad(loss, trained, allow_unused=True)

    entropy = cross_entropy(model, {"input_ids": ids, "labels": labels})
    found = gradients(entropy.loss)
    hidden = model.hidden_states(ids)
    keep = labels[:, 1:] != -100
    upstream = torch.randn(int(keep.sum()), generator=generator)
    log_probs, mean = token_log_probs(model, hidden[:, :-1][keep], labels[:, 1:][keep])
    of_log_probs = gradients((log_probs * upstream).sum())
    assert max(y.shape[0] for y in largest if y.shape[-1] == 61 and y.dim() == 2) <= 16
    monkeypatch.undo()

    logits = model.logits(model.hidden_states(ids))[:, :-1][keep].float()
    expected = F.cross_entropy(logits, labels[:, 1:][keep], reduction="sum")
    torch.testing.assert_close(entropy.loss, expected, rtol=1e-5, atol=1e-5)
    wanted = gradients(expected)
    picked = logits.log_softmax(-1).gather(1, labels[:, 1:][keep][:, None]).squeeze(1)
    torch.testing.assert_close(log_probs, picked, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mean, logits.mean(-1), rtol=1e-5, atol=1e-5)
    picked = model.logits(model.hidden_states(ids))[:, :-1][keep].float().log_softmax(-1)
    wanted_log = gradients((picked.gather(1, labels[:, 1:][keep][:, None]).squeeze(1) * upstream).sum())
    for ours, theirs in zip([*found, *of_log_probs], [*wanted, *wanted_log], strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item() + 1e-9)


def test_a_change_that_bf16_would_round_away_in_the_weight_counts_in_an_adapted_head():
    model = model_of({"target_modules": ["lm_head"]}, width=256).to(torch.bfloat16)
    head = model.lm_head
    adapter = head.adapters["default"]
    hidden, labels = torch.ones(61, 256).bfloat16(), torch.arange(61)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(7)).sign() * 0.3)
        adapter.lora_A.zero_()[0] = 1
        adapter.lora_B.zero_()
        before = token_log_probs(model, hidden, labels).log_probs
        adapter.lora_B[::2, 0] = 2**-11 / adapter.spec.scaling  # a quarter of the distance between bf16 numbers at 0.3
        assert torch.equal(head.effective_weight(), head.weight)
        change = token_log_probs(model, hidden, labels).log_probs - before
    assert 0.03 < change[::2].mean() < 0.125


def test_dropout_of_an_adapted_head_is_the_same_in_the_backward_pass():
    model = model_of({"target_modules": ["lm_head"], "dropout": 0.5})
    hidden = torch.randn(40, 16, generator=torch.Generator().manual_seed(5))
    labels = torch.arange(40)
    B = model.lm_head.adapters["default"].lora_B

    def value():
        torch.manual_seed(6)
        return token_log_probs(model, hidden, labels).log_probs.sum()

    (gradient,) = torch.autograd.grad(value(), B)
    step = torch.zeros_like(B)
    step[7, 2] = 1e-2
    with torch.no_grad():
        B += step
        high = value()
        B -= 2 * step
        low = value()
    torch.testing.assert_close(gradient[7, 2], (high - low) / 2e-2, rtol=1e-2, atol=1e-3)


def test_bf16_weight_gradients_of_many_products_stay_exact():
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(2048, 32, generator=generator) + 0.5).bfloat16()
    weight = (torch.randn(300, 32, generator=generator) * 0.05).bfloat16()
    labels = torch.randint(0, 20, (2048,), generator=generator)
    exact = weight.double().requires_grad_()
    reference(hidden.double(), exact, labels, None)[0].sum().backward()
    ours = weight.clone().requires_grad_()
    ours.grad_dtype = torch.float32
    linear_log_probs(hidden, ours, labels, chunk_size=32).log_probs.sum().backward()
    assert (ours.grad.double() - exact.grad).norm() / exact.grad.norm() < 2**-8
