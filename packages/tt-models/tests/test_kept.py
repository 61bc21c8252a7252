"""Hidden states of some of the tokens: what a loss needs, without the work on all others."""

import pytest
import torch

from tt_models.auto import FAMILIES
from tt_models.decoder import Block


@pytest.mark.parametrize("kept", ["some", "one", "none", "all"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_tokens_that_are_left_out_change_neither_the_others_nor_their_gradients(model_type, kept, small, close):
    model = small(model_type).train()
    ids, positions = torch.randint(0, 60, (2, 12)), torch.tensor([[*range(5), *range(7)]] * 2)
    keep = {"some": torch.rand(2, 12) < 0.4, "one": torch.arange(24).view(2, 12) == 17,
            "none": torch.zeros(2, 12, dtype=torch.bool), "all": torch.ones(2, 12, dtype=torch.bool)}[kept]  # fmt: skip
    weight = torch.randn(2, 12, model.config.hidden_size)

    def found(hidden):
        model.zero_grad(set_to_none=False)
        (hidden * weight[keep]).sum().backward()
        return hidden.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected, slopes = found(model.hidden_states(ids, positions)[keep])
    got, same_slopes = found(model.hidden_states(ids, positions, keep=keep))
    assert got.shape == expected.shape
    if kept != "none":
        close(got, expected, 256)
    assert same_slopes.keys() == slopes.keys()
    # those of queries and keys may be nothing but the roundings of larger ones
    for of in (slopes, same_slopes):
        of["all"] = torch.cat([slope.flatten() for slope in of.values()])
    close(same_slopes["all"], slopes["all"], 512)


def test_the_last_block_sees_no_more_than_the_tokens_that_are_kept(small):
    model, seen = small(), []
    for layer in model.model.layers:
        for module in (layer.self_attn.o_proj, layer.mlp, model.model.norm):
            module.register_forward_hook(lambda *call: seen.append(call[1][0].shape[:-1].numel()))
    keep = torch.arange(24).view(2, 12) % 3 == 0
    model.hidden_states(torch.randint(0, 60, (2, 12)), keep=keep)
    assert min(seen) == 8
    assert seen.count(24) == 2 * (len(model.model.layers) - 1)
    seen.clear()
    model.hidden_states(torch.randint(0, 60, (2, 12)), keep=torch.arange(24).view(2, 12) != 5)  # all but one
    assert seen == [24] * 2 * len(model.model.layers) + [23] * (len(seen) - 2 * len(model.model.layers))


def test_a_block_that_hands_its_keywords_on_still_computes_all_tokens(small):
    class Own(Block):
        def forward(self, x_BSE, **shared):
            return super().forward(x_BSE, **shared)

    model, ids, keep = small(), torch.randint(0, 60, (2, 12)), torch.arange(24).view(2, 12) == 5
    model.model.layers[-1].__class__ = Own
    torch.testing.assert_close(model.hidden_states(ids, keep=keep), model.hidden_states(ids)[keep])


def test_what_to_keep_must_be_booleans_for_each_token(small):
    ids = torch.randint(0, 60, (2, 12))
    for keep in (torch.ones(2, 11, dtype=torch.bool), torch.ones(2, 12, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"keep must be booleans of the shape of input_ids, \[2, 12\]; got"):
            small().hidden_states(ids, keep=keep)


def test_kept_tokens_are_compiled_once_for_all_numbers_of_them(small, close):
    model, graphs = small(num_hidden_layers=4), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    for layer in model.model.layers:
        layer.compile(backend=backend, dynamic=True)
    plain = small(num_hidden_layers=4)
    plain.load_state_dict(model.state_dict())
    counts = []
    for length, every in ((12, 3), (17, 2), (23, 5), (31, 7)):
        ids = torch.randint(0, 60, (2, length))
        keep = torch.arange(2 * length).view(2, length) % every == 0
        close(model.hidden_states(ids, keep=keep), plain.hidden_states(ids)[keep], 256)
        counts.append(len(graphs))
    assert counts == [2, 2, 2, 2]  # the last block, and all others
    torch.compiler.reset()
