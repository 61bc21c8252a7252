"""Tensors of real size: above 2^24 values, which fp32 cannot count, and above 2^31, which int32 cannot."""

import dataclasses

import pytest
import torch

import tt_models
from tt_models.cpu.elementwise import gated, rotate
from tt_models.masks import block_mask, document_starts, interval_mask
from tt_models.moe import mix
from tt_models.norm import LateRoundingRMSNorm, OffsetRMSNorm, RMSNorm
from tt_models.rope import Rope
from tt_models.sampling import Sampling, filtered, sample

ROWS = 2**14 + 3  # of 1024: more than 2^24 values
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def with_real_vocabulary(name, **numbers):
    return dataclasses.replace(tt_models.get_config(name), hidden_size=64, intermediate_size=96, **SMALL, **numbers)


def test_weights_are_drawn_to_the_last_value():
    model = tt_models.build(with_real_vocabulary("gemma3_1b", vocab_size=2**18 + 5), dtype=torch.bfloat16)
    weight = model.model.embed_tokens.weight
    assert weight.numel() > 2**24
    for rows in (weight[1:1000], weight[-1000:]):
        assert rows.float().std().item() == pytest.approx(model.config.initializer_range, rel=0.05)
    assert weight[0].abs().sum() == 0  # the padding
    assert model(torch.tensor([[2**18 + 4]])).shape[-1] == 2**18 + 5


@pytest.mark.parametrize("kind", [RMSNorm, LateRoundingRMSNorm, OffsetRMSNorm])
def test_norms_reach_the_last_row(kind):
    norm, x = kind(1024).bfloat16(), torch.randn(ROWS, 1024).bfloat16().requires_grad_()
    assert x.numel() > 2**24
    with torch.no_grad():
        assert norm(x)[-5:].equal(norm(x[-5:]))
    norm(x).backward(torch.ones_like(x))
    last = x.detach()[-5:].requires_grad_()
    norm(last).backward(torch.ones_like(last))
    assert x.grad[-5:].equal(last.grad)


def test_gates_and_rotations_reach_the_last_row():
    gate, up = torch.randn(2, ROWS, 1024).bfloat16()
    with torch.no_grad():
        found = gated(torch.nn.functional.silu, gate, up)
        assert found[-5:].equal(gated(torch.nn.functional.silu, gate[-5:], up[-5:]))
        x = gate.view(1, ROWS, 8, 128).transpose(1, 2)
        cos, sin = Rope(128, theta=1e4).tables(torch.arange(ROWS)[None], torch.bfloat16)
        assert rotate(x, cos, sin)[:, :, -5:].equal(rotate(x[:, :, -5:], cos[:, :, -5:], sin[:, :, -5:]))


def test_tokens_are_mixed_by_expert_to_the_last_one():
    x, count = torch.randn(2**16 + 1, 256), 4
    chosen = torch.arange(x.shape[0])[:, None] % count
    found = mix(x, torch.ones_like(chosen).float(), chosen, count, lambda rows, _, experts: rows * experts[:, None])
    assert x.numel() > 2**24
    assert found[-9:].equal(x[-9:] * chosen[-9:])


@pytest.mark.parametrize("size", [2**18, 2**24])
def test_the_last_token_of_a_vocabulary_can_be_drawn(size):
    logits = torch.zeros(1, size)
    logits[0, -1] = 60.0
    for settings in ({"temperature": 0}, {}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.5}):
        assert sample(logits, Sampling(**settings)).item() == size - 1
    seen = torch.zeros(1, size, dtype=torch.bool)
    seen[0, -1] = True
    assert sample(logits, Sampling(temperature=0, repetition_penalty=2.0), seen_BV=seen).item() == size - 1


def test_a_nucleus_of_a_real_vocabulary_is_the_one_of_fp64():
    logits = torch.randn(2, 2**18, generator=torch.Generator().manual_seed(0)) * 4
    for top_p in (0.5, 0.9, 0.99):
        kept = filtered(logits, Sampling(top_p=top_p)).isfinite().sum(-1)
        ordered = logits.double().softmax(-1).sort(descending=True).values
        expected = ((ordered.cumsum(-1) - ordered) < top_p).sum(-1)
        assert kept.tolist() == expected.tolist()  # in fp32 it would be 40 tokens less


def test_columns_beyond_2_to_24_are_told_apart():
    start = 2**24 + 1
    positions = torch.tensor([[start, start + 1, start + 2, 0, 1]])
    assert document_starts(positions, offset=start).tolist() == [[0, 0, 0, start + 3, start + 3]]
    columns = torch.arange(start, start + 5)
    assert interval_mask(None, columns, columns, 2)[0, 0].sum(-1).tolist() == [1, 2, 2, 2, 2]


def test_a_cache_of_more_than_2_to_31_values_knows_its_size():
    config = tt_models.get_config("llama3_3_70b")
    cache = tt_models.KVCache(config, batch_size=8, max_seq_len=131072, device="meta", dtype=torch.bfloat16)
    assert cache.layers[0].keys.numel() == 8 * 8 * 131072 * 128 > 2**29
    assert cache.nbytes == 2 * 80 * 8 * 8 * 131072 * 128 * 2 > 2**31


def test_logits_and_hidden_states_of_more_than_2_to_31_values_have_their_shapes():
    model = tt_models.build(with_real_vocabulary("gemma3_1b"), device="meta", dtype=torch.bfloat16)
    ids = torch.zeros(1, 16384, dtype=torch.int64, device="meta")
    logits = model(ids)
    assert logits.shape == (1, 16384, 262144)
    assert logits.numel() > 2**31
    logits.float().sum().backward()
    assert all(value.grad.shape == value.shape for value in model.parameters())


def test_experts_of_more_than_2_to_31_values_are_split_and_joined():
    config = dataclasses.replace(tt_models.get_config("qwen3_30b_a3b"), num_hidden_layers=1, moe_intermediate_size=4352)
    model = tt_models.build(config, device="meta", dtype=torch.bfloat16)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    stacked = model.get_parameter(name)
    assert stacked.numel() > 2**31
    pieces = model.split_for_hf(name, stacked)
    assert len(pieces) == 2 * 128
    assert {tuple(piece.shape) for piece in pieces.values()} == {(4352, 2048)}
    assert model.join_from_hf(name, list(pieces.values())).shape == stacked.shape


def test_the_largest_published_model_is_counted():
    config = dataclasses.replace(
        tt_models.get_config("llama3_1_70b"),
        hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128,
    )  # fmt: skip
    model = tt_models.build(config, device="meta", dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == 405_853_388_800
    assert model.model.embed_tokens.weight.numel() == 128256 * 16384 > 2**30


def test_blocks_of_a_mask_over_a_million_tokens_count_right():
    blocks = block_mask(None, 2**17, 1024, torch.device("cpu"))
    assert int(blocks.kv_num_blocks.max() + blocks.full_kv_num_blocks.max()) <= 1024 // 128 + 1
    assert blocks.seq_lengths == (2**17, 2**17)
