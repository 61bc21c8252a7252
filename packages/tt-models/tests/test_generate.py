"""Generation against the full forward, against transformers, and every argument for its effect."""

import importlib
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import tt_models
from tt_models.auto import FAMILIES
from tt_models.cpu.products import Packed, kernel
from tt_models.sampling import Draws, Sampling, draw, filtered, penalize, row_seed, sample

generate_module = importlib.import_module("tt_models.generate")  # tt_models.generate is the function


def greedy_by_hand(model, ids, count):
    for _ in range(count):
        ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), dim=1)
    return ids


@pytest.mark.parametrize("model_type", FAMILIES)
def test_greedy_equals_the_full_forward(model_type, small):
    model = small(model_type)
    ids = torch.randint(0, 60, (2, 5))
    found = tt_models.generate(model, ids, max_new_tokens=14, temperature=0)
    assert found.tolist() == greedy_by_hand(model, ids, 14).tolist()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_unequal_prompts_in_a_batch_equal_each_prompt_alone(model_type, small):
    model = small(model_type, 1)
    prompts = [[7, 8, 9, 10, 11, 12, 13, 14, 15], [20, 21], [30, 31, 32, 33, 34]]
    together = tt_models.generate(model, prompts, max_new_tokens=12, temperature=0, pad_id=1)
    for row, prompt in zip(together.tolist(), prompts, strict=True):
        alone = tt_models.generate(model, torch.tensor([prompt]), max_new_tokens=12, temperature=0)
        assert row == [1] * (9 - len(prompt)) + alone[0].tolist()


def test_left_padded_tensor_with_lengths_is_the_same_as_lists(small):
    model = small()
    lists = tt_models.generate(model, [[7, 8, 9], [20]], max_new_tokens=6, temperature=0)
    padded, lengths = torch.tensor([[7, 8, 9], [0, 0, 20]]), torch.tensor([3, 1])
    assert lists.equal(tt_models.generate(model, padded, prompt_lengths=lengths, max_new_tokens=6, temperature=0))
    assert lists.equal(tt_models.generate(model, padded, prompt_lengths=[3, 1], max_new_tokens=6, temperature=0))
    assert not lists.equal(tt_models.generate(model, padded, max_new_tokens=6, temperature=0))


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "phi3", "gpt_oss"])
def test_left_padding_equals_transformers(model_type, random_hf_config, reference_of):
    config = random_hf_config(model_type, 1)
    reference = reference_of(config)
    model = tt_models.build(tt_models.config_from_hf(config)).eval()
    model.load_state_dict(reference.state_dict())
    ids = torch.tensor([[7, 8, 9, 10, 11], [1, 1, 1, 20, 21]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]])
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 1, "max_new_tokens": 8}
    expected = reference.generate(ids, attention_mask=mask, **settings)
    found = tt_models.generate(model, ids, prompt_lengths=mask.sum(1), max_new_tokens=8, temperature=0)
    assert found.tolist() == expected.tolist()


def test_longrope_generates_across_its_original_context_like_transformers(random_hf_config, reference_of):
    config = random_hf_config("phi3", 0) | {"original_max_position_embeddings": 16}
    reference = reference_of(config)
    model = tt_models.build(tt_models.config_from_hf(config)).eval()
    model.load_state_dict(reference.state_dict())
    ids = torch.randint(0, 60, (1, 9))
    expected = reference.generate(ids, do_sample=False, eos_token_id=None, pad_token_id=1, max_new_tokens=20)
    assert tt_models.generate(model, ids, max_new_tokens=20, temperature=0).equal(expected)
    prompts = [ids[0].tolist(), ids[0, :4].tolist()]
    rows = tt_models.generate(model, prompts, max_new_tokens=20, temperature=0)
    assert rows[1, 5:].equal(tt_models.generate(model, ids[:, :4], max_new_tokens=20, temperature=0)[0])


def test_rows_stop_at_any_end_id_and_are_filled(small):
    model = small()
    ids = torch.randint(0, 60, (3, 4))
    free = tt_models.generate(model, ids, max_new_tokens=10, temperature=0)
    ends = [int(free[0, 6]), int(free[1, 8])]
    found = tt_models.generate(model, ids, max_new_tokens=10, temperature=0, eos_ids=ends, pad_id=2)
    for row, whole in zip(found[:, 4:].tolist(), free[:, 4:].tolist(), strict=True):
        first = min((whole.index(end) for end in ends if end in whole), default=len(whole))
        assert row[: first + 1] == whole[: first + 1]
        assert set(row[first + 1 :]) <= {2}
    assert tt_models.generate(model, ids[:1], max_new_tokens=10, temperature=0, eos_ids=ends[:1]).shape == (1, 7)
    default_fill = tt_models.generate(model, ids[:2], max_new_tokens=10, temperature=0, eos_ids=ends)
    assert default_fill[0, 7:].eq(ends[0]).all()


def test_end_is_seen_on_the_first_generated_token(small):
    model = small()
    ids = torch.randint(0, 60, (1, 4))
    first = int(tt_models.generate(model, ids, max_new_tokens=1, temperature=0)[0, -1])
    assert tt_models.generate(model, ids, max_new_tokens=9, temperature=0, eos_ids=[first]).shape == (1, 5)
    assert tt_models.generate(model, ids, max_new_tokens=9, temperature=0, eos_ids=first).shape == (1, 5)


def test_who_asks_until_when_decides_when_a_batch_has_stopped(small):
    model = small()
    ids = torch.randint(0, 60, (2, 4))
    free = tt_models.generate(model, ids, max_new_tokens=6, temperature=0)
    ends = [int(free[0, 4]), int(free[1, 5])]
    asked = []
    longer = tt_models.generate(
        model,
        ids,
        max_new_tokens=6,
        temperature=0,
        eos_ids=ends,
        pad_id=2,
        until=lambda row: asked.append(row.tolist()),
    )
    assert longer.shape == (2, 10)
    assert longer[0, 5:].eq(2).all()
    assert (asked[0][0], asked[-1], len(asked)) == (True, [True, True], 6)
    assert tt_models.generate(model, ids, max_new_tokens=6, temperature=0, until=lambda row: True).shape == (2, 5)


def test_end_ids_come_as_a_config_or_a_tensor_has_them(small):
    model = small()
    ids = torch.randint(0, 60, (1, 4))
    free = tt_models.generate(model, ids, max_new_tokens=9, temperature=0, eos_ids=None)
    assert free.shape == (1, 13)
    first = free[0, 4]
    for ends in (first, first[None], torch.stack([first, first + 1]), [first]):
        assert tt_models.generate(model, ids, max_new_tokens=9, temperature=0, eos_ids=ends).shape == (1, 5)
        assert list(tt_models.stream(model, ids, max_new_tokens=9, temperature=0, eos_ids=ends)) == []


def test_token_0_ends_an_answer_as_any_other_does(small):
    model = small(tie_word_embeddings=False)
    torch.nn.init.zeros_(model.lm_head.weight)  # all logits are equal, and the first is the greatest
    ids = torch.randint(1, 60, (2, 4))
    for ends in (0, [0], (7, 0)):
        found = tt_models.generate(model, ids, max_new_tokens=9, temperature=0, eos_ids=ends)
        assert found[:, 4:].tolist() == [[0], [0]]


def test_seed_repeats_and_none_uses_the_global_generator(small):
    model = small()
    ids = torch.randint(0, 60, (2, 4))

    def draw(seed):
        return tt_models.generate(model, ids, max_new_tokens=12, seed=seed).tolist()

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    torch.manual_seed(5)
    first = draw(None)
    assert draw(None) != first
    torch.manual_seed(5)
    assert draw(None) == first


def test_stream_yields_what_generate_gives_up_to_the_end(small):
    model = small()
    ids = torch.randint(0, 60, (1, 4))
    whole = tt_models.generate(model, ids, max_new_tokens=10, seed=3, temperature=0.8)[0, 4:].tolist()
    settings = {"max_new_tokens": 10, "seed": 3, "temperature": 0.8}
    assert list(tt_models.stream(model, ids, **settings)) == whole
    assert list(tt_models.stream(model, [ids[0].tolist()], **settings)) == whole
    assert list(tt_models.stream(model, ids, eos_ids={whole[4]}, **settings)) == whole[: whole.index(whole[4])]
    assert list(tt_models.stream(model, ids, eos_ids=whole[4], **settings)) == whole[: whole.index(whole[4])]
    with pytest.raises(ValueError, match="one prompt, got 2"):
        tt_models.stream(model, ids.expand(2, -1), max_new_tokens=2)


def test_stream_penalizes_and_filters_too(small):
    model = small()
    ids = torch.randint(0, 60, (1, 4))
    penalized = list(tt_models.stream(model, ids, max_new_tokens=12, temperature=0, repetition_penalty=50.0))
    assert len({*penalized, *ids[0].tolist()}) == 12 + len({*ids[0].tolist()})
    greedy = list(tt_models.stream(model, ids, max_new_tokens=12, temperature=0))
    for argument in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert list(tt_models.stream(model, ids, max_new_tokens=12, **argument)) == greedy


@pytest.mark.parametrize("argument", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}])
def test_each_filter_at_its_extreme_is_greedy(argument, small):
    model = small()
    ids = torch.randint(0, 60, (2, 4))
    greedy = tt_models.generate(model, ids, max_new_tokens=12, temperature=0)
    assert tt_models.generate(model, ids, max_new_tokens=12, seed=0, **argument).equal(greedy)
    assert not tt_models.generate(model, ids, max_new_tokens=12, seed=0).equal(greedy)


def test_filters_equal_transformers(close):
    transformers = pytest.importorskip("transformers")
    logits, ids = torch.randn(4, 50) * 3, torch.randint(0, 50, (4, 6))
    seen = torch.zeros(4, 50, dtype=torch.bool).scatter(1, ids, True)
    close(penalize(logits, seen, 1.7), transformers.RepetitionPenaltyLogitsProcessor(1.7)(ids, logits))
    for settings, warpers in (
        ({"temperature": 0.7}, [transformers.TemperatureLogitsWarper(0.7)]),
        ({"top_k": 5}, [transformers.TopKLogitsWarper(5)]),
        ({"top_p": 0.6}, [transformers.TopPLogitsWarper(0.6)]),
        ({"min_p": 0.2}, [transformers.MinPLogitsWarper(0.2)]),
        (
            {"temperature": 1.5, "top_k": 30, "top_p": 0.9, "min_p": 0.05},
            [
                transformers.TemperatureLogitsWarper(1.5),
                transformers.TopKLogitsWarper(30),
                transformers.TopPLogitsWarper(0.9),
                transformers.MinPLogitsWarper(0.05),
            ],
        ),
    ):
        expected = logits
        for warper in warpers:
            expected = warper(ids, expected)
        close(filtered(logits, Sampling(**settings)), expected)


def test_the_penalty_is_not_rounded_to_the_dtype_of_the_model():
    logits, seen = torch.tensor([[1.0, 0.8359375]]).bfloat16(), torch.tensor([[True, False]])
    # 1 / 1.1955 = 0.83647 is the larger one, and in bf16 the same
    assert sample(logits, Sampling(temperature=0, repetition_penalty=1.1955), seen_BV=seen).item() == 0
    # 1 / 1.1965 = 0.83577 is the smaller one, and in bf16 the same
    assert sample(logits, Sampling(temperature=0, repetition_penalty=1.1965), seen_BV=seen).item() == 1


def test_samples_follow_the_probabilities():
    logits = torch.tensor([[1.0, 0.0, 2.0, -1.0]]).expand(20000, -1)
    uniform = torch.rand(20000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = sample(logits, Sampling(temperature=0.8), uniform_B=uniform)
    frequencies, probabilities = torch.bincount(drawn, minlength=4) / 20000, (logits[0] / 0.8).softmax(0)
    standard_errors = (probabilities * (1 - probabilities) / 20000).sqrt()
    assert ((frequencies - probabilities).abs() <= 6 * standard_errors).all()


def test_repetition_penalty_leaves_padding_alone(small):
    model = small()
    settings = {"max_new_tokens": 8, "temperature": 0, "repetition_penalty": 3.0}
    alone = tt_models.generate(model, [[20, 21]], **settings)[0, 2:].tolist()
    for pad_id in (alone[0], 40):
        rows = tt_models.generate(model, [[7, 8, 9, 10], [20, 21]], pad_id=pad_id, **settings)
        assert rows[1, 4:].tolist() == alone
    assert alone != tt_models.generate(model, [[20, 21]], max_new_tokens=8, temperature=0)[0, 2:].tolist()


def test_logits_on_request_are_those_of_the_full_forward(small, close):
    model = small("gemma2")
    ids = torch.randint(0, 60, (2, 5))
    found, logits = tt_models.generate(model, ids, max_new_tokens=6, temperature=0, return_logits=True)
    close(logits, model(found)[:, 4:-1], 256)


def test_generation_has_no_dropout_and_leaves_the_mode_alone(small):
    model = small(attention_dropout=0.5)
    ids = torch.randint(0, 60, (2, 5))
    expected = tt_models.generate(model, ids, max_new_tokens=6, temperature=0)
    model.train().model.norm.eval()
    assert tt_models.generate(model, ids, max_new_tokens=6, temperature=0).equal(expected)
    assert not model.model.norm.training
    tokens = tt_models.stream(model, ids[:1], max_new_tokens=6, temperature=0)
    assert next(tokens) == int(expected[0, 5])
    assert model.training
    assert list(tokens) == expected[0, 6:].tolist()


def test_threads_that_generate_at_once_have_no_dropout_and_leave_the_mode_alone(small):
    model = small(attention_dropout=0.5)
    prompts = [torch.randint(0, 60, (1, 5)) for _ in range(6)]
    settings = {"max_new_tokens": 12, "temperature": 0}
    expected = [tt_models.generate(model, ids, **settings).tolist() for ids in prompts]
    model.train().model.norm.eval()
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # a thread may be stopped between any two steps of Python
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda ids: tt_models.generate(model, ids, **settings).tolist(), prompts * 6))
    finally:
        sys.setswitchinterval(switch)
    assert found == expected * 6
    modes = {name: module.training for name, module in model.named_modules()}
    assert not modes.pop("model.norm")
    assert all(modes.values())


def test_a_thread_that_leaves_does_not_put_dropout_into_another_ones_step(small):
    model = small(attention_dropout=0.5).train()
    modules = list(model.modules())
    with generate_module.evaluating(modules):
        with generate_module.evaluating(modules):
            assert not model.training
        assert not any(module.training for module in modules)
    assert all(module.training for module in modules)
    assert not generate_module._READERS
    with pytest.raises(KeyError), generate_module.evaluating(modules):
        raise KeyError
    assert all(module.training for module in modules)


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_model_without_finite_logits_generates_no_text(temperature, wrong, small):
    model = small(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[7] = wrong
    with pytest.raises(ValueError, match="logits are not finite, no token can be drawn"):
        tt_models.generate(model, [[5, 6]], max_new_tokens=3, temperature=temperature)
    logits = torch.tensor([[0.0, -torch.inf, 1.0]])  # a token that is ruled out is no mistake
    assert sample(logits, Sampling(temperature=0)).item() == 2


def test_ids_of_any_integer_type_are_read(small):
    model = small()
    ids = torch.randint(0, 60, (1, 4))
    settings = {"max_new_tokens": 5, "temperature": 0, "repetition_penalty": 1.3}
    expected = tt_models.generate(model, ids, **settings)
    for dtype in (torch.int32, torch.uint8):
        assert tt_models.generate(model, ids.to(dtype), **settings).equal(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2", "gemma3_text", "qwen3_moe", "gpt_oss", "phi3"])
def test_a_batch_whose_rows_leave_one_by_one_answers_as_each_prompt_alone(model_type, dtype, small):
    model = small(model_type, 1).to(dtype)
    prompts = [[7, 8, 9, 10, 11, 12, 13, 14, 15], [20, 21], [30, 31, 32, 33, 34], [5], [40, 41, 42]]
    most, settings = [4, 12, 1, 9, 12], {"temperature": 0, "repetition_penalty": 1.3}
    alone = [
        [token for _, token in tt_models.stream_rows(model, [prompt], max_new_tokens=12, **settings)]
        for prompt in prompts
    ]
    ends = [alone[4][5]]
    expected = [row[: min((row.index(end) + 1 for end in ends if end in row), default=12)] for row in alone]
    found = [[] for _ in prompts]
    for row, token in tt_models.stream_rows(model, prompts, max_new_tokens=most, eos_ids=ends, **settings):
        found[row].append(token)
    assert found == [row[:count] for row, count in zip(expected, most, strict=True)]
    assert len({len(row) for row in found}) > 2


def test_rows_that_have_stopped_are_not_computed(small, monkeypatch):
    model, sizes = small(), []

    def spy(model, token, cache):
        sizes.append(len(token))
        return real(model, token, cache)

    real = generate_module.decode_one_token
    monkeypatch.setattr(generate_module, "decode_one_token", spy)
    pairs = list(tt_models.stream_rows(model, [[7]] * 4, max_new_tokens=[1, 3, 6, 2], temperature=0))
    assert sizes == [3, 2, 1, 1, 1]
    assert [row for row, _ in pairs].count(2) == 6
    sizes.clear()
    answered = []
    for row, _ in tt_models.stream_rows(
        model, [[7], [8]], max_new_tokens=9, temperature=0, stop=lambda row: row == answered[0]
    ):
        answered.append(row)
    assert sizes == [1] * 8
    sizes.clear()
    ids = torch.tensor([[7, 8], [9, 10], [30, 31]])
    free = tt_models.generate(model, ids, max_new_tokens=8, temperature=0)
    sizes.clear()
    tt_models.generate(model, ids, max_new_tokens=8, temperature=0, eos_ids=[int(free[1, 3])])
    assert sizes[-1] < 3
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3_moe", "phi3", "gemma2"])
def test_packed_weights_give_the_same_logits(model_type, small, monkeypatch):
    model, made = small(model_type).bfloat16(), []
    settings = {"max_new_tokens": 9, "temperature": 0, "return_logits": True}

    class Spied(Packed):
        def __init__(self, model):
            super().__init__(model)
            made.append(self)

    monkeypatch.setattr(generate_module, "Packed", Spied)
    for prompts in ([[7, 8, 9]], [[7, 8, 9], [20], [30, 31]]):
        expected = tt_models.generate(model, prompts, **settings)
        assert not made  # the answer is short
        with monkeypatch.context() as patch:
            patch.setattr(generate_module, "PACK_AFTER", 2)
            patch.setattr(generate_module, "PACK_FROM", 6)
            found = tt_models.generate(model, prompts, **settings)
        assert found[0].equal(expected[0])
        assert found[1].equal(expected[1])
        copies = made.pop().copies.values()
        assert kernel() != "avx512_bf16" or any(copy is not None for _, _, copy in copies)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_seeded_row_draws_the_same_tokens_in_any_batch(dtype, small):
    model = small("mistral", 1).to(dtype)
    prompts = [[7, 8, 9, 10, 11, 12], [20, 21], [30, 31, 32], [20, 21]]
    settings = {"max_new_tokens": 12, "temperature": 0.9, "top_k": 40, "top_p": 0.95, "eos_ids": [3, 4, 5]}
    together = {}
    for row, token in tt_models.stream_rows(model, prompts, seed=5, **settings):
        together.setdefault(row, []).append(token)
    for row, prompt in enumerate(prompts):
        own = tt_models.stream_rows(model, [prompt], seed=[row_seed(5, row)], **settings)
        assert [token for _, token in own] == together[row]
    assert together[1] != together[3]  # the same prompt
    first = tt_models.generate(model, prompts[:1], seed=5, **settings)[0, 6:].tolist()
    assert first == together[0][: len(first)]


def test_seeds_that_follow_each_other_share_no_row():
    rows = [{row_seed(seed, row) for row in range(50)} for seed in range(20)]
    assert len(set().union(*rows)) == 1000
    assert row_seed(2**32) != row_seed(0)
    assert Draws(7, 2).next([0, 1]).tolist() == [Draws(7, 2).next([row]).item() for row in (0, 1)]


@pytest.mark.parametrize("seed", [[1], [1, 2, 3], [1, None], [1, -1], "12", 1.5])
def test_seeds_that_are_not_one_per_row_are_refused(seed, small):
    with pytest.raises(ValueError, match="seed must be"):
        tt_models.generate(small(), [[7], [8]], max_new_tokens=2, seed=seed)


def test_a_token_without_probability_is_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]])
    almost_1 = 1 - 2**-53
    found = draw(logits.expand(4, -1), torch.tensor([0.0, 0.2, 0.3, almost_1], dtype=torch.float64))
    assert found.tolist() == [1, 1, 3, 3]


def test_a_short_row_fills_its_own_context_after_the_longest_has_left(small):
    model = small("mistral")  # which can read 128 tokens
    long, short = list(range(5, 60)) * 2, [7, 8, 9]
    settings = {"temperature": 0}
    alone = list(tt_models.stream(model, [short], max_new_tokens=126, **settings))
    rows = list(tt_models.stream_rows(model, [long, short], max_new_tokens=[19, 126], **settings))
    assert [token for row, token in rows if row == 1] == alone
    assert [row for row, _ in rows].count(0) == 19
    with pytest.raises(ValueError, match="3 prompt tokens and max_new_tokens=127 exceed"):
        tt_models.stream_rows(model, [long, short], max_new_tokens=[19, 127])
    with pytest.raises(ValueError, match="one number or one per row, got 1 for 2 rows"):
        tt_models.stream_rows(model, [long, short], max_new_tokens=[19])


def test_compiled_step_gives_the_same_text(small, monkeypatch):
    compiled = []

    def capture(function, **settings):
        compiled.append(function.__name__)
        return real(function, backend="eager", fullgraph=True, **settings)

    real = torch.compile
    monkeypatch.setattr(torch, "compile", capture)
    generate_module.compiled_decode_one_token.cache_clear()
    model = small("mistral", 2)
    ids = torch.randint(0, 60, (2, 5))
    expected = tt_models.generate(model, ids, max_new_tokens=12, temperature=0)
    assert not compiled
    assert tt_models.generate(model, ids, max_new_tokens=12, temperature=0, compile=True).equal(expected)
    assert compiled == ["decode_one_token"]
    streamed = tt_models.stream(model, ids[:1], max_new_tokens=12, temperature=0, compile=True)
    assert list(streamed) == expected[0, 5:].tolist()
    generate_module.compiled_decode_one_token.cache_clear()


@pytest.mark.parametrize("model_type", ["mistral", "gemma3_text", "gpt_oss"])
def test_a_window_is_compiled_once_and_not_for_each_of_its_columns(model_type, small, monkeypatch):
    def on_eager(function):
        return real(function, backend="eager", fullgraph=True)

    real = torch.compile
    monkeypatch.setattr(torch, "compile", on_eager)
    generate_module.compiled_decode_one_token.cache_clear()
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = small(model_type, 1, sliding_window=7)
    for length in (3, 9, 5, 12):
        ids = torch.randint(0, 60, (1, length))
        expected = tt_models.generate(model, ids, max_new_tokens=20, temperature=0)
        assert tt_models.generate(model, ids, max_new_tokens=20, temperature=0, compile=True).equal(expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 8  # the limit
    generate_module.compiled_decode_one_token.cache_clear()
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_new_tokens": 200}, "at most 125 new tokens fit"),
        ({"temperature": -1}, "temperature must not be negative"),
        ({"top_k": 0}, "top_k must be at least 1, or None for all"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"top_p": 1.1}, "top_p must be in"),
        ({"min_p": -0.1}, "min_p must be in"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be positive"),
        ({"prompt_lengths": torch.tensor([5, 1])}, "prompt_lengths must be 2 numbers from 1 to 4"),
        ({"input_ids": torch.tensor([1, 2])}, "prompts must be"),
        ({"input_ids": []}, "prompts must be"),
        ({"input_ids": [[1, 1000]]}, "token ids must be in"),
        ({"input_ids": [[1.5, 2.0]]}, "a token id must be a whole number, got 1.5"),
        ({"input_ids": torch.ones(1, 2, dtype=torch.bool)}, "prompts must be integers"),
        ({"input_ids": [1, 2]}, "prompt 0 must be a list with at least one token id, got 1"),
        ({"input_ids": [[1], []]}, "prompt 1 must be a list with at least one token id"),
        ({"input_ids": [[1], [1, 2]], "pad_id": -1}, "pad_id must be in"),
        ({"temperature": float("nan")}, "temperature must not be negative"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty must be positive"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, small):
    arguments = {"input_ids": torch.randint(0, 60, (2, 4)), "max_new_tokens": 3} | arguments
    with pytest.raises(ValueError, match=message):
        tt_models.generate(small(), **arguments)


def test_text_may_grow_to_the_last_position(small):
    model = small("mistral")
    found = tt_models.generate(model, torch.randint(0, 60, (1, 4)), max_new_tokens=125, temperature=0)
    assert found.shape == (1, 129)
