"""Preference rows: two answers to one prompt, or one answer and a judgement."""

from __future__ import annotations

from typing import Any

import pytest

from tt_data import batches, load_dataset

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
        text = {"prompt": "hello ", "chosen": "the cat", "rejected": "a mat"}
        judged = {"prompt": "hello ", "completion": "the cat", "label": True}
        for plain in (text, judged):
            assert load_dataset([plain], chatml, train_on=train_on).documents(0)[0] == [
                ("hello", False), (" the cat<|im_end|>", True),
            ]  # fmt: skip


def test_unpaired_rows_say_what_was_wanted(chatml: Any) -> None:
    row = {"prompt": CHAT[:1], "completion": CHAT[1:], "label": True}
    rows = [row, {**row, "prompt": "text", "label": False}]
    dataset = load_dataset(rows, chatml)
    assert [dataset[i]["desirable"] for i in (0, 1)] == [True, False]
    assert [text for text, flag in dataset.rendered(0) if flag] == ["the cat<|im_end|>"]


ASKED = "<|im_start|>user\nHow much is two and two?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("columns", [
    {"question": "How much is two and two?"},
    {"query": "How much is two and two?"},
    {"instruction": "How much is two and two?", "input": ""},
    {"instruction": "How much is", "input": "two and two?"},
    {"input": "How much is two and two?"},
    {"prompt": [{"role": "user", "content": "How much is two and two?"}]},
    {"conversations": [{"from": "human", "value": "How much is two and two?"}]},
    {"system": "", "prompt": "How much is two and two?"},
])  # fmt: skip
def test_the_prompt_of_a_pair_is_found_under_its_other_names(chatml: Any, columns: dict[str, Any]) -> None:
    row = {**columns, "chosen": "It is four.", "rejected": "It is five."}
    dataset = load_dataset([row, {**row, "system": "Be brief."}], chatml)
    asked = ASKED.replace("is two and", "is\n\ntwo and") if columns.get("input", "")[:3] == "two" else ASKED
    for side, answer in zip(dataset.documents(0), ("It is four.", "It is five."), strict=True):
        assert side == [(asked, False), (ANSWER.format(answer), True), ("\n", False)]
    for side in dataset.documents(1):
        assert side[0] == ("<|im_start|>system\nBe brief.<|im_end|>\n" + asked, False)
    assert dataset.report["notes"] == []


def test_a_question_is_plain_text_for_a_model_without_a_template(llama: Any) -> None:
    dataset = load_dataset([{"question": "hello ", "chosen": "the cat", "rejected": "a mat"}], llama)
    assert [pieces[1] for pieces in dataset.documents(0)] == [(" the cat</s>", True), (" a mat</s>", True)]
    row = {"instruction": "hello", "input": "", "chosen": "the cat", "rejected": "a mat"}
    alpaca = load_dataset([row], llama)
    assert "### Instruction:\nhello\n" in "".join(text for text, _ in alpaca.documents(0)[1])


def test_no_prompt_is_guessed_beside_other_text(chatml: Any) -> None:
    row = {"chosen": "It is four.", "rejected": "It is five."}
    report = load_dataset([{**row, "prompt": "a "}, {**row, "problem": "Two and two?"}], chatml).report
    assert report["dropped"] == {"no prompt": 1}
    assert "columns={'prompt': 'problem'}" in report["problems"][0]
    assert len(load_dataset([{**row, "score": 5, "note": ""}], chatml)) == 1
    marked = {"chosen": "\n\nHuman: a\n\nAssistant: b c", "rejected": "\n\nHuman: a\n\nAssistant: b d"}
    assert len(load_dataset([{**marked, "source": "hh"}], chatml)) == 1  # the marker says where the prompt ends


def chat(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def test_a_pair_gives_loss_from_its_first_difference_on(chatml: Any) -> None:
    row = {
        "chosen": chat("a", "same", "b", "red", "sure?", "yes"),
        "rejected": chat("a", "same", "b", "blue", "sure?", "no"),
    }
    sides = load_dataset([row], chatml).documents(0)
    assert [[text for text, on in side if on] for side in sides] == [
        ["red<|im_end|>", "yes<|im_end|>"], ["blue<|im_end|>", "no<|im_end|>"],
    ]  # fmt: skip
    late = {"chosen": chat("a", "same", "b", "red"), "rejected": chat("a", "same", "b", "blue")}
    assert [[text for text, on in side if on] for side in load_dataset([late], chatml).documents(0)] == [
        ["red<|im_end|>"], ["blue<|im_end|>"],
    ]  # fmt: skip


@pytest.mark.parametrize(("chosen", "rejected"), [
    (chat("one?", "red"), chat("two?", "blue")),
    (chat("a", "red", "b", "yes"), chat("a", "blue", "c", "no")),
    (chat("a", "red", "b", "yes"), chat("a", "blue")),
    ([{"role": "system", "content": "s"}, *chat("a", "red")], chat("a", "blue")),
])  # fmt: skip
def test_two_prompts_are_not_a_pair(chatml: Any, chosen: Any, rejected: Any) -> None:
    good = {"chosen": chat("a", "b"), "rejected": chat("a", "c")}
    report = load_dataset([good, {"chosen": chosen, "rejected": rejected}], chatml).report
    assert report["dropped"] == {"not a pair": 1}
    assert "rows:1: chosen and rejected differ in the prompt (from message" in report["problems"][0]


def test_both_sides_of_a_text_pair_are_masked_alike(chatml: Any) -> None:
    """A token that holds the prompt's last letter and the answer's first makes both answers begin before it."""
    rows = [
        {"prompt": "sat on the c", "chosen": "at", "rejected": "zz"},
        {"prompt": "a c", "chosen": "zz", "rejected": "at"},
    ]
    dataset = load_dataset(rows, chatml)
    for row in dataset:
        masked = [
            [i for i, label in zip(row[f"{side}_input_ids"], row[f"{side}_labels"], strict=True) if label == -100]
            for side in ("chosen", "rejected")
        ]
        assert masked[0] == masked[1]
    assert dataset.documents(0)[0][1][0].strip().startswith("cat")


def test_both_sides_are_the_ids_of_their_whole_text(llama: Any, chatml: Any) -> None:
    """One bos, and no token that a cut between the prompt and the answer would have made."""
    for tokenizer in (llama, chatml):
        for prompt, *answers in (("hello c", "at mat", "up"), ("", "the cat", "a mat"), ("how are you", " fine", ".")):
            (row,) = load_dataset([{"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}], tokenizer)
            for side, answer in zip(("chosen", "rejected"), answers, strict=True):
                assert row[f"{side}_input_ids"] == tokenizer.encode(prompt + answer)


def test_a_cut_keeps_the_prompt_that_both_answers_share(chatml: Any) -> None:
    pair = {"prompt": "how are you ", "chosen": "the cat sat on a mat", "rejected": "fine and hello world you"}
    whole, cut = load_dataset([pair], chatml)[0], load_dataset([pair], chatml, max_seq_len=8)[0]
    for key in whole:
        assert cut[key] == whole[key][:8] != whole[key]
    prompts = [cut[f"{side}_input_ids"][: cut[f"{side}_labels"].count(-100)] for side in ("chosen", "rejected")]
    assert prompts[0] == prompts[1] != []


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_a_pair_that_a_cut_leaves_no_answer_or_no_difference_is_dropped(
    chatml: Any, packing: bool, streaming: bool
) -> None:
    good = {"prompt": "a ", "chosen": "b", "rejected": "c"}
    no_answer = {"prompt": "how are you " * 4, "chosen": "the cat", "rejected": "a mat"}
    one_answer = {"prompt": "how are you " * 2 + "a ", "chosen": "the cat sat " * 9, "rejected": ""}
    same = {"prompt": "a ", "chosen": "the cat sat on a mat and hello", "rejected": "the cat sat on a mat and world"}
    dataset = load_dataset(
        [good, no_answer, same, one_answer], chatml, max_seq_len=8, packing=packing, streaming=streaming
    )
    batch = next(batches(dataset, batch_size=4))
    assert int(batch["answer_ids"].max()) == 1
    report = dataset.report
    assert (report["rows"], report["dropped"]) == (1, {"no trainable token": 1, "equal answers": 1, "empty": 1})
    assert "chosen and rejected differ only behind max_seq_len 8" in " ".join(report["problems"])


def test_a_prompt_that_the_answers_do_not_hold_is_told(chatml: Any) -> None:
    row = {"prompt": "another", "chosen": chat("a", "b"), "rejected": chat("a", "c")}
    (note,) = load_dataset([row], chatml).report["notes"][:1]
    assert "the prompt is not read" in note
    system = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
    kept = load_dataset([{**row, "prompt": system}], chatml)
    assert kept.documents(0)[0][0][0].startswith("<|im_start|>system\ns<|im_end|>")
    assert kept.report["notes"] == []


@pytest.mark.parametrize("column", ["label", "kto_tag"])
def test_turns_with_a_boolean_label_are_judged(chatml: Any, column: str) -> None:
    """Trained as they are, they would teach the answers that nobody wanted."""
    rows = [{"messages": chat("a", "b", "c", f"{i}"), column: bool(i % 2)} for i in range(4)]
    dataset = load_dataset(rows, chatml)
    assert (dataset.schema, dataset.kind) == ("unpaired_preference", "judged")
    assert [row["desirable"] for row in dataset] == [False, True, False, True]
    assert [text for text, on in dataset.rendered(1) if on] == ["1<|im_end|>"]
    assert dataset.report["notes"] == []
    assert load_dataset(rows, chatml, schema="openai").kind == "single"
    numbers = load_dataset([{"messages": chat("a", "b"), column: 3}], chatml)
    assert (numbers.schema, numbers.kind) == ("openai", "single")
    assert f"'{column}' (1 row)" in numbers.report["notes"][0]


def test_answers_that_differ_only_in_what_the_template_leaves_out_are_no_pair(chatml: Any) -> None:
    answers = {
        side: [{"role": "assistant", "content": "cat", "reasoning_content": side}] for side in ("chosen", "rejected")
    }
    with pytest.raises(ValueError, match="1 equal answers.*the chat template drops what differs"):
        load_dataset([{"prompt": [{"role": "user", "content": "hello"}], **answers}], chatml)
