"""The named data sets: their prompts to the byte, and torchtune 0.1.0's defects, which must be absent."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

import tt_data
from tt_data import (
    DATASETS,
    NamedDataset,
    alpaca_cleaned_dataset,
    alpaca_dataset,
    chat_dataset,
    grammar_dataset,
    instruct_dataset,
    load_dataset,
    preference_dataset,
    register_dataset,
    samsum_dataset,
    slimorca_dataset,
    stack_exchange_paired_dataset,
)
from tt_data.rows.schemas import known_columns

ALPACA = [
    {"instruction": "Sort", "input": "b a", "output": "a b"},
    {"instruction": "Say hi", "input": "", "output": "hi"},
]


def text_of(tokenizer: Any, row: dict[str, list[int]], side: str = "") -> str:
    return str(tokenizer.decode(row[f"{side}input_ids"]))


def trained_of(tokenizer: Any, row: dict[str, list[int]], side: str = "") -> str:
    return str(tokenizer.decode([label for label in row[f"{side}labels"] if label != -100]))


def test_alpaca_prompts_to_the_byte(spm: Any) -> None:
    dataset = alpaca_dataset(spm, source=ALPACA)
    assert text_of(spm, dataset[0]) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nSort\n\n### Input:\nb a\n\n"
        "### Response:\na b"
    )
    assert text_of(spm, dataset[1]) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay hi\n\n### Response:\nhi"
    )
    for row in (dataset[0], dataset[1]):
        assert row["input_ids"] == spm.encode(text_of(spm, row))
        assert row["labels"] == row["input_ids"]  # train_on_input is on by default


def test_train_on_input_masks_the_prompt(spm: Any) -> None:
    dataset = alpaca_cleaned_dataset(spm, source=ALPACA, train_on_input=False)
    assert [trained_of(spm, dataset[i]) for i in (0, 1)] == ["a b", "hi"]
    assert dataset[0]["labels"][-1] == spm.eos_id


def test_defaults_of_the_named_data_sets() -> None:
    """torchtune's defaults (CHECKLIST 1.6)."""
    defaults = {
        alpaca_dataset: {"source": "tatsu-lab/alpaca", "train_on_input": True, "max_seq_len": 512},
        alpaca_cleaned_dataset: {"source": "yahma/alpaca-cleaned", "train_on_input": True, "max_seq_len": 512},
        grammar_dataset: {"source": "liweili/c4_200m", "train_on_input": False, "max_seq_len": None},
        samsum_dataset: {"source": "Samsung/samsum", "train_on_input": False, "max_seq_len": None},
        slimorca_dataset: {"source": "Open-Orca/SlimOrca-Dedup", "train_on_input": False, "max_seq_len": 1024},
        stack_exchange_paired_dataset: {"source": "lvwerra/stack-exchange-paired", "max_seq_len": 1024},
    }
    for function, expected in defaults.items():
        parameters = inspect.signature(function).parameters
        assert {name: parameters[name].default for name in expected} == expected


def test_grammar_samsum_and_stack_exchange_prompts_to_the_byte(spm: Any) -> None:
    grammar = grammar_dataset(spm, source=[{"input": "he go", "output": "he goes"}])
    assert text_of(spm, grammar[0]) == "Correct this to standard English: he go\n---\nCorrected: he goes"
    assert trained_of(spm, grammar[0]).strip() == "he goes"
    samsum = samsum_dataset(spm, source=[{"dialogue": "A: hi\nB: ho", "summary": "they greet"}])
    assert text_of(spm, samsum[0]) == "Summarize this dialogue:\nA: hi\nB: ho\n---\nSummary:\nthey greet"
    assert trained_of(spm, samsum[0]) == "they greet"
    row = {"question": "why", "response_j": "because", "response_k": "no"}
    stack = stack_exchange_paired_dataset(spm, source=[row])
    assert text_of(spm, stack[0], "chosen_") == "Question: why\n\nAnswer: because"
    assert text_of(spm, stack[0], "rejected_") == "Question: why\n\nAnswer: no"
    assert [trained_of(spm, stack[0], side).strip() for side in ("chosen_", "rejected_")] == ["because", "no"]


def test_column_map_names_other_columns(spm: Any) -> None:
    dataset = samsum_dataset(
        spm, source=[{"talk": "a", "gist": "b"}], column_map={"dialogue": "talk", "output": "gist"}
    )
    assert text_of(spm, dataset[0]) == "Summarize this dialogue:\na\n---\nSummary:\nb"


SHAREGPT = {
    "conversations": [
        {"from": "system", "value": "be nice"}, {"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"},
        {"from": "human", "value": "and"}, {"from": "gpt", "value": "fine"},
    ]
}  # fmt: skip


def test_slimorca_writes_the_system_text_once(spm: Any) -> None:
    """DEFECT: torchtune repeats it in every user turn."""
    row = slimorca_dataset(spm, source=[SHAREGPT])[0]
    first = spm.encode("[INST] <<SYS>>\nbe nice\n<</SYS>>\n\nhello [/INST]", add_eos=False)
    assert row["input_ids"][: len(first)] == first
    assert text_of(spm, row).count("be nice") == 1
    assert "[INST] and [/INST]" in text_of(spm, row)
    assert row["input_ids"].count(spm.bos_id) == row["input_ids"].count(spm.eos_id) == 2
    assert trained_of(spm, row).split() == ["hi", "fine"] or trained_of(spm, row) == "hifine"
    whole = slimorca_dataset(spm, source=[SHAREGPT], train_on_input=True)[0]
    assert whole["labels"] == whole["input_ids"]


def test_slimorca_needs_four_tokens(spm: Any) -> None:
    with pytest.raises(ValueError, match="max_seq_len must be at least 4 for slimorca, got 3"):
        slimorca_dataset(spm, source=[SHAREGPT], max_seq_len=3)


@pytest.mark.parametrize("format_name", ["llama2", "mistral", "chatml"])
def test_chat_formats_are_plain_text_around_each_turn(spm: Any, format_name: str) -> None:
    turns = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]}
    row = chat_dataset(spm, source=[turns], conversation_style="openai", chat_format=format_name)[0]
    expected = {
        "llama2": "[INST] hello [/INST]hi",
        "mistral": "[INST] hello [/INST]hi",
        "chatml": "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nhi<|im_end|>",
    }
    assert text_of(spm, row).replace("] hi", "]hi").replace("\n <|", "\n<|") == expected[format_name]


def test_chat_without_a_format_takes_the_models_template(chatml: Any) -> None:
    dataset = chat_dataset(chatml, source=[SHAREGPT])
    assert "<|im_start|>system\nbe nice<|im_end|>" in "".join(text for text, _ in dataset.rendered(0))
    assert dataset[0] == load_dataset([SHAREGPT], chatml)[0]


def test_a_system_message_is_an_error_for_mistral(spm: Any) -> None:
    with pytest.raises(ValueError, match="the Mistral format has no system message, found one at message 0"):
        chat_dataset(spm, source=[SHAREGPT], chat_format="mistral")


def test_unknown_names_are_refused_with_the_nearest(spm: Any) -> None:
    with pytest.raises(ValueError, match="conversation_style must be sharegpt or openai, got 'sharegtp'"):
        chat_dataset(spm, source=[SHAREGPT], conversation_style="sharegtp")
    with pytest.raises(ValueError, match="unknown chat format 'llama'.*did you mean 'llama2'"):
        chat_dataset(spm, source=[SHAREGPT], chat_format="llama")
    with pytest.raises(ValueError, match="unknown instruct template 'alpacca'.*did you mean 'alpaca'"):
        instruct_dataset(spm, source=ALPACA, template="alpacca")


def test_a_transform_changes_each_row_first(spm: Any) -> None:
    dataset = instruct_dataset(
        spm, source=[{"q": "Sort", "a": "b"}], template="alpaca",
        transform=lambda row: {"instruction": row["q"] + "!", "output": row["a"]},
    )  # fmt: skip
    assert "### Instruction:\nSort!\n" in text_of(spm, dataset[0])


def test_a_cut_row_keeps_its_start_and_learns_no_end(spm: Any) -> None:
    """DEFECT: torchtune overwrites the last token with eos, even where nothing was cut."""
    full = alpaca_dataset(spm, source=ALPACA)[0]
    for limit in (len(full["input_ids"]) - 1, 30):
        row = alpaca_dataset(spm, source=ALPACA, max_seq_len=limit)[0]
        assert row["input_ids"] == full["input_ids"][:limit]
        assert spm.eos_id not in row["input_ids"]
    same = alpaca_dataset(spm, source=ALPACA, max_seq_len=len(full["input_ids"]))[0]
    assert same == full


def test_preference_rows_are_measured_in_tokens(chatml: Any) -> None:
    """DEFECT: torchtune drops rows of more characters than max_seq_len, and fails without one or a column map."""
    row = {"question": "the cat " * 30, "response_j": "sat", "response_k": "mat"}
    assert len(row["question"]) > 200
    kept = stack_exchange_paired_dataset(chatml, source=[row], max_seq_len=200)
    assert len(kept) == 1
    assert kept.report["truncated"] == 0
    assert len(stack_exchange_paired_dataset(chatml, source=[row], max_seq_len=None)) == 1
    plain = preference_dataset(
        chatml, source=[{"prompt": "a", "chosen": "b", "rejected": "c"}], template="stack_exchange_paired"
    )
    assert len(plain) == 1
    with pytest.raises(ValueError, match="no trainable token at max_seq_len 20"):
        stack_exchange_paired_dataset(chatml, source=[row], max_seq_len=20)


def test_options_reach_the_loader(spm: Any, tmp_path: Path) -> None:
    packed = alpaca_dataset(spm, source=ALPACA, packing=True)
    assert "position_ids" in packed[0]
    streamed = alpaca_dataset(spm, source=ALPACA, streaming=True)
    assert streamed.count_rows() == 2
    alpaca_dataset(spm, source=ALPACA * 2, drop_duplicates=False, on_bad_row="error")
    with pytest.raises(ValueError, match="duplicate"):
        alpaca_dataset(spm, source=ALPACA * 2, on_bad_row="error")


def test_labels_are_plain_integers(spm: Any) -> None:
    """DEFECT: torchtune's are numpy objects."""
    assert {type(label) for label in alpaca_dataset(spm, source=ALPACA)[0]["labels"]} == {int}


def test_registered_names_are_sources(spm: Any, chatml: Any, write_jsonl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tt_data.rows.sources.DATASETS", DATASETS)
    path = write_jsonl([{"dialogue": "A: hi", "summary": "a greeting"}])
    for name in list(DATASETS):
        assert set(DATASETS[name].columns) <= {*known_columns(), "sentence", "dialogue"}
    register_dataset("mine", NamedDataset(str(path), {"output": "summary"}, "summarize", split=None))
    try:
        for tokenizer in (spm, chatml):
            dataset = load_dataset("mine", tokenizer)
            assert dataset.report["schema"] == "instruct:summarize"
            assert "Summarize this dialogue:\nA: hi\n" in "".join(text for text, _ in dataset.rendered(0))
        assert load_dataset("mine", spm, streaming=True).schema == "instruct:summarize"
        mixed = load_dataset({"mine": 1, path: 1}, spm, columns={"completion": "summary", "prompt": "dialogue"})
        assert len(mixed) == 2
    finally:
        del DATASETS["mine"]


def test_every_name_of_the_checklist_is_there() -> None:
    names = (
        "Message validate_messages InstructTemplate AlpacaInstructTemplate GrammarErrorCorrectionTemplate "
        "SummarizeTemplate StackExchangedPairedTemplate Llama2ChatFormat MistralChatFormat ChatMLFormat "
        "instruct_dataset chat_dataset preference_dataset alpaca_dataset alpaca_cleaned_dataset "
        "grammar_dataset samsum_dataset slimorca_dataset stack_exchanged_paired_dataset padded_collate "
        "padded_collate_dpo load_tokenizer load_dataset rows_at batches"
    )
    assert set(names.split()) <= set(tt_data.__all__)
    assert all(hasattr(tt_data, name) for name in tt_data.__all__)
