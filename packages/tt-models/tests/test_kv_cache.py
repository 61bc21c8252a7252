"""The cache against the full forward: any batch, chunks, rings, reset, documents, memory."""

import pytest
import torch

import tt_models
from tt_models.auto import FAMILIES
from tt_models.parity import relative_error


def cache_of(model, batch=2, length=40):
    return tt_models.KVCache(model.config, batch_size=batch, max_seq_len=length)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_any_cut_into_chunks_equals_one_forward(model_type, small, close):
    model = small(model_type, 1, original_max_position_embeddings=64) if model_type == "phi3" else small(model_type, 1)
    ids = torch.randint(0, 60, (2, 30))
    whole = model(ids)
    for cuts in ([1] * 30, [5, 1, 1, 9, 1, 13], [12, 18], [2, 2, 2, 24], [29, 1]):
        cache = cache_of(model)
        pieces = [model(chunk, cache=cache) for chunk in ids.split(cuts, dim=1)]
        close(torch.cat(pieces, dim=1), whole, 256)


def test_explicit_positions_with_a_cache_are_the_same(small, close):
    model = small()
    ids = torch.randint(0, 60, (2, 12))
    cache, whole = cache_of(model), model(ids)
    first = model(ids[:, :7], torch.arange(7).expand(2, -1), cache)
    second = torch.cat([model(ids[:, i : i + 1], torch.full((2, 1), i), cache) for i in range(7, 12)], dim=1)
    close(torch.cat((first, second), dim=1), whole, 256)


def test_smaller_batches_fit_and_larger_ones_are_refused(small, close):
    model = small("gemma2")
    ids = torch.randint(0, 60, (3, 9))
    cache = cache_of(model, batch=3)
    for batch in (1, 3, 2):
        cache.reset()
        found = torch.cat([model(ids[:batch, :4], cache=cache), model(ids[:batch, 4:], cache=cache)], dim=1)
        close(found, model(ids[:batch]), 256)
    with pytest.raises(ValueError, match="made for 3 rows, got 4"):
        model(torch.randint(0, 60, (4, 2)), cache=cache)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_rows_that_are_repeated_continue_in_different_ways(small, close, family):
    """Each with its own end, behind left padding and beyond a window."""
    model = small(family)
    texts = [torch.randint(1, 60, (length,)) for length in (17, 12)]
    ends = torch.randint(1, 60, (5, 4))
    ids = torch.stack([torch.nn.functional.pad(text, (17 - len(text), 0)) for text in texts])
    cache = cache_of(model, length=21)
    model(ids, (torch.arange(17) - torch.tensor([[0], [5]])).clamp(min=0), cache)
    cache.repeat_rows(torch.tensor([2, 3]))
    found = model(ends, cache=cache)
    for row, text in enumerate([texts[0]] * 2 + [texts[1]] * 3):
        close(found[row : row + 1], model(torch.cat((text, ends[row]))[None])[:, len(text) :], 256)
    with pytest.raises(ValueError, match="tokens of 5 rows, got"):
        cache.repeat_rows(torch.tensor([2, 3]))


def test_reset_forgets(small):
    model = small("mistral")
    ids = torch.randint(0, 60, (2, 20))
    cache = cache_of(model)
    expected = model(ids, cache=cache)
    remembering = model(ids, cache=cache)
    assert not torch.allclose(remembering, expected, atol=1e-3)
    cache.reset()
    assert model(ids, cache=cache).equal(expected)


def test_full_cache_is_refused(small):
    model = small()
    cache = cache_of(model, length=6)
    model(torch.randint(0, 60, (2, 5)), cache=cache)
    with pytest.raises(ValueError, match="has room for 6 tokens: 5 are in it, 2 more do not fit"):
        model(torch.randint(0, 60, (2, 2)), cache=cache)
    for wrong in ({"batch_size": 0, "max_seq_len": 3}, {"batch_size": 1, "max_seq_len": 0}):
        with pytest.raises(ValueError, match="must be positive"):
            tt_models.KVCache(model.config, **wrong)


def test_memory_is_that_of_the_kv_heads():
    config = tt_models.get_config("llama3_2_1b")
    cache = tt_models.KVCache(config, batch_size=2, max_seq_len=100, dtype=torch.bfloat16)
    assert cache.nbytes == 2 * 16 * 2 * 8 * 100 * 64 * 2  # keys and values, layers, rows, KV heads, tokens, head, bytes
    assert tt_models.KVCache(config, batch_size=2, max_seq_len=100, dtype=torch.float32).nbytes == 2 * cache.nbytes
    assert tt_models.KVCache(config, batch_size=1, max_seq_len=3, device="meta").layers[0].keys.device.type == "meta"


def test_windows_hold_no_more_than_the_window():
    config = tt_models.get_config("gemma3_1b")
    cache = tt_models.KVCache(config, batch_size=1, max_seq_len=2000, device="meta")
    assert [layer.capacity for layer in cache.layers[:7]] == [512, 512, 512, 512, 512, 2000, 512]


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2"])
def test_a_new_document_in_a_cached_row_does_not_see_the_old_one(model_type, small, close):
    model = small(model_type)
    ids = torch.randint(0, 60, (2, 16))
    positions = torch.tensor([[*range(10), *range(6)], [*range(4), *range(12)]])
    whole = model(ids, positions)
    for cuts in ([16], [10, 6], [3, 9, 4], [1] * 16):
        cache, pieces = cache_of(model), []
        for chunk, position in zip(ids.split(cuts, dim=1), positions.split(cuts, dim=1), strict=True):
            pieces.append(model(chunk, position, cache))
        close(torch.cat(pieces, dim=1), whole, 256)
        following = model(ids[:, :1], cache=cache)  # goes on with each row's last document
        alone = [model(torch.cat((ids[row, cut:], ids[row, :1]))[None])[:, -1:] for row, cut in ((0, 10), (1, 4))]
        close(following, torch.cat(alone), 256)


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_gradients_flow_through_what_is_read_now_and_not_through_the_past(model_type, small):
    model = small(model_type, 1, **({"sliding_window": 5} if model_type == "mistral" else {}))
    ids = torch.randint(0, 60, (1, 9))
    for cuts in ([9], [8, 1], [6, 3]):
        cache = cache_of(model)
        with torch.no_grad():
            for chunk in ids.split(cuts, dim=1)[:-1]:
                model(chunk, cache=cache)
        model.zero_grad()
        model(ids[:, 9 - cuts[-1] :], cache=cache).square().sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad.abs().sum() > 0, name
    embedded = model.model.embed_tokens.weight.grad
    assert set(embedded.abs().sum(1).nonzero().flatten().tolist()) >= set(ids[0, 6:].tolist()) - {3}


def test_longrope_refuses_to_outgrow_its_context_in_a_cache(small):
    model = small("phi3", original_max_position_embeddings=16)
    cache = cache_of(model)
    model(torch.randint(0, 60, (2, 14)), cache=cache)
    with pytest.raises(ValueError, match="reset the cache"):
        model(torch.randint(0, 60, (2, 3)), cache=cache)


def test_rows_may_leave_a_cache_and_not_come_back(small, close):
    model = small()
    ids = torch.randint(0, 60, (3, 9))
    positions = torch.tensor([[*range(5)], [0, *range(4)], [0, 0, *range(3)]])
    for given in (None, positions):
        cache = cache_of(model, batch=3)
        model(ids[:, :5], given, cache)
        found = model(ids[:2, 5:6], cache=cache)
        starts = [0, 0] if given is None else [0, 1]
        alone = [model(ids[row : row + 1, start:6])[:, -1:] for row, start in enumerate(starts)]
        close(found, torch.cat(alone), 256)
        with pytest.raises(ValueError, match="has the tokens of 2 rows, got 3: reset it first"):
            model(ids[:, 6:7], cache=cache)
        cache.reset()
        model(ids, cache=cache)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_cache_in_fp32_serves_autocast(model_type, small):
    model = small(model_type, 1)
    ids = torch.randint(0, 60, (2, 14))
    with torch.no_grad():
        exact = model(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        whole = model(ids)
        own = relative_error(whole, exact)  # a router may choose another expert
        for cuts in ([9, 5], [9, 1, 1, 1, 1, 1], [1, 13]):
            cache = cache_of(model)
            pieces = [model(chunk, cache=cache) for chunk in ids.split(cuts, dim=1)]
            assert relative_error(torch.cat(pieces, dim=1), exact) <= 4 * own


def test_a_cache_of_another_dtype_than_the_model_is_refused(small):
    model = small().bfloat16()
    with pytest.raises(ValueError, match=r"stores torch.float32, the model computes in torch.bfloat16: make it with"):
        model(torch.randint(0, 60, (2, 3)), cache=cache_of(model))
