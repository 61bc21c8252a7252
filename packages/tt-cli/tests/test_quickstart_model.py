"""The tokenizer and the blank model of the quickstart, against what transformers makes of their files."""

import json
from pathlib import Path

import pytest
import torch

import tt_data
import tt_train
from tt_cli.quickstart.blank_model import llama_config, train_tokenizer, write_blank_model
from tt_cli.quickstart.rows import make_splits

ROWS = make_splits(0, num_pretrain=300, num_finetune=100, num_held_out=10, num_base_held_out=10)
TEXTS = [text for row in (*ROWS.pretrain, *ROWS.finetune) for text in (row.question, row.answer)]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 23 + 41?"}]


def make(folder: Path, *, seed: int = 0, **sizes: int) -> Path:
    vocab_size = train_tokenizer(TEXTS, folder)
    shape = {"vocab_size": vocab_size, "hidden_size": 64, "num_hidden_layers": 2} | sizes
    write_blank_model(folder, llama_config(**shape), seed=seed)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("blank"))


@pytest.mark.parametrize("text", ["Sort: d b a", "What is 23 + 41?", "caf\u00e9 \U0001f600\n\ttabs  and <|end|>", ""])
def test_any_text_survives_encoding(folder: Path, text: str):
    tokenizer = tt_data.load_tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode(text, add_bos=False, add_eos=False), skip_special=False) == text


def test_digits_and_letters_are_tokens_of_their_own(folder: Path):
    tokenizer = tt_data.load_tokenizer(folder)
    for text in ("2341", "d b a c"):
        ids = tokenizer.encode(text, add_bos=False, add_eos=False)
        assert [tokenizer.decode([i]).strip() for i in ids] == list(text.replace(" ", ""))


def test_an_answer_ends_with_the_end_token(folder: Path):
    tokenizer = tt_data.load_tokenizer(folder)
    assert [tokenizer.decode([i], skip_special=False) for i in tokenizer.eos_ids] == ["<|end|>"]
    assert tokenizer.decode([tokenizer.pad_id], skip_special=False) == "<|pad|>"


def test_training_again_gives_the_same_files(folder: Path, tmp_path: Path):
    make(tmp_path)
    for file in folder.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


def test_vocab_size_and_max_length_have_an_effect(tmp_path: Path):
    assert train_tokenizer(TEXTS, tmp_path, vocab_size=300, max_length=77) == 300
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == 77


def test_weights_follow_the_seed(folder: Path, tmp_path: Path):
    other = make(tmp_path, seed=1)
    assert (folder / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


def test_making_weights_leaves_the_global_generator_alone(tmp_path: Path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    make(tmp_path)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("name", "value"), [("hidden_size", 96), ("num_hidden_layers", 3), ("max_length", 64)])
def test_each_size_of_the_model_has_an_effect(folder: Path, tmp_path: Path, name: str, value: int):
    one, other = (json.loads((path / "config.json").read_text()) for path in (folder, make(tmp_path, **{name: value})))
    key = "max_position_embeddings" if name == "max_length" else name
    assert one[key] != other[key] == value
    model, _ = tt_train.load(tmp_path, device="cpu")
    assert getattr(model.config, key) == value


def test_the_parameters_are_counted(tmp_path: Path):
    vocab_size = train_tokenizer(TEXTS, tmp_path)
    config = llama_config(vocab_size=vocab_size, hidden_size=64, num_hidden_layers=1)
    expected = vocab_size * 64 + 4 * 64 * 64 + 3 * 64 * 192 + 3 * 64  # embedding (tied), attention, mlp, norms
    assert write_blank_model(tmp_path, config, seed=0) == expected


def test_transformers_loads_the_same_model(folder: Path):
    transformers = pytest.importorskip("transformers")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours, _ = tt_train.load(folder, device="cpu")
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)


def test_transformers_loads_the_same_tokenizer_and_template(folder: Path):
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), tt_data.load_tokenizer(folder)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.eos_id, ours.pad_id)
    expected = theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert ours.encode_prompt(CHAT) == expected
    assert ours.render(CHAT) == theirs.apply_chat_template(CHAT, tokenize=False)
    for row in ROWS.finetune[:20]:
        assert theirs(row.question)["input_ids"] == ours.encode(row.question, add_bos=False, add_eos=False)
