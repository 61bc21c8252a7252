"""Tokenizer files from anywhere: broken, huge, or made so that the library that reads them dies or never comes back."""

from __future__ import annotations

import base64
import copy
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tt_data import load_tokenizer
from tt_data.text.trial import try_out

FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
VOCAB = {chr(i): i - 33 for i in range(33, 127)} | {"\u0120": 94, "\u010a": 95}
BPE: dict[str, Any] = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
    "pre_tokenizer": BYTES, "post_processor": None, "decoder": BYTES,
    "model": {"type": "BPE", "vocab": VOCAB, "merges": []},
}  # fmt: skip


def write(folder: Path, **changes: Any) -> Path:
    data = copy.deepcopy(BPE) | changes
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return folder


def model(**changes: Any) -> dict[str, Any]:
    return {"model": {**BPE["model"], **changes}}


def added(*tokens: tuple[int, str]) -> dict[str, Any]:
    return {"added_tokens": [{"id": index, "content": content, **FLAGS} for index, content in tokens]}


def split(pattern: str) -> dict[str, Any]:
    return {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}}


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"normalizer": {"type": "Replace", "pattern": pattern, "content": content}}


def charsmap(data: bytes) -> dict[str, Any]:
    return {"normalizer": {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}}


WORD = {"type": "WordPiece", "unk_token": "a", "vocab": VOCAB, "max_input_chars_per_word": 100}
UNIGRAM = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]}
REFUSED = {
    "an added id of 2^31": (added((2**31, "<s>")), r"\[0\].id: expected a whole number from 0 to 16,777,215"),
    "a negative added id": (added((-1, "<s>")), r"added_tokens\[0\].id.*found -1"),
    "one token with two ids": (added((96, "<s>"), (97, "<s>")), "added_tokens.1..id: expected 96 as before for '<s>'"),
    "a long added token": (added((96, "a" * 10**6)), "a text of at most 256 characters"),
    "too many added tokens": (added(*((96 + i, f"<{i}>") for i in range(70_000))), "at most 65,536 tokens"),
    "an id far off": (model(vocab={**VOCAB, "zz": 2**32 - 1}), "model.vocab.'zz'.: .*found 4294967295"),
    "an id that is text": (model(vocab={**VOCAB, "zz": "1"}), "model.vocab.'zz'.: .*found '1'"),
    "a vocabulary that is a list": (model(vocab=[1]), "expected an object of tokens and ids, found a list"),
    "no model": ({"model": None}, "model: expected an object with type and vocab, found None"),
    "random ids": (model(dropout=1.0), "model.dropout: expected null"),
    "words of any length": ({"model": {**WORD, "max_input_chars_per_word": 2**63}}, "max_input_chars_per_word"),
    "no unknown token": ({"model": {**WORD, "unk_token": "[UNK]"}}, "model.unk_token: expected a token of the voc"),
    "a score that is no number": ({"model": {**UNIGRAM, "vocab": [["a", float("nan")]]}}, r"vocab\[0\]: .*finite"),
    "a token that merges lack": (model(merges=[["a", "zz"]]), "Token `zz` out of vocabulary"),
    "a panic while it is loaded": (charsmap(b"xxx"), "Cannot parse precompiled_charsmap"),
    "an abort while it is loaded": (charsmap(b"\xff\xff\xff\xff\0\0\0\0"), "too much memory, or a crash"),
    "a panic while it encodes": (charsmap(b"\4\0\0\0\0\0\0\0"), "fails when it encodes .*index out of bounds"),
    "a pattern of nothing": (replace({"String": ""}, "x"), "fails when it encodes"),
    "text that grows a million times": (replace({"String": "a"}, "a" * 10**6), r"fails when it encodes"),
    "a pattern that backtracks": (split(r"(\w+)+$"), "fails when it encodes .*retry-limit"),
    "a pattern that takes squares": (split(r"(a)\1*b"), "fails when it encodes .*too much time"),
    "a pattern that backtracks on a spelt letter": (split(r"(\x{416}+)+$"), "fails when it encodes .*retry-limit"),
    "a pattern that asks for a later letter": (split(r"\w+[%^]"), "fails when it encodes .*too much time"),
    "a replacement that backtracks": (replace({"Regex": r"(a|a)*\z"}, "x"), "fails when it encodes"),
    "pieces of no length": ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "fails when it encodes"),
    "a strip of a billion": ({"decoder": {"type": "Strip", "content": "a", "start": 10**9, "stop": 9}}, "it decodes"),
    "a version that commands a terminal": ({"version": "\x1b]0;x\x07"}, r"version '\\x1b\]0;x\\x07'"),
    "a prefix longer than its tokens": (
        model(continuing_subword_prefix="#" * 50, vocab={**VOCAB, "ab": 96}, merges=[["a", "b"]]), "out of range"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_tokenizer_json_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    changes, words = REFUSED[name]
    with pytest.raises(ValueError, match=words) as error:
        load_tokenizer(write(tmp_path, **changes))
    text = str(error.value)
    assert text.startswith(str(tmp_path / "tokenizer.json"))
    assert text.isprintable()
    assert len(text) < 600


@pytest.mark.parametrize("step", ["normalizer", "pre_tokenizer", "decoder"])
@pytest.mark.parametrize("kind", [[], {}, None, 5, {"Regex": "b+"}])
def test_a_step_of_an_odd_type_is_refused_by_the_library(tmp_path: Path, step: str, kind: Any) -> None:
    with pytest.raises(ValueError, match="not a tokenizer.json"):
        load_tokenizer(write(tmp_path, **{step: {"type": kind, "pattern": {"Regex": []}}}))


@pytest.mark.parametrize(
    "changes",
    [
        {"padding": {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": 0, "pad_id": 0,
                     "pad_type_id": 0, "pad_token": "x"}},
        {"truncation": {"direction": "Right", "max_length": 1, "strategy": "OnlySecond", "stride": 1}},
        {"post_processor": {"type": "BertProcessing", "sep": ["x", 4000000000], "cls": ["y", 4000000000]}},
        {"post_processor": {"type": "TemplateProcessing", "pair": [], "special_tokens": {},
                            "single": [{"SpecialToken": {"id": "x", "type_id": 0}}] * 99999}},
    ],
    ids=["padding", "truncation", "ids of a processor", "a processor without its tokens"],
)  # fmt: skip
def test_parts_of_a_file_that_are_not_used_do_no_harm(tmp_path: Path, changes: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(write(tmp_path, **changes))
    assert tokenizer.encode("ab!") == [VOCAB["a"], VOCAB["b"], VOCAB["!"]]
    assert not tokenizer.adds_bos


def test_digits_may_be_grouped_from_the_right(tmp_path: Path) -> None:
    """As SuperBPE's tokenizers do: each group looks for the end of its run."""
    vocab = {"vocab": {**VOCAB, "12": 97}, "merges": ["1 2"]}
    pattern = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))| ?\p{L}+|\s+| ?[^\s\p{L}\p{N}]+"
    steps = [split(pattern)["pre_tokenizer"], {**BYTES, "use_regex": False}]
    write(tmp_path, pre_tokenizer={"type": "Sequence", "pretokenizers": steps}, **model(**vocab))
    ids = load_tokenizer(tmp_path).encode("1234 12", add_bos=False, add_eos=False)
    assert ids == [VOCAB[letter] for letter in "1234\u0120"] + [97]


def test_a_text_that_the_library_cannot_encode_is_an_error_of_the_file(tmp_path: Path) -> None:
    """The trial cannot try every text."""
    tokenizer = load_tokenizer(write(tmp_path, **model(unk_token="<unk>"), pre_tokenizer=None, decoder=None))
    with pytest.raises(ValueError, match=r"tokenizer.json: the tokenizers library cannot encode '\\u65e5' \(Unk token"):
        tokenizer.encode("\u65e5")


def test_ids_are_what_the_library_gives_and_a_file_that_says_otherwise_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        tokenizer = load_tokenizer(write(tmp_path, **added((500, "<s>"))), text_specials=["<s>"])
    assert "the added token '<s>' has id 500 in the file, but the library gives it 96" in caplog.text
    assert tokenizer.token_id("<s>") == 96
    assert tokenizer.encode("a<s>") == [VOCAB["a"], 96]


def test_a_vocabulary_with_holes_has_the_size_of_its_last_id(tmp_path: Path) -> None:
    assert load_tokenizer(write(tmp_path, **model(vocab={**VOCAB, "zz": 5000}))).vocab_size == 5001


def test_a_file_of_a_million_lists_or_of_a_gigabyte_is_not_parsed(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text('{"model": [' + "[]," * 5_000_000 + "[]]}")
    with pytest.raises(ValueError, match="5,000,003 lists and objects, expected at most 4,000,000"):
        load_tokenizer(tmp_path)
    with file.open("wb") as stream:
        stream.truncate(1 << 30)
    with pytest.raises(ValueError, match="1,073,741,824 bytes, expected at most 67,108,864"):
        load_tokenizer(tmp_path)


def test_half_of_a_surrogate_pair_and_a_million_keys_in_a_config_are_no_end_of_the_program(tmp_path: Path) -> None:
    model = write(tmp_path)
    config = {"bos_token": "\ud800", "chat_template": "\ud800{{ messages[0].content }}"}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(model)
    assert tokenizer.bos_id is None
    assert tokenizer.fingerprint
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        tokenizer.encode_prompt([{"role": "user", "content": "hi"}])
    (model / "tokenizer_config.json").write_text(json.dumps({f"x{i}_token": "a" for i in range(20_000)}))
    with pytest.raises(ValueError, match="its keys: expected at most 10,000, found 20000"):
        load_tokenizer(model)


def test_steps_nested_hundreds_of_times_are_refused(tmp_path: Path) -> None:
    deep: Any = None
    for _ in range(300):
        deep = {"type": "Sequence", "normalizers": [deep or {"type": "NFC"}]}
    with pytest.raises(ValueError, match="recursion limit|nested too deeply"):
        load_tokenizer(write(tmp_path, normalizer=deep))


# ---- tokenizer.model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data", [b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x05" * 1000, bytes(100), b"\x12" * 10_000, b"x", b"\x08" + b"\xff" * 9]
)
def test_a_broken_sentencepiece_model_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(ValueError, match="tokenizer.model: (not a|this) sentencepiece model") as error:
        load_tokenizer(tmp_path)
    assert str(error.value).isprintable()


def test_a_process_that_dies_is_an_error_and_says_when(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the library dies of differs by its version: here the process itself is made to die."""
    (tmp_path / "sentencepiece.py").write_text("import os\nos.abort()")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"x: this sentencepiece model fails when it is loaded \(too much mem"):
        try_out("sentencepiece", b"", "x")
    (tmp_path / "sentencepiece.py").write_text("while True: pass")
    with pytest.raises(ValueError, match=r"fails when it is loaded \(too much time\)"):
        try_out("sentencepiece", b"", "x")


def test_the_trial_sees_no_token_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sentencepiece.py").write_text("import os\nraise ValueError(sorted(os.environ))")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    with pytest.raises(ValueError, match="PYTHONPATH") as error:
        try_out("sentencepiece", b"", "x")
    assert "HF_TOKEN" not in str(error.value)


def rank_lines(*more: bytes) -> bytes:
    lines = [base64.b64encode(bytes([i])) + b" %d" % i for i in range(256)]
    return b"\n".join([*lines, *more])


def rank(token: bytes, number: int) -> bytes:
    return base64.b64encode(token) + b" %d" % number


RANKS = {
    "base64 garbage": (rank_lines(b"!!! 256"), ":257: expected base64 bytes"),
    "a huge rank": (rank_lines(rank(b"ab", 10**30)), ":257: .*a rank from 0 to 256, found"),
    "a rank of 5000 digits": (rank_lines(base64.b64encode(b"ab") + b" " + b"9" * 5000), ":257: expected base64"),
    "a negative rank": (rank_lines(base64.b64encode(b"ab") + b" -1"), ":257: expected base64"),
    "a token twice": (rank_lines(rank(b"a", 256)), ":257: b'a' a second time"),
    "a rank twice": (rank_lines(rank(b"ab", 0)), "the ranks are not 0 to 256, each once"),
    "a token of a megabyte": (rank_lines(rank(b"a" * 10**6, 256)), ":257: expected base64"),
    "no rank for a byte": (rank(b"a", 0) + b"\n" + rank(b"b", 1), "no rank for the byte 0x00"),
    "a token that no merge makes": (rank_lines(rank(b"abc", 256)), "b'abc' cannot be made by merging two lower ones"),
    "an empty token": (b"= 0", "expected base64"),
}


@pytest.mark.parametrize("name", RANKS)
def test_a_broken_tiktoken_file_is_refused_with_its_line(tmp_path: Path, name: str) -> None:
    data, words = RANKS[name]
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(ValueError, match=words) as error:
        load_tokenizer(tmp_path)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 600


def test_a_tiktoken_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(rank_lines(rank(b"ab", 256), rank(b"abab", 257)))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("ababa", False, False) == [257, ord("a")]
    assert tokenizer.bos_id == 258


# ---- what is beside them -----------------------------------------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 17209920\n"
PAGE = b"<!DOCTYPE html>\n<html><body>Sign in</body></html>"
FILES = [
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "generation_config.json", "chat_template.jinja", "chat_template.json", "additional_chat_templates/rag.jinja",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, llama_dir: Path, sentencepiece_file: Path) -> Any:
    """``folder(name)``: a model folder for which the file ``name`` matters."""

    def make(name: str) -> Path:
        model = tmp_path / "model"
        (model / "additional_chat_templates").mkdir(parents=True)
        if name in ("tokenizer.model", "added_tokens.json"):
            shutil.copy(sentencepiece_file, model / "tokenizer.model")
        else:
            shutil.copy(llama_dir / "tokenizer.json", model)
        load_tokenizer(model)
        return model

    return make


@pytest.mark.parametrize("name", FILES)
def test_a_pointer_a_page_and_an_empty_file_are_named_whatever_file_they_replace(folder: Any, name: str) -> None:
    model = folder(name)
    contents = {POINTER: "a git-lfs pointer .*run: git lfs pull", PAGE: "this is a web page, not the file"}
    contents |= {b"": "without any content|an empty template|0 bytes"}
    for content, words in contents.items():
        (model / name).unlink(missing_ok=True)
        (model / name).write_bytes(content)
        with pytest.raises(ValueError, match=words) as error:
            load_tokenizer(model)
        assert str(error.value).startswith(str(model / name))


@pytest.mark.parametrize("name", FILES)
def test_a_link_out_of_the_model_folder_is_refused_for_every_file(folder: Any, tmp_path: Path, name: str) -> None:
    model = folder(name)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "secret").write_text('{"KEEP": "KEEP"}')
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(tmp_path / "home" / "secret")
    with pytest.raises(ValueError, match="a link out of its folder") as error:
        load_tokenizer(model)
    assert "KEEP" not in str(error.value)


@pytest.mark.parametrize("name", FILES)
def test_a_pipe_a_device_and_a_folder_are_refused_in_place_of_every_file(folder: Any, name: str) -> None:
    model = folder(name)
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    with pytest.raises(ValueError, match="a pipe, expected a regular file"):
        load_tokenizer(model)
    (model / name).unlink()
    (model / name).mkdir()
    with pytest.raises(ValueError, match="a folder, expected a regular file"):
        load_tokenizer(model)
    (model / name).rmdir()
    (model / name).symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="a link out of its folder"):
        load_tokenizer(model)


def test_a_linked_folder_of_templates_is_refused_even_if_it_holds_none(folder: Any, tmp_path: Path) -> None:
    model = folder("tokenizer.json")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "id_rsa").write_text("KEEP")
    (model / "additional_chat_templates").rmdir()
    (model / "additional_chat_templates").symlink_to("../private")
    with pytest.raises(ValueError, match="additional_chat_templates: a link out of its folder, to .*private"):
        load_tokenizer(model)
    (model / "additional_chat_templates").unlink()
    (model / "additional_chat_templates").write_text("x")
    with pytest.raises(ValueError, match=r"expected a folder of .jinja files"):
        load_tokenizer(model)


def test_a_snapshot_of_the_hub_cache_is_read_also_through_a_link_to_it(tmp_path: Path, llama_dir: Path) -> None:
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "0123"
    (snapshot / "additional_chat_templates").mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(llama_dir.iterdir())):
        shutil.copy(file, repository / "blobs" / f"{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (repository / "blobs" / "t").write_text("{{ messages[0].content }}")
    (snapshot / "chat_template.jinja").symlink_to("../../blobs/t")
    (snapshot / "additional_chat_templates" / "rag.jinja").symlink_to("../../../blobs/t")
    (tmp_path / "base").symlink_to(snapshot)
    for place in (snapshot, tmp_path / "base"):
        assert sorted(load_tokenizer(place).templates) == ["default", "rag"]
        assert load_tokenizer(place / "tokenizer.json").vocab_size == load_tokenizer(llama_dir).vocab_size


def test_a_file_that_the_user_names_may_lead_anywhere(tmp_path: Path, llama_dir: Path) -> None:
    (tmp_path / "tokenizer.json").symlink_to(llama_dir / "tokenizer.json")
    (tmp_path / "mine.jinja").symlink_to(tmp_path / "elsewhere.txt")
    (tmp_path / "elsewhere.txt").write_text("{{ messages[0].content }}")
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json", template=str(tmp_path / "mine.jinja"))
    assert tokenizer.render([{"role": "user", "content": "hi"}]) == "hi"
    os.mkfifo(tmp_path / "pipe.jinja")
    with pytest.raises(ValueError, match="a pipe, expected a regular file"):
        load_tokenizer(llama_dir, template=str(tmp_path / "pipe.jinja"))


WRONG = {
    ("tokenizer_config.json", "bos_token"): (5, "a text, an object with content, or null, found 5"),
    ("tokenizer_config.json", "additional_special_tokens"): ("x", "a list of tokens, found 'x'"),
    ("special_tokens_map.json", "additional_special_tokens"): ([1], "additional_special_tokens.0.: expected a text"),
    ("special_tokens_map.json", "eos_token"): (["</s>"], "found a list"),
    ("generation_config.json", "eos_token_id"): ("2", "a whole number, or a short list of them, found '2'"),
    ("generation_config.json", "eos_token_id "): ([1, 2.5], "found 2.5"),
    ("generation_config.json", "eos_token_id  "): ([None], "found None"),
    ("tokenizer_config.json", "chat_template"): (5, "chat_template must be text, or a list of objects"),
    ("tokenizer_config.json", "chat_template "): ([{"name": 5, "template": "x"}], "chat_template must be text"),
    ("chat_template.json", "other"): ("x", "expected the key chat_template"),
    ("added_tokens.json", "<x>"): ("5", "a whole number from 0 to 16,777,215, found '5'"),
    ("added_tokens.json", "<x> "): (2**31, "found 2147483648"),
}


@pytest.mark.parametrize("place", WRONG)
def test_a_key_of_the_wrong_type_is_named_with_its_file(folder: Any, place: tuple[str, str]) -> None:
    name, key = place
    value, words = WRONG[place]
    model = folder(name)
    (model / name).write_text(json.dumps({key.strip(): value}))
    with pytest.raises(ValueError, match=words) as error:
        load_tokenizer(model)
    assert str(error.value).startswith(str(model / name))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"add_bos_token": "false"}, "add_bos_token: expected true or false, found 'false'"),
        ({"legacy": 1}, "legacy: expected true or false, found 1"),
        ({"added_tokens_decoder": {"-1": {"content": "x"}}}, "added_tokens_decoder: expected ids from 0 .*found '-1'"),
        ({"added_tokens_decoder": {"500": 7}}, "added_tokens_decoder.500: expected a text"),
        ({"added_tokens_decoder": [1]}, "added_tokens_decoder: expected an object of ids and tokens, found a list"),
    ],
)
def test_settings_of_a_sentencepiece_model_are_checked(folder: Any, config: dict[str, Any], words: str) -> None:
    model = folder("tokenizer.model")
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words):
        load_tokenizer(model)
