"""Embeddings and output projections in adapter files of PEFT: they count, or are refused by name."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tt_peft
from tt_peft import LoRAConfig

peft = pytest.importorskip("peft")


@pytest.fixture
def folder(make_llama, tmp_path):
    """Writes an adapter of PEFT for a model (made anew if None) and returns that model with it, and the folder."""

    def write(model=None, *, embeddings="auto", tie=False, **settings):
        model = make_llama(tie_word_embeddings=tie) if model is None else model
        options = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
        theirs = peft.get_peft_model(model, peft.LoraConfig(**{**options, **settings})).eval()
        generator = torch.Generator().manual_seed(3)
        for name, parameter in theirs.named_parameters():
            if "modules_to_save" in name or "trainable_tokens" in name:
                parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
        theirs.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=embeddings)
        return theirs, tmp_path / "adapter"

    return write


def without_lm_head(model):
    """As our decoders are: a tied model has no module for its output projection."""
    plain = nn.Module()
    plain.model, plain.lm_head = model.model, None
    plain.config = type("Config", (), {"tie_word_embeddings": True})
    return plain


@pytest.mark.parametrize("tie", [False, True])
def test_copies_of_the_base_s_embeddings_are_passed_over(tie, folder, make_llama, ids):
    theirs, path = folder(tie=tie, embeddings=True)
    assert any("embed_tokens" in key for key in load_file(path / "adapter_model.safetensors"))
    ours = make_llama(tie_word_embeddings=tie)
    assert tt_peft.load_adapter(ours, path).modules_to_save == ()
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    if tie:
        tt_peft.load_adapter(without_lm_head(make_llama(tie_word_embeddings=True)), path)
    half = make_llama(tie_word_embeddings=tie).bfloat16()
    assert tt_peft.load_adapter(half, path).modules_to_save == ()


def test_new_rows_of_the_file_count_and_the_base_keeps_its_own(folder, make_llama, ids, tmp_path):
    resized = make_llama()
    resized.resize_token_embeddings(44, mean_resizing=False)
    base = copy.deepcopy(resized)
    with torch.no_grad():
        resized.model.embed_tokens.weight[40:] += 1.0
    theirs, path = folder(resized, embeddings=True)
    tokens = torch.tensor([[1, 41, 43, 7]])
    before, plain = base.model.embed_tokens.weight.clone(), base(tokens).logits
    assert tt_peft.load_adapter(base, path).modules_to_save == ("model.embed_tokens",)
    torch.testing.assert_close(base(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(base.model.embed_tokens.weight, before)
    with tt_peft.disable_adapter(base):
        assert torch.equal(base(tokens).logits, plain)
    tt_peft.save_adapter(base, tmp_path / "ours")
    fresh = make_llama()
    fresh.resize_token_embeddings(44, mean_resizing=False)
    again = peft.PeftModel.from_pretrained(fresh, str(tmp_path / "ours")).eval()
    with torch.no_grad():
        again.base_model.model.lm_head.weight.copy_(base.lm_head.weight)
    torch.testing.assert_close(again(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"embeddings": True},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens"], "embeddings": False},
        {"target_modules": ["lm_head"], "embeddings": False},
        {"target_modules": ["lm_head"], "embeddings": True},
    ],
)
def test_another_vocabulary_is_refused_with_both_sizes_and_the_cure(settings, folder, make_llama):
    resized = make_llama()
    resized.resize_token_embeddings(44, mean_resizing=False)
    _, path = folder(resized, **settings)
    message = r"for 44 tokens, the base has 40: the vocabulary was resized .*resize_token_embeddings\(44\)"
    with pytest.raises(ValueError, match=message):
        tt_peft.load_adapter(make_llama(), path)
    again = make_llama()
    again.resize_token_embeddings(44, mean_resizing=False)
    tt_peft.load_adapter(again, path, check_base=False)


def test_embeddings_of_another_base_are_refused_unless_told(folder, make_llama):
    _, path = folder(embeddings=True)
    other = make_llama(seed=5)
    with pytest.raises(ValueError, match=r"weight differs from the base's in 40 of 40 rows, .*: another base"):
        tt_peft.load_adapter(other, path)
    config = tt_peft.load_adapter(other, path, check_base=False)
    assert set(config.modules_to_save) == {"model.embed_tokens", "lm_head"}


def test_new_rows_of_a_tied_model_are_refused_with_the_tie(folder, make_llama):
    resized = make_llama(tie_word_embeddings=True)
    resized.resize_token_embeddings(44, mean_resizing=False)
    base = copy.deepcopy(resized)
    with torch.no_grad():
        resized.model.embed_tokens.weight[42:] += 1.0
    _, path = folder(resized, embeddings=True)
    for model in (copy.deepcopy(base), without_lm_head(base)):
        with pytest.raises(
            ValueError, match=r"in 2 of 44 rows, but the model ties its output|separate output projection, but the m"
        ):
            tt_peft.load_adapter(model, path)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ],
)
def test_an_adapter_of_the_output_projection_loads_where_there_is_one_else_the_tie_is_named(
    settings, folder, make_llama, ids
):
    theirs, path = folder(tie=True, **settings)
    ours = make_llama(tie_word_embeddings=True)
    tt_peft.load_adapter(ours, path)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    message = (
        r"belongs to a separate output projection, but the model ties its output projection to model.embed_t.*lm_head"
    )
    with pytest.raises(ValueError, match=message):
        tt_peft.load_adapter(without_lm_head(make_llama(tie_word_embeddings=True)), path)


@pytest.mark.parametrize("given", [[1, 5], {"embed_tokens": [1, 5]}, {"lm_head": [2], "embed_tokens": [1, 5]}])
def test_single_trained_rows_become_the_whole_layer(given, folder, make_llama, ids, tmp_path):
    theirs, path = folder(trainable_token_indices=given)
    ours = make_llama()
    config = tt_peft.load_adapter(ours, path)
    assert len(config.modules_to_save) == (2 if "lm_head" in given else 1)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    tt_peft.save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(make_llama(), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(again(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


def test_single_trained_rows_that_do_not_fit_are_refused(folder, make_llama):
    _, path = folder(trainable_token_indices=[1, 5])
    file, weights = path / "adapter_config.json", path / "adapter_model.safetensors"
    settings, state = json.loads(file.read_text()), load_file(weights)
    for wrong in ([1], [1, 40], [1, -3], [1, "a"], {"score": [1, 2]}):
        file.write_text(json.dumps({**settings, "trainable_token_indices": wrong}))
        with pytest.raises(ValueError, match=r"trainable_token_indices(=.*does not fit| has no list of tokens)"):
            tt_peft.load_adapter(make_llama(), path)
    file.write_text(json.dumps(settings))
    save_file({key: tensor for key, tensor in state.items() if "token_adapter" not in key}, weights)
    with pytest.raises(ValueError, match="trainable_token_indices are set, but"):
        tt_peft.load_adapter(make_llama(), path)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, "ensure_weight_tying=True"),
    ],
)
def test_what_trains_a_tied_weight_in_both_places_is_refused_by_name(settings, what, folder, make_llama):
    _, path = folder(tie=True, **settings)
    for model in (make_llama(tie_word_embeddings=True), without_lm_head(make_llama(tie_word_embeddings=True))):
        with pytest.raises(ValueError, match=rf"{what} is not supported .* ties its output .*merge_and_unload"):
            tt_peft.load_adapter(model, path)


def test_a_base_in_either_16_bit_type_recognises_copies_of_itself(folder, make_llama):
    _, path = folder(make_llama().half(), embeddings=True)
    for dtype in (torch.float16, torch.bfloat16):
        assert tt_peft.load_adapter(make_llama().half().to(dtype), path).modules_to_save == ()


def test_an_adapter_is_never_in_less_than_its_own_precision(make_llama, ids, tmp_path):
    """In fp32 over bf16, whole layers too; in the base's dtype if that is wider; bit-equal when saved again."""
    model = make_llama().bfloat16()
    config = LoRAConfig(rank=2, dtype=torch.float32, use_dora=True, modules_to_save="lm_head")
    tt_peft.apply_lora_(model, config)
    for parameter in tt_peft.adapter_parameters(model).values():
        parameter.data += torch.randn(parameter.shape) * 1e-3
    tt_peft.save_adapter(model, tmp_path / "one")
    again = make_llama().bfloat16()
    tt_peft.load_adapter(again, tmp_path / "one")
    tt_peft.load_adapter(again, tmp_path / "one", adapter="second")
    assert {p.dtype for p in tt_peft.adapter_parameters(again).values()} == {torch.float32}
    assert torch.equal(again(ids).logits, model(ids).logits)
    tt_peft.save_adapter(again, tmp_path / "two")
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) and one[key].dtype == two[key].dtype for key in one)
    prepared = make_llama().bfloat16()
    tt_peft.apply_lora_(prepared, config.with_(dtype=None))
    tt_peft.load_adapter(prepared, tmp_path / "one")
    assert {p.dtype for p in tt_peft.adapter_parameters(prepared).values()} == {torch.float32}
    asked = make_llama().bfloat16()
    tt_peft.apply_lora_(asked, config.with_(dtype=torch.bfloat16))
    tt_peft.load_adapter(asked, tmp_path / "one")
    assert {p.dtype for p in tt_peft.adapter_parameters(asked).values()} == {torch.bfloat16}
    wide = make_llama().double()
    tt_peft.load_adapter(wide, tmp_path / "one", check_base=False)
    assert {p.dtype for p in tt_peft.adapter_parameters(wide).values()} == {torch.float64}
