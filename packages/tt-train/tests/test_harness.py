"""The model ``tt`` of lm-evaluation-harness against its own ``hf``, on tiny random models."""

import json
import random
import shutil
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lm_eval")
pytest.importorskip("transformers")

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu".split()


@pytest.fixture(scope="module")
def with_bos(model_dir, tmp_path_factory):
    """The same model, whose tokenizer writes a bos token in front of each text."""
    folder = tmp_path_factory.mktemp("bos") / "model"
    shutil.copytree(model_dir, folder)
    data = json.loads((folder / "tokenizer.json").read_text())
    special = {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": special},
    }
    (folder / "tokenizer.json").write_text(json.dumps(data))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    template = "{{ bos_token }}" + config["chat_template"]
    config |= {"bos_token": "<|endoftext|>", "pad_token": "<|im_start|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    return folder


@pytest.fixture(params=["without bos", "with bos"])
def folder(request, model_dir, with_bos):
    return model_dir if request.param == "without bos" else with_bos


def hf(folder, **options):
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(folder), device="cpu", batch_size=4, dtype="float32", **options)


def tt(folder, **options):
    from tt_train.evals.harness import TT

    return TT(str(folder), device="cpu", **options)


def requests(*arguments):
    return [SimpleNamespace(args=args, task_name="made") for args in arguments]


def text(rng, number):
    return " ".join(rng.choice(WORDS) for _ in range(number))


def questions(seed=0):
    """Short ones, ones at the context length of 128 tokens and ones far over it; shared, empty and blank contexts."""
    rng = random.Random(seed)
    found = [(text(rng, 5), f" {word}") for word in ("beta", "nu", "q")]
    for length in (3, 9, 60, 110, 122, 126, 127, 128, 140, 400):
        context = text(rng, length)
        found += [(context, f" {text(rng, size)}") for size in (1, 1, 4, 7)]
    found += [("", text(rng, 6)), ("", "a"), ("say ", "alpha beta"), ("say it  ", text(rng, 3)), ("a" * 700, "aaaa")]
    found += [(text(rng, 30), " " + text(rng, 100)), ("one", "two"), (found[3][0], found[3][1])]
    return found


def compare(ours, theirs, asked):
    mine, reference = ours.loglikelihood(requests(*asked)), theirs.loglikelihood(requests(*asked))
    for question, (value, greedy), (expected, expected_greedy) in zip(asked, mine, reference, strict=True):
        assert value == pytest.approx(expected, abs=1e-4, rel=1e-5), question
        assert greedy == expected_greedy, question


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
def test_log_probabilities_equal_those_of_hf_below_at_and_over_the_context_length(folder, batch_size):
    compare(tt(folder, batch_size=batch_size, tell=list), hf(folder), questions())


def test_rolling_log_probabilities_equal_those_of_hf_at_and_over_the_context_length(folder):
    rng = random.Random(1)
    asked = [(text(rng, length),) for length in (1, 20, 126, 127, 128, 129, 300, 700)]
    mine, reference = (model.loglikelihood_rolling(requests(*asked)) for model in (tt(folder, tell=list), hf(folder)))
    assert mine == pytest.approx(reference, abs=1e-4, rel=1e-5)


def test_answers_equal_those_of_hf_with_stops_and_over_the_context_length(folder):
    rng = random.Random(2)
    prompts = [text(rng, length) for length in (1, 2, 5, 9, 60, 120, 127, 128, 300, 4)]
    for kwargs in ({"until": ["a", "\n\n"], "max_gen_toks": 24}, {"until": [], "max_gen_toks": 30, "do_sample": False},
                   {"until": "beta", "max_gen_toks": 8}, {"max_gen_toks": 100}):  # fmt: skip
        asked = requests(*((prompt, kwargs) for prompt in prompts))
        mine, reference = (model.generate_until(asked) for model in (tt(folder, tell=list), hf(folder)))
        assert mine == reference


# ---- text and tokens -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opens", [True, False])
def test_chats_are_rendered_as_by_hf_and_have_one_bos(folder, opens):
    ours, theirs = tt(folder), hf(folder)
    chat = [{"role": "user", "content": "say alpha "}, {"role": "assistant", "content": "alpha "}]
    prompt = ours.apply_chat_template(chat[: 1 if opens else 2], add_generation_prompt=opens)
    assert prompt == theirs.apply_chat_template(chat[: 1 if opens else 2], add_generation_prompt=opens)
    assert ours.tok_encode(prompt) == theirs.tok_encode(prompt)
    assert ours.tok_encode(prompt).count(0) == (1 if ours.tokenizer.adds_bos else 0)
    assert ours.tok_encode("beta") == theirs.tok_encode("beta")
    assert (ours.prefix_token_id, ours.eot_token_id) == (theirs.prefix_token_id, theirs.eot_token_id)


def test_a_template_without_system_messages_gets_none_and_that_is_told(model_dir, tmp_path):
    told = []
    shutil.copytree(model_dir, tmp_path / "model")
    refusing = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages[0]['content'] }}"
    )
    for file in (tmp_path / "model").glob("chat_template.jinja"):
        file.unlink()
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": refusing}))
    chat = [{"role": "system", "content": "be short"}, {"role": "user", "content": "alpha"}]
    assert tt(tmp_path / "model", tell=told.append).apply_chat_template(chat) == "alpha"
    assert [line for line in told if "takes no system message" in line]


def test_an_end_token_ends_the_answer_and_is_not_part_of_it(model_dir, tmp_path):
    """Graders that compare texts would find every answer wrong."""
    plain = tt(model_dir)
    asked = requests(("alpha beta", {"max_gen_toks": 6, "until": []}))
    ids = plain.tok_encode("alpha beta")
    said = [token for _, token in stream(plain.scorer.model, ids, 6)]
    shutil.copytree(model_dir, tmp_path / "model")
    end = next(place for place in range(1, 6) if said[place] not in said[:place])
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [said[end], 2]}))
    [answer] = tt(tmp_path / "model").generate_until(asked)
    assert answer == plain.tokenizer.decode(said[:end])
    left_in = hf(tmp_path / "model").generate_until(asked)  # hf takes out only tokens that are flagged special
    assert left_in == [answer + plain.tokenizer.decode([said[end]])]


def stream(model, ids, number):
    import tt_models

    return list(tt_models.stream_rows(model, [ids], max_new_tokens=number, temperature=0.0))


# ---- what is not as usual ------------------------------------------------------------------------------------------


def test_what_is_cut_is_told_once_with_its_number(model_dir):
    told = []
    model = tt(model_dir, tell=told.append)
    model.loglikelihood(requests((text(random.Random(3), 300), " alpha"), ("a", " b")))
    model.generate_until(requests((text(random.Random(3), 300), {"max_gen_toks": 8})))
    assert [line.partition(": ")[2] for line in told] == [
        "1 of 2 requests are longer than 128 tokens and lost their beginning",
        "1 of 1 requests are longer than 120 tokens and lost their beginning",
    ]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("loglikelihood", ("alpha", " alpha" * 200)), "a continuation must have 1 to 128 tokens"),
        (("loglikelihood", ("alpha", "")), "has no token of its own behind its context"),
        (("generate_until", ("alpha", {"max_gen_toks": 128})), "leaves no room for its prompt"),
        (("generate_until", ("alpha", {"num_beams": 4})), "num_beams=4: not supported here"),
        (("generate_until", ("alpha", {"typical_p": 0.5})), "typical_p=0.5: not supported here"),
    ],
)
def test_a_request_that_cannot_be_answered_as_asked_is_refused(model_dir, asked, message):
    from tt_train import ConfigError

    with pytest.raises(ConfigError, match=message):
        getattr(tt(model_dir), asked[0])(requests(asked[1]))


def test_bos_is_there_twice_in_perplexity_as_in_hf_and_once_if_that_is_asked_for(with_bos):
    told, asked = [], requests((text(random.Random(4), 20),))
    assert tt(with_bos, tell=told.append).loglikelihood_rolling(asked) == pytest.approx(
        hf(with_bos).loglikelihood_rolling(asked), abs=1e-4
    )
    assert "begin with two bos tokens" in told[0]
    once = tt(with_bos, add_bos_token=False, tell=told.append).loglikelihood_rolling(asked)
    assert once == pytest.approx(hf(with_bos, add_bos_token=False).loglikelihood_rolling(asked), abs=1e-4)
    assert len(told) == 1


# ---- how it is computed --------------------------------------------------------------------------------------------


def test_a_context_is_read_once_for_all_of_its_continuations(model_dir, monkeypatch):
    ours, read = tt(model_dir), []
    inner = ours.scorer.model.hidden_states
    monkeypatch.setattr(
        ours.scorer.model, "hidden_states", lambda ids, *more: read.append(ids.numel()) or inner(ids, *more)
    )
    context = text(random.Random(5), 40)
    compare(ours, hf(model_dir), [(context, f" {word} {other}") for word in WORDS[:4] for other in WORDS[:3]])
    assert sum(read) < 3 * len(ours.tok_encode(context))


def test_choices_that_differ_in_their_last_token_are_read_with_their_context_at_once(model_dir, monkeypatch):
    ours, read = tt(model_dir, batch_size=4), []
    inner = ours.scorer.model.hidden_states
    monkeypatch.setattr(ours.scorer.model, "hidden_states", lambda ids: read.append(ids.shape) or inner(ids))
    contexts = [tuple(ours.tok_encode(text(random.Random(seed), 40))) for seed in range(4)]
    same, other = (5, 6), (7, 8, 9)
    choices = {
        0: [(*same, last) for last in (7, 8, 9)],
        1: [(*other, last) for last in (5, 6)],
        2: [(5,), (6,)],
        3: [same],
    }
    asked = [(contexts[number], after) for number, of in choices.items() for after in of]
    found = ours.scorer.log_probs(asked)
    assert len(read) == 1
    assert read[0][0] == 4
    for (context, after), (value, _) in zip(asked, found, strict=True):
        logits = (inner(torch.tensor([[*context, *after]])) @ ours.scorer.model.output_weight.T).detach()
        places = range(len(context) - 1, len(context) + len(after) - 1)
        expected = sum(
            float(logits[0, place].log_softmax(-1)[token]) for place, token in zip(places, after, strict=True)
        )
        assert value == pytest.approx(expected, abs=1e-4)


def test_weights_are_packed_once_for_all_batches_of_answers(model_dir, monkeypatch):
    from tt_train.evals import score

    ours, made = tt(model_dir, batch_size=1), []
    monkeypatch.setattr(score, "Packed", lambda model: made.append(model))
    ours.generate_until(requests(*((text(random.Random(6), 3), {"max_gen_toks": 5}) for _ in range(6))))
    assert made == [ours.scorer.model]
    ours.generate_until(requests((text(random.Random(6), 3), {"max_gen_toks": 5})))
    assert len(made) == 1  # packing would take longer than it saves


def test_sampled_answers_do_not_depend_on_the_batches(model_dir):
    asked = requests(*((text(random.Random(6), length), {"do_sample": True, "temperature": 0.9, "max_gen_toks": 12})
                       for length in (3, 9, 14, 3)))  # fmt: skip
    found = []
    for batch_size in (1, 3, "auto"):
        torch.manual_seed(7)
        found.append(tt(model_dir, batch_size=batch_size).generate_until(asked))
    assert found[0] == found[1] == found[2]
    assert found[0] != tt(model_dir).generate_until(asked)


def test_texts_in_one_batch_do_not_change_each_other_where_length_rotates(model_dir, tmp_path):
    """A dynamic rope is longer for a longer text; padding and other texts of its batch must not count."""
    shutil.copytree(model_dir, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    scaling = {"rope_type": "dynamic", "factor": 4.0}
    config = json.loads(path.read_text()) | {"rope_scaling": scaling, "max_position_embeddings": 32}
    config.pop("rope_parameters", None)
    path.write_text(json.dumps(config | {"rope_theta": 10000.0}))
    rng = random.Random(8)
    asked = [(text(rng, length), " alpha beta") for length in (4, 20, 70, 70)] + [("a b", " c d"), ("a b", " e f")]
    together = tt(tmp_path / "model", max_length=200).loglikelihood(requests(*asked))
    for question, (value, _) in zip(asked, together, strict=True):
        [(alone, _)] = tt(tmp_path / "model", max_length=200, batch_size=1).loglikelihood(requests(question))
        assert value == pytest.approx(alone, abs=1e-4)


def _ask(model_dir, expected):
    ours = tt(model_dir, tell=list)
    from tt_train.devices.distributed import world

    if not world().is_main:
        ours.scorer.serve()
        return
    asked = [(text(random.Random(9), length), {"max_gen_toks": 9}) for length in (2, 30, 7)]
    found = [ours.loglikelihood(requests(*questions())), ours.generate_until(requests(*asked))]
    ours.scorer.leave()
    for (value, greedy), (known, is_greedy) in zip(found[0], expected[0], strict=True):
        assert value == pytest.approx(known, abs=1e-4)
        assert greedy == is_greedy
    assert found[1] == expected[1]


def test_two_ranks_give_what_one_process_gives(model_dir, ranks):
    one = tt(model_dir, tell=list)
    asked = [(text(random.Random(9), length), {"max_gen_toks": 9}) for length in (2, 30, 7)]
    expected = [one.loglikelihood(requests(*questions())), one.generate_until(requests(*asked))]
    ranks(2, _ask, model_dir, expected)


# ---- adapted and quantized models ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_an_adapted_model_equals_what_peft_has_merged_in_hf(model_dir, tmp_path, options):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    import tt_peft
    from tt_train.models.load import load

    model, _ = load(model_dir, device="cpu")
    tt_peft.apply_lora_(model, tt_peft.LoRAConfig(rank=4, target_modules=("q_proj", "v_proj", "down_proj"), **options))
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in tt_peft.adapter_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    tt_peft.save_adapter(model, tmp_path / "adapter", base_model=str(model_dir))
    shutil.copy(model_dir / "generation_config.json", tmp_path / "adapter")
    merged = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), tmp_path / "adapter")
    shutil.copytree(model_dir, tmp_path / "merged", ignore=shutil.ignore_patterns("*.safetensors"))
    merged.merge_and_unload().save_pretrained(tmp_path / "merged")
    ours, theirs = tt(tmp_path / "adapter", tell=list), hf(tmp_path / "merged")
    compare(ours, theirs, questions(1)[:30])
    asked = requests(
        *((text(random.Random(12), length), {"max_gen_toks": 12, "until": ["a"]}) for length in (2, 9, 30))
    )
    assert ours.generate_until(asked) == theirs.generate_until(asked)
    asked = requests(("alpha", " beta"))
    assert abs(ours.loglikelihood(asked)[0][0] - tt(model_dir).loglikelihood(asked)[0][0]) > 1e-3


def test_a_quantized_model_equals_hf_on_the_dequantized_weights(model_dir, tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    import tt_ckpt
    from tt_train.models.load import load

    quantized, _ = load(model_dir, device="cpu")
    quantize_(quantized, Int8WeightOnlyConfig())
    twin, _ = load(model_dir, device="cpu")
    state = {name: value.dequantize() if hasattr(value, "dequantize") and type(value) is not torch.Tensor else value
             for name, value in quantized.state_dict().items()}  # fmt: skip
    assert any(not torch.equal(value, twin.state_dict()[name]) for name, value in state.items())
    twin.load_state_dict(state)
    tt_ckpt.save_hf(twin, tmp_path / "twin", config=tt_ckpt.read_config(model_dir), source=model_dir)
    ours = tt(model_dir, tell=list)
    ours.scorer._model = quantized
    compare(ours, hf(tmp_path / "twin"), questions(2)[:30])
