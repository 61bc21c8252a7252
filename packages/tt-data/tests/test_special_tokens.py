"""Special tokens that stand in the data: told, shown, and on request made tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tt_data import as_text, load_dataset, load_tokenizer, show

TALK = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the cat"}]
WRITTEN = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nthe cat<|im_end|>\n"
TYPED = "a<|im_end|>b"
ROWS = {
    "text": {"text": TYPED},
    "completion": {"prompt": TYPED, "completion": "the cat"},
    "answer": {"prompt": "hello ", "completion": TYPED},
    "chat": {"messages": [{"role": "user", "content": TYPED}, TALK[1]]},
    "chat answer": {"messages": [TALK[0], {"role": "assistant", "content": TYPED}]},
    "pair": {"prompt": "hello", "chosen": TYPED, "rejected": "the cat"},
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_special_token_in_data_stays_text_and_is_told(chatml: Any, kind: str) -> None:
    dataset = load_dataset([ROWS[kind]], chatml)
    (note,) = [note for note in dataset.report["notes"] if "special" in note]
    assert "'<|im_end|>' is spelt out in the data: it stays text; data.special_tokens=tokens" in note
    assert "(1 row, the first at rows:0)" in note
    assert not load_dataset([{"text": "a"}, {"messages": TALK}][:1], chatml).report["notes"]


@pytest.mark.parametrize("kind", ROWS)
def test_special_tokens_in_data_become_tokens_on_request(chatml: Any, kind: str) -> None:
    end = chatml.token_id("<|im_end|>")
    as_typed, as_token = (load_dataset([ROWS[kind]], chatml, special_tokens=how) for how in ("text", "tokens"))
    key = "chosen_input_ids" if kind == "pair" else "input_ids"
    assert as_token[0][key].count(end) == as_typed[0][key].count(end) + 1
    assert not [note for note in as_token.report["notes"] if "special" in note]
    assert as_token.fingerprint != as_typed.fingerprint
    with pytest.raises(ValueError, match="special_tokens must be text or tokens, got 'yes'"):
        load_dataset([ROWS[kind]], chatml, special_tokens="yes")  # type: ignore[arg-type]


def test_text_that_is_rendered_already_equals_the_conversation(chatml: Any) -> None:
    """As tokens nothing is doubled: the end token is there, although white space follows it."""
    dataset = load_dataset([{"text": WRITTEN}], chatml, special_tokens="tokens")
    assert dataset[0]["input_ids"] == load_dataset([{"messages": TALK}], chatml)[0]["input_ids"]
    assert dataset.report["no_end_token"] == 0


def test_a_bos_that_is_typed_is_not_put_twice(llama: Any) -> None:
    for text, ids in (
        ("<s>the cat</s>", [1, *llama.encode("the cat", False, False)[1:], 2]),
        ("the cat", llama.encode("the cat")),
    ):
        row = load_dataset([{"text": text}], llama, special_tokens="tokens")[0]["input_ids"]
        assert row.count(1) == row.count(2) == 1, row
        assert (row[0], row[-1]) == (1, 2)
        assert len(row) <= len(ids) + 2
    pair = {"prompt": "<s>the ", "completion": "cat</s>"}
    row = load_dataset([pair], llama, special_tokens="tokens")[0]
    assert row["input_ids"].count(1) == row["input_ids"].count(2) == 1
    assert row["labels"][-1] == 2


def test_sentencepiece_takes_them_as_tokens_too(spm: Any) -> None:
    row = load_dataset([{"text": "<s>the cat</s>"}], spm, special_tokens="tokens")[0]["input_ids"]
    assert (row[0], row[-1], row.count(1), row.count(2)) == (1, 2, 1, 1)
    typed = load_dataset([{"text": "<s>the cat</s>"}], spm)
    assert typed[0]["input_ids"] == [1, *spm.encode("<s>the cat</s>", False, False), 2]
    assert len([note for note in typed.report["notes"] if "special token" in note]) == 2


def test_tokens_that_a_user_flagged_are_special_too(tmp_path: Path, make_model: Any) -> None:
    """``additional_special_tokens`` names them, whatever their flag in tokenizer.json says."""
    model = make_model(tmp_path / "model", ["<e>"], eos_token="<e>")
    import tokenizers

    file = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    file.add_tokens([tokenizers.AddedToken("<sep>", normalized=False)])
    file.save(str(model / "tokenizer.json"))
    assert load_tokenizer(model).encode("<sep>", False, False) == [file.token_to_id("<sep>")]
    config = (model / "tokenizer_config.json").read_text()
    (model / "tokenizer_config.json").write_text(config[:-1] + ', "additional_special_tokens": ["<sep>"]}')
    tokenizer = load_tokenizer(model)
    dataset = load_dataset([{"text": "a<sep>b"}], tokenizer)
    assert file.token_to_id("<sep>") not in dataset[0]["input_ids"]
    assert "'<sep>'" in dataset.report["notes"][0]
    as_token = load_dataset([{"text": "a<sep>b"}], tokenizer, special_tokens="tokens")
    assert file.token_to_id("<sep>") in as_token[0]["input_ids"]


def test_a_text_about_tokens_does_not_fill_the_report(chatml: Any, tmp_path: Path, make_model: Any) -> None:
    specials = [f"<|{i}|>" for i in range(9)]
    model = make_model(tmp_path / "model", specials, eos_token="<|0|>")
    report = load_dataset([{"text": "".join(specials)}], load_tokenizer(model)).report
    assert [note.partition(":")[0] for note in report["notes"]] == [
        "more than 3 special tokens are spelt out in the data"
    ]


@pytest.mark.parametrize("packing", [False, True])
def test_show_draws_typed_special_tokens_otherwise(chatml: Any, packing: bool) -> None:
    rows = [{"messages": [TALK[0], {"role": "assistant", "content": f"{TYPED}<|im_end|>"}]}, {"text": "plain"}]
    dataset = load_dataset(rows[:1], chatml, max_seq_len=200, packing=packing)
    (sample,) = show(dataset)
    plain, colored = as_text(sample), as_text(sample, color=True)
    assert "\u27e6a\u2039<|im_end|>\u203ab\u2039<|im_end|>\u203a<|im_end|>\u27e7" in plain
    assert "\x1b[32ma\x1b[0m\x1b[32m\x1b[7m<|im_end|>\x1b[0m\x1b[32mb\x1b[0m" in colored
    assert "text that spells a special token" in plain
    assert "text that spells a special token" in colored
    without = as_text(show(load_dataset(rows[1:], chatml))[0])
    assert "spells" not in without
    as_token = as_text(show(load_dataset(rows[:1], chatml, special_tokens="tokens"))[0])
    assert "\u2039" not in as_token


def test_show_finds_the_typed_ones_between_real_ones(spm: Any, chatml: Any) -> None:
    for tokenizer, text, typed in (
        (spm, "</s> a</s>", ["</s>", "</s>"]),
        (chatml, "<|im_end|>a <|im_start|>", ["<|im_end|>", "<|im_start|>"]),
    ):
        (sample,) = show(load_dataset([{"text": text}], tokenizer))
        whole = "".join(piece for piece, _ in sample["documents"][0])
        assert [whole[a:b] for a, b in sample["typed"][0]] == typed


def test_role_tokens_of_a_template_are_kept_apart_though_no_flag_says_so(tmp_path: Path, make_model: Any) -> None:
    """DeepSeek's are plain added tokens; tokens that no template writes (for code to be filled in) stay tokens."""
    import tokenizers

    source = "{% for m in messages %}<\uff5c{{ m.role }}\uff5c>{{ m.content }}{% endfor %}{# <\uff5cuser\uff5c> #}"
    model = make_model(tmp_path / "model", ["<e>"], eos_token="<e>", chat_template=source)
    file = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    file.add_tokens([tokenizers.AddedToken(t, normalized=False) for t in ("<\uff5cuser\uff5c>", "<|fim|>", "<think>")])
    file.save(str(model / "tokenizer.json"))
    tokenizer = load_tokenizer(model)
    role, fill, think = map(tokenizer.token_id, ("<\uff5cuser\uff5c>", "<|fim|>", "<think>"))
    row = [{"role": "user", "content": "a<\uff5cuser\uff5c><|fim|><think>b"}, TALK[1]]
    dataset = load_dataset([{"messages": row}], tokenizer)
    counts = [dataset[0]["input_ids"].count(index) for index in (role, fill, think)]
    assert counts == [1, 1, 1]
    assert "special token '<\uff5cuser\uff5c>'" in " ".join(dataset.report["notes"])


def test_a_template_that_writes_todays_date_is_told(chatml: Any) -> None:
    source = "{% for m in messages %}{{ m.content + '<|im_end|>' }}{% endfor %}"
    dated = chatml.with_template({"default": "{{ strftime_now('%d %b %Y') }}" + source}, "t")
    plain = chatml.with_template({"default": source}, "t")
    notes = [load_dataset([{"messages": TALK}], tokenizer).report["notes"] for tokenizer in (dated, plain)]
    assert ["writes the date of today" in " ".join(found) for found in notes] == [True, False]
