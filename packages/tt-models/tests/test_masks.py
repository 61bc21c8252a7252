"""Document masks, and the block mask of flex_attention against the dense one."""

import pytest
import torch

import tt_models
from tt_models import decoder
from tt_models.attention import attend, plain_attend
from tt_models.auto import FAMILIES
from tt_models.cpu import attention as cpu_attention
from tt_models.masks import block_mask, document_lengths, document_starts, interval_mask, split_documents
from tt_models.parity import relative_error

POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7], [0, 0, 0, 0, 1, 2, 3, 4]])


def test_documents_begin_where_positions_do_not_go_on():
    starts = document_starts(POSITIONS)
    assert starts.tolist() == [[0, 0, 0, 3, 3, 5, 6, 6], [0] * 8, [0, 1, 2, 3, 3, 3, 3, 3]]
    assert document_lengths(POSITIONS, starts).tolist() == [[3, 3, 3, 2, 2, 1, 2, 2], [8] * 8, [1, 1, 1, 5, 5, 5, 5, 5]]


def test_documents_may_go_on_from_a_cache():
    starts = document_starts(torch.tensor([[4, 5, 0], [0, 1, 2]]), offset=6, first_B=torch.tensor([2, 0]))
    assert starts.tolist() == [[2, 2, 8], [6, 6, 6]]


def test_positions_that_do_not_begin_at_zero_are_one_document():
    assert document_starts(torch.tensor([[5, 6, 7]])).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("window", [None, 2, 5])
def test_interval_mask_is_the_definition(window):
    starts = document_starts(POSITIONS)
    columns = torch.arange(8)
    mask = interval_mask(starts, columns, columns, window)
    for row in range(3):
        for i in range(8):
            for j in range(8):
                same = starts[row, i] == starts[row, j]
                assert bool(mask[row, 0, i, j]) == bool(same and j <= i and (window is None or i - j < window))


@pytest.mark.parametrize("seq_len", [1, 64, 128, 200, 300])
@pytest.mark.parametrize("window", [None, 1, 60, 150])
@pytest.mark.parametrize("packed", [False, True])
def test_flex_sees_what_the_dense_mask_sees(packed, window, seq_len, close):
    torch.manual_seed(seq_len)
    starts = None
    if packed:
        begins = (torch.rand(2, seq_len) < 0.02).long() * torch.arange(seq_len)
        starts = begins.cummax(dim=1).values
    columns = torch.arange(seq_len)
    q, k, v = (torch.randn(2, heads, seq_len, 16) for heads in (4, 2, 2))
    dense = interval_mask(starts, columns, columns, window)
    blocks = block_mask(starts, seq_len, window, q.device)
    for softcap, sinks in ((None, None), (0.8, None), (None, torch.randn(4))):
        settings = {"scale": 0.3, "softcap": softcap, "sinks": sinks}
        found = attend(q, k, v, mask=blocks, **settings)
        close(found, attend(q, k, v, mask=dense, **settings))


def test_flex_skips_blocks_that_nobody_sees():
    starts = torch.zeros(1, 1024, dtype=torch.int64)
    starts[:, 512:] = 512
    blocks = block_mask(starts, 1024, None, starts.device)
    assert (blocks.kv_num_blocks + blocks.full_kv_num_blocks).flatten().tolist() == [1, 2, 3, 4, 1, 2, 3, 4]
    windowed = block_mask(None, 1024, 128, starts.device)
    assert (windowed.kv_num_blocks + windowed.full_kv_num_blocks).flatten().tolist() == [1, 2, 2, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_a_decoder_over_flex_is_the_same(model_type, small, monkeypatch, close):
    model = small(model_type, 1)
    ids, positions = torch.randint(0, 60, (3, 8)), POSITIONS

    with torch.no_grad():  # flex_attention has no backward on the CPU
        expected = model(ids, positions)
    used = []

    def only_flex(starts, queries, keys, window):
        used.append(window)
        return block_mask(starts, queries.numel(), window, queries.device)

    monkeypatch.setattr(decoder, "interval_mask", only_flex)
    with torch.no_grad():
        found = model(ids, positions)
    assert used
    close(found, expected, 256)


@pytest.mark.parametrize("faster", [set(), {torch.float32}])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_documents_in_tiles_or_one_by_one_are_the_same_as_under_a_mask(model_type, faster, small, monkeypatch):
    monkeypatch.setattr(cpu_attention, "FASTER_IN", faster)
    monkeypatch.setattr(cpu_attention, "WORTH", 1)
    model = small(model_type, 2)
    ids = torch.randint(4, 60, (2, 80))
    positions = torch.tensor([[*range(9), *range(60), *range(11)], [*range(80)]])

    def run(fewest):
        monkeypatch.setattr(decoder, "FEWEST", fewest)
        model.zero_grad()
        logits = model(ids, positions)
        logits.square().sum().backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        return logits, gradients

    masks = []
    monkeypatch.setattr(decoder, "interval_mask", lambda *args: masks.append(args) or interval_mask(*args))
    expected, gradients = run(81)
    assert masks
    masks.clear()
    logits, found = run(64)
    assert not masks
    limit = 256 * torch.finfo(logits.dtype).eps  # as for fixture close
    assert relative_error(logits, expected) < limit
    floor = 1e-2 * max(gradient.abs().max().item() for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert relative_error(found[name], gradient, floor=floor) < limit, name


def test_many_tiny_documents_are_not_attended_one_by_one():
    starts = torch.arange(64)[None]
    assert split_documents(starts) is None
    assert split_documents(torch.zeros_like(starts)) == [[64]]
    assert split_documents(torch.tensor([[0] * 20 + [20] * 12])) == [[20, 12]]


def test_no_document_sees_another(small):
    model = small()
    ids = torch.randint(0, 60, (1, 8))
    whole = model(ids, POSITIONS[:1])
    changed = ids.clone()
    changed[0, :3] = (changed[0, :3] + 1) % 60
    found = model(changed, POSITIONS[:1])
    assert found[:, 3:].equal(whole[:, 3:])
    assert not torch.allclose(found[:, :3], whole[:, :3])
    assert not torch.allclose(model(ids)[:, 3:], whole[:, 3:])


def test_wrong_positions_are_refused(small):
    with pytest.raises(ValueError, match="do not fit input_ids"):
        small()(torch.randint(0, 60, (2, 4)), torch.arange(5)[None])


def test_causal_flag_is_used_where_no_mask_is_needed(small, monkeypatch):
    model = small("mistral", sliding_window=6)
    seen = []
    monkeypatch.setattr(decoder, "interval_mask", lambda *args: seen.append(args) or interval_mask(*args))
    model(torch.randint(0, 60, (2, 6)))
    model(torch.randint(0, 60, (2, 6)), torch.arange(6).expand(2, -1))
    cache = tt_models.KVCache(model.config, batch_size=2, max_seq_len=20)
    for length in (6, 1, 1, 1):
        model(torch.randint(0, 60, (2, length)), cache=cache)
    assert not seen
    model(torch.randint(0, 60, (2, 7)))
    assert len(seen) == 1


def test_plain_attention_equals_sdpa(close):
    q, k, v = (torch.randn(2, heads, 7, 8) for heads in (6, 2, 2))
    for mask in (None, torch.rand(2, 1, 7, 7) < 0.7):
        if mask is not None:
            mask |= torch.eye(7, dtype=torch.bool)
        found = plain_attend(q, k, v, mask, 0.4, None, None, 0.0)
        close(found, attend(q, k, v, mask=mask, scale=0.4))
