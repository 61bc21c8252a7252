"""Tokenizers in GGUF files: the ids of the tokenizer that the file was made from, and of transformers' own reading."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest

import tt_ckpt
from tt_ckpt.formats.gguf import file as gguf_file
from tt_ckpt.formats.gguf import model as gguf_model

gguf = pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 12345 past 67, don't you think? WE'LL see what they've got!",
    "def f(x):\n    return {'a': x ** 2, \"b\": [1, 2, 3]}  # a comment\n\n\nprint(f(10))\r\n\tindented\twith tabs",
    "Stra\u00dfe, na\u00efve caf\u00e9, \u4eca\u65e5\u306f\u4e16\u754c, \u043c\u0438\u0440 \U0001f600\U0001f44d",
    "   leading and   inner    spaces https://example.org/a/b?c=d&e=%20f",
] * 20
CONTROL, USER = ["<|start|>", "<|end|>"], ["<think>"]
TEMPLATE = "{% for message in messages %}<|start|>{{ message['content'] }}<|end|>{% endfor %}"


def texts(count: int = 200) -> list[str]:
    draw = random.Random(0)
    letters = "".join(CORPUS[:4]) + "\u0301\u00b2\u00bd\u2003 \n\n  XYZ"
    made = ["".join(draw.choices(letters, k=draw.randint(1, 60))) for _ in range(count)]
    return [*CORPUS[:4], "", " ", "\n", "a<think>b<|start|>c d<|end|> e", *made]


def write(path, *, arch: str, tokens: list[str], types: list[int], pre: str | None = None, **keys):
    """A file with a vocabulary and the smallest model of ``arch`` that goes with it."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama" if "scores" in keys else "gpt2")
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for key, value in keys.items():
        getattr(writer, {"merges": "add_token_merges", "scores": "add_token_scores"}.get(key, f"add_{key}"))(value)
    ones = np.ones((8, 8), np.float32)
    writer.add_tensor("token_embd.weight", np.ones((len(tokens), 8), np.float32))
    for local in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{local}.weight", ones)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", ones[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level(pre_tokenizer) -> tuple[list[str], list[int], list[str], "tokenizers.Tokenizer"]:
    """Tokens, types and merges of a BPE trained on the corpus, and the tokenizer itself."""
    own = tokenizers.Tokenizer(tokenizers.models.BPE())
    own.pre_tokenizer = pre_tokenizer
    own.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    own.train_from_iterator(
        CORPUS, tokenizers.trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    )
    own.add_special_tokens(CONTROL)
    own.add_tokens(USER)
    vocab = own.get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    types = [3 if token in CONTROL else 4 if token in USER else 1 for token in tokens]
    merges = [" ".join(pair) for pair in json.loads(own.to_str())["model"]["merges"]]
    return tokens, types, merges, own


def digits_apart():
    parts = tokenizers.pre_tokenizers
    return parts.Sequence([parts.Digits(individual_digits=True), parts.ByteLevel(add_prefix_space=False)])


def as_gpt2():
    return tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)


@pytest.mark.parametrize(("pre", "split"), [("smollm", digits_apart), ("gpt-2", as_gpt2), (None, as_gpt2)])
def test_ids_are_those_of_the_byte_level_tokenizer_that_the_file_was_made_from(tmp_path, pre, split, caplog):
    tokens, types, merges, own = byte_level(split())
    file = write(tmp_path / "m.gguf", arch="llama", tokens=tokens, types=types, pre=pre, merges=merges)
    tt_ckpt.convert(file, tmp_path / "hf")
    assert ("does not say how text is split" in caplog.text) == (pre is None)
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in texts():
        ids = own.encode(text).ids
        assert ours(text).input_ids == ids
        assert ours.decode(ids) == own.decode(ids, skip_special_tokens=False) == text
    assert set(CONTROL) <= set(ours.all_special_tokens) | {t.content for t in ours.added_tokens_decoder.values()}


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "tekken", "gpt-4o", "smaug-bpe"])
def test_ids_and_template_are_those_that_transformers_reads(tmp_path, pre):
    tokens, types, merges, _ = byte_level(as_gpt2())
    start, end = tokens.index(CONTROL[0]), tokens.index(CONTROL[1])
    file = write(
        tmp_path / "m.gguf", arch="llama", tokens=tokens, types=types, pre=pre, merges=merges,
        bos_token_id=start, eos_token_id=end, pad_token_id=end, add_bos_token=False, chat_template=TEMPLATE,
    )  # fmt: skip
    tt_ckpt.convert(file, tmp_path / "hf")
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    words = {"llama-bpe", "tekken", "gpt-4o"} & {pre}  # these take a word whole that is a token, which needs no merge
    for text in texts():
        text = text if pre != "qwen2" else text.replace("\u0301", "")  # and Qwen's composes accents first
        found = ours(text).input_ids
        assert found == theirs(text).input_ids or (words and len(found) < len(theirs(text).input_ids)), text
        assert ours.decode(found) == text
    assert len(ours) == len(tokens)
    assert ours.chat_template == theirs.chat_template == TEMPLATE
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (start, end, end)
    talk = [{"role": "user", "content": "hi"}]
    assert ours.apply_chat_template(talk, tokenize=False) == theirs.apply_chat_template(talk, tokenize=False)


def pieces(tmp_path, **options):
    """A sentencepiece model of the corpus, and its pieces, types and scores as a GGUF file has them."""
    spm = pytest.importorskip("sentencepiece")
    (tmp_path / "corpus.txt").write_text("\n".join(CORPUS), encoding="utf-8")
    spm.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "spm"), model_type="bpe", vocab_size=600,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        hard_vocab_limit=False, minloglevel=9, user_defined_symbols=USER, **options,
    )  # fmt: skip
    own = spm.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    ids = range(own.get_piece_size())
    types = [
        2 if own.is_unknown(i) else 3 if own.is_control(i) else 6 if own.is_byte(i) else 4 if own.id_to_piece(i) in USER
        else 1
        for i in ids
    ]  # fmt: skip
    return own, [own.id_to_piece(i) for i in ids], types, [own.get_score(i) for i in ids]


@pytest.mark.parametrize("prefix", [True, False])
def test_ids_are_those_of_the_sentencepiece_model_that_the_file_was_made_from(tmp_path, prefix):
    own, tokens, types, scores = pieces(tmp_path, add_dummy_prefix=prefix)
    file = write(
        tmp_path / "m.gguf", arch="llama", tokens=tokens, types=types, scores=scores, add_space_prefix=prefix,
        bos_token_id=own.bos_id(), eos_token_id=own.eos_id(), unk_token_id=own.unk_id(),
    )  # fmt: skip
    tt_ckpt.convert(file, tmp_path / "hf")
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    for text in texts():
        if any(token in text for token in [*USER, *CONTROL]) or not text:
            continue
        ids = own.encode(text)
        assert ours(text, add_special_tokens=False).input_ids == ids, text
        if prefix and not text.startswith(" "):  # it always puts a space first, but not before another
            assert theirs(text).input_ids == ours(text).input_ids, text
        assert ours(text).input_ids == [own.bos_id(), *ids]  # sentencepiece files begin a text unless a key says no
        assert ours.decode(ids) == own.decode(ids) == text
    assert "<think>" in ours.tokenize("a<think>b")


def test_every_token_that_ends_a_turn_is_written(tmp_path):
    tokens, types, merges, _ = byte_level(as_gpt2())
    tokens, types = [*tokens, f"[PAD{len(tokens)}]"], [*types, 5]
    file = write(
        tmp_path / "m.gguf", arch="llama", tokens=tokens, types=types, pre="llama-bpe", merges=merges,
        bos_token_id=5, eos_token_id=6, eot_token_id=7, eom_token_id=6,
    )  # fmt: skip
    tt_ckpt.convert(file, tmp_path / "hf")
    generation = json.loads((tmp_path / "hf/generation_config.json").read_text())
    assert generation == {"bos_token_id": 5, "eos_token_id": [6, 7]}
    config = tt_ckpt.read_config(tmp_path / "hf")
    assert (config["eos_token_id"], config["vocab_size"]) == (6, len(tokens))
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert len(ours) == len(tokens) - 1  # padding of the embedding is not a token
    assert ours("x").input_ids[0] == 5  # Llama 3's tokenizer begins every text


def test_an_unknown_way_to_split_is_refused_unless_the_original_tokenizer_is_given(tmp_path):
    tokens, types, merges, own = byte_level(as_gpt2())
    file = write(tmp_path / "m.gguf", arch="llama", tokens=tokens, types=types, pre="qwen22", merges=merges)
    with pytest.raises(ValueError, match=r"pre 'qwen22' is not known here, nearest qwen2; give config=DIR"):
        tt_ckpt.convert(file, tmp_path / "hf")
    (tmp_path / "base").mkdir()
    own.save(str(tmp_path / "base/tokenizer.json"))
    tt_ckpt.convert(file, tmp_path / "hf", config=tmp_path / "base")
    assert (tmp_path / "hf/tokenizer.json").read_bytes() == (tmp_path / "base/tokenizer.json").read_bytes()
    assert tt_ckpt.read_config(tmp_path / "hf")["model_type"] == "llama"


def test_a_vocabulary_that_tokenizer_json_cannot_hold_is_refused(tmp_path):
    tokens, types, merges, _ = byte_level(as_gpt2())
    for i, (change, words) in enumerate(
        [
            ({"tokens": [*tokens[:-1], tokens[0]]}, "appears twice"),
            ({"types": types[:-1]}, f"token_type: expected {len(tokens)} numbers"),
            ({"merges": [*merges, "no such"]}, "'no such' does not make a token of two"),
            ({"tokens": [*tokens, "more"], "types": [*types, 1], "vocab_size": 3}, "vocab_size does not fit"),
        ]
    ):
        settings = {"tokens": tokens, "types": types, "merges": merges, "pre": "gpt-2", **change}
        file = write(tmp_path / f"{i}.gguf", arch="llama", **settings)
        with pytest.raises(ValueError, match=words):
            tt_ckpt.convert(file, tmp_path / "hf")


ODD = [True, -1, 2**40, 2**63, 1.5, float("nan"), float("inf"), "", "x", [], [1], ["a"], [True, False]]


def test_a_value_of_another_kind_is_an_error_of_one_line(tmp_path, monkeypatch):
    tokens, types, merges, _ = byte_level(as_gpt2())
    file = write(
        tmp_path / "m.gguf", arch="llama", tokens=tokens, types=types, pre="llama-bpe", merges=merges, bos_token_id=1,
        eos_token_id=2, eot_token_id=3, add_bos_token=True, chat_template="x", key_length=8, sliding_window=4,
    )  # fmt: skip
    gguf_model.from_gguf(file)
    whole = gguf_file.read_gguf(file)
    more = ["general.type", "llama.expert_count", "llama.rope.scaling.type", "llama.rope.scaling.factor",
            "llama.vocab_size", "tokenizer.ggml.scores", "tokenizer.chat_template.tool", "llama.attention.causal",
            "tokenizer.ggml.add_space_prefix"]  # fmt: skip
    refused = []
    for key in [*whole.values, *more]:
        for odd in [*ODD, ["a"] * len(tokens), [1.0] * len(tokens), [3] * len(tokens), tokens[::-1], tokens[:-3]]:
            changed = replace(whole, values=whole.values | {key: odd})
            monkeypatch.setattr(gguf_model, "read_gguf", lambda path, changed=changed: changed)
            try:
                gguf_model.from_gguf(file)
            except ValueError as error:
                refused.append(str(error))
    assert len(refused) > 300
    assert all(str(file) in text and "\n" not in text for text in refused)
