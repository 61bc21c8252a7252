"""Preference rows: two answers to one prompt, or one answer and a judgement."""

from __future__ import annotations

from typing import Any

from tt_data import load_dataset

USER, ANSWER = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "{}<|im_end|>"
CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the cat"}]
PAIR = {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": [{"role": "assistant", "content": "a mat"}]}


def test_preference_rows_give_both_answers(chatml: Any, llama: Any) -> None:
    forms = [
        PAIR,
        {"prompt": "hello", "chosen": CHAT[1:], "rejected": [{"role": "assistant", "content": "a mat"}]},
        {"chosen": CHAT, "rejected": [CHAT[0], {"role": "assistant", "content": "a mat"}]},
        {"prompt": "hello", "chosen": CHAT, "rejected": [CHAT[0], {"role": "assistant", "content": "a mat"}]},
        {"prompt": CHAT[:1], "chosen": CHAT, "rejected": [CHAT[0], {"role": "assistant", "content": "a mat"}]},
    ]
    for form in forms:
        dataset = load_dataset([form], chatml)
        row = dataset[0]
        assert set(row) == {"chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels"}
        assert dataset.documents(0) == [
            [(USER.format("hello"), False), (ANSWER.format(answer), True), ("\n", False)]
            for answer in ("the cat", "a mat")
        ]
    strings = load_dataset([{"prompt": "hello ", "chosen": "the cat", "rejected": "a mat"}], llama)
    assert [pieces[1] for pieces in strings.documents(0)] == [(" the cat</s>", True), (" a mat</s>", True)]
    implicit = load_dataset([{"chosen": "hello the cat", "rejected": "hello the mat"}], llama)
    assert [pieces[1][0].strip() for pieces in implicit.documents(0)] == ["cat</s>", "mat</s>"]
    marked = {"chosen": "\n\nHuman: a\n\nAssistant: b c", "rejected": "\n\nHuman: a\n\nAssistant: b d"}
    assert load_dataset([marked], llama).documents(0)[0][1] == (" b c</s>", True)


def test_preference_labels_are_the_last_answer_whatever_train_on_says(chatml: Any) -> None:
    turns = [*CHAT, {"role": "user", "content": "and"}]
    row = {"prompt": turns, "chosen": CHAT[1:], "rejected": [{"role": "assistant", "content": "no"}]}
    for train_on in ("assistant", "last", "all"):
        texts = [
            [text for text, flag in side if flag]
            for side in load_dataset([row], chatml, train_on=train_on).documents(0)
        ]
        assert texts == [["the cat<|im_end|>"], ["no<|im_end|>"]]


def test_unpaired_rows_say_what_was_wanted(chatml: Any) -> None:
    row = {"prompt": CHAT[:1], "completion": CHAT[1:], "label": True}
    rows = [row, {**row, "prompt": "text", "label": False}]
    dataset = load_dataset(rows, chatml)
    assert [dataset[i]["desirable"] for i in (0, 1)] == [True, False]
    assert [text for text, flag in dataset.rendered(0) if flag] == ["the cat<|im_end|>"]
