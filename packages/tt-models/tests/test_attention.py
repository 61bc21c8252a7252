"""Attention: what cannot be built, dropout only in training, and every number's effect."""

import pytest
import torch
import torch.nn.functional as F

import tt_models
from tt_models.attention import Attention
from tt_models.cpu import one_query
from tt_models.norm import RMSNorm
from tt_models.rope import Rope


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"num_attention_heads": 5}, "hidden_size 16 is not a multiple of num_attention_heads 5"),
        ({"dropout": 1.5}, "dropout must be in"),
        ({"dropout": -0.1}, "dropout must be in"),
    ],
)
def test_what_cannot_be_built_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Attention(**{"hidden_size": 16, "num_attention_heads": 4} | arguments)


def test_head_dim_apart_from_hidden_size():
    attention = Attention(10, 3, head_dim=4)
    assert attention.q_proj.weight.shape == (12, 10)
    assert attention.o_proj.weight.shape == (10, 12)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_dropout_acts_in_training_only(softcap):
    """torchtune 0.1.0 dropped attention weights in evaluation too."""
    torch.manual_seed(0)
    attention, x = Attention(16, 4, dropout=0.5, softcap=softcap), torch.randn(2, 6, 16)
    attention.eval()
    assert attention(x).equal(attention(x))
    plain = Attention(16, 4, softcap=softcap).eval()
    plain.load_state_dict(attention.state_dict())
    assert attention(x).equal(plain(x))
    attention.train()
    assert not attention(x).equal(attention(x))
    drawn = torch.stack([attention(x) for _ in range(3000)])
    assert ((drawn.mean(0) - plain(x)).abs() <= 6 * drawn.std(0) / 3000**0.5).all()  # six standard errors


def test_dropout_of_the_config_reaches_every_layer(small):
    model = small(attention_dropout=0.25)
    assert [layer.self_attn.dropout for layer in model.model.layers] == [0.25] * len(model.model.layers)
    ids = torch.randint(0, 60, (2, 9))
    assert model(ids).equal(model(ids))
    model.train()
    assert not model(ids).equal(model(ids))


@pytest.mark.parametrize(
    "argument",
    [
        {"scale": 2.0},
        {"softcap": 0.1},
        {"window": 3},
        {"rope": Rope(4, theta=100.0)},
        {"qk_norm": RMSNorm},
        {"sinks": True},
        {"qkv_bias": True},
        {"output_bias": True},
    ],
)
def test_every_number_has_an_effect(argument):
    torch.manual_seed(0)
    plain = Attention(16, 4)
    other = Attention(16, 4, **argument)
    for module in (plain, other):
        for name, parameter in module.named_parameters():
            torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(len(name)))
    x = torch.randn(1, 6, 16)
    shared = {"rope": other.rope.tables(torch.arange(6)[None], x.dtype)} if other.rope else {}
    if other.window:
        shared["mask"] = torch.ones(6, 6).tril().triu(-2).bool()
    assert not torch.allclose(other(x, **shared), plain(x), atol=1e-4)


def test_wide_sinks_take_everything_and_deep_ones_nothing(close):
    attention, plain, x = Attention(16, 4, sinks=True), Attention(16, 4), torch.randn(1, 6, 16)
    attention.load_state_dict({**plain.state_dict(), "sinks": torch.full((4,), -1e4)})
    close(attention(x), plain(x))
    with torch.no_grad():
        attention.sinks.fill_(1e4)
    assert (
        attention(x) - attention.o_proj.bias if attention.o_proj.bias is not None else attention(x)
    ).abs().max() == 0


def test_sequences_beyond_the_last_position_are_refused(small):
    model = small()
    limit = model.config.max_position_embeddings
    assert model(torch.zeros(1, limit, dtype=torch.int64)).shape[1] == limit
    with pytest.raises(ValueError, match=f"{limit + 1} tokens are more than max_position_embeddings {limit}"):
        model(torch.zeros(1, limit + 1, dtype=torch.int64))
    cache = tt_models.KVCache(model.config, batch_size=1, max_seq_len=limit + 5)
    model(torch.zeros(1, limit, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match="are more than"):
        model(torch.zeros(1, 1, dtype=torch.int64), cache=cache)
    two = torch.arange(limit).repeat(1, 2)  # documents, of which each is short enough
    assert model(torch.zeros(1, 2 * limit, dtype=torch.int64), position_ids=two).shape[1] == 2 * limit
    with pytest.raises(ValueError, match="are more than"):
        model(torch.zeros(1, 2 * limit, dtype=torch.int64), position_ids=torch.arange(2 * limit)[None])
    dynamic = small(rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    assert dynamic(torch.zeros(1, limit + 1, dtype=torch.int64)).shape[1] == limit + 1


def test_dynamic_rope_stretches_beyond_its_length_like_transformers(random_hf_config, reference_of, close):
    config = random_hf_config("llama", 0) | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    reference = reference_of(config)
    model = tt_models.build(tt_models.config_from_hf(config)).eval()
    model.load_state_dict(reference.state_dict())
    ids = torch.randint(0, 60, (1, 180))
    close(model(ids), reference(ids, use_cache=False).logits, 256)
    close(model(ids[:, :50]), reference(ids[:, :50], use_cache=False).logits, 256)
    assert not torch.allclose(model(ids)[:, :50], model(ids[:, :50]))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kv_heads", [6, 3, 1])
@pytest.mark.parametrize(
    ("dtype", "kernel"), [("float32", "other"), ("bfloat16", "other"), ("bfloat16", "avx512_bf16")]
)
def test_one_query_attends_as_exactly_as_sdpa(dtype, kernel, kv_heads, masked, monkeypatch):
    monkeypatch.setattr(one_query, "kernel", lambda: kernel)
    monkeypatch.setattr(one_query, "BLOCK", 3000)  # five heads at once
    q = torch.randn(4, 6, 1, 16, dtype=getattr(torch, dtype))
    keys, values = (torch.randn(4, kv_heads, 50, 16, dtype=q.dtype)[:, :, :37] for _ in range(2))  # of a cache
    mask = (torch.arange(37) >= torch.tensor([0, 3, 36, 11])[:, None])[:, None, None] if masked else None
    exact = F.scaled_dot_product_attention(
        *(x.double() for x in (q, keys, values)), attn_mask=mask, scale=0.3, enable_gqa=True
    )
    usual = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=0.3, enable_gqa=True)
    with torch.no_grad():
        found = one_query.attend_one_query(q, keys, values, mask, 0.3)
    assert (found.shape, found.dtype) == (q.shape, q.dtype)
    error, allowed = (found - exact).square().mean(), (usual - exact).square().mean()
    assert error.sqrt() < 2 * allowed.sqrt() + 1e-9


def test_one_query_with_a_gradient_has_one():
    q, keys, values = (torch.randn(1, 2, 1, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    one_query.attend_one_query(q, keys, values, None, 1.0).sum().backward()
    assert values.grad.eq(1).all()
