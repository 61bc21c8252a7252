"""Looking at a data set."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tt_data import as_text, load_dataset, show, stats, stats_as_text

CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the cat\tsat"}]


def test_samples_are_plain_data(chatml: Any, make_chat_rows: Any) -> None:
    dataset = load_dataset(make_chat_rows(5), chatml)
    samples = show(dataset, limit=2)
    assert [sample["index"] for sample in samples] == [0, 1]
    assert [sample["index"] for sample in show(dataset, rows=[3, 1])] == [3, 1]
    assert len(show(dataset, limit=99)) == 5
    sample = samples[0]
    assert sample["where"] == "rows:0"
    assert sample["tokens"] == len(dataset[0]["input_ids"])
    assert sample["trained"] == sum(label != -100 for label in dataset[0]["labels"])
    assert sample["documents"] == [dataset.rendered(0)]
    assert json.loads(json.dumps(samples))[0]["documents"][0][0] == list(dataset.rendered(0)[0])


def test_trained_text_is_marked_in_colour_or_without(chatml: Any) -> None:
    dataset = load_dataset([{"messages": CHAT}], chatml, max_seq_len=14)
    (sample,) = show(dataset)
    plain, colored = as_text(sample), as_text(sample, color=True)
    assert "\u27e6the cat\tsat" in plain
    assert "\x1b" not in plain
    assert "\x1b[32mthe cat" in colored
    assert "\u27e6" not in colored
    assert "cut at max_seq_len" in plain
    assert "cut" not in as_text(show(load_dataset([{"messages": CHAT}], chatml))[0]).partition("\n")[0]


def test_text_from_rows_cannot_control_the_terminal(chatml: Any) -> None:
    (sample,) = show(load_dataset([{"text": "a\x1b[2Jb\rc\x07"}], chatml))
    assert "\x1b" not in as_text(sample)
    assert "a\\x1b[2Jb\\rc\\x07" in as_text(sample)


def test_colour_ends_with_every_line(chatml: Any) -> None:
    (sample,) = show(load_dataset([{"text": "one\n\ntwo"}], chatml))
    assert "\x1b[32mone\x1b[0m\n\n\x1b[32mtwo" in as_text(sample, color=True)


def test_packs_show_where_documents_begin(chatml: Any, make_chat_rows: Any) -> None:
    dataset = load_dataset(make_chat_rows(6), chatml, max_seq_len=100, packing=True)
    (sample,) = show(dataset, limit=1)
    members = dataset.members(0)
    assert sample["names"] == [dataset.rows.where(row) for row in members]
    lines = as_text(sample).split("\n")
    assert lines[0].startswith(f"[0] {len(members)} documents: {dataset.length(0)} tokens")
    assert [line for line in lines if line.startswith("--- ")] == [f"--- {name} ---" for name in sample["names"]]


def test_preferences_show_which_answer_is_which(chatml: Any) -> None:
    pairs = [{"prompt": "the", "chosen": f"cat{i}", "rejected": "dog"} for i in range(3)]
    text = as_text(show(load_dataset(pairs, chatml), limit=1)[0])
    assert text.index("--- rows:0 chosen ---") < text.index("cat0") < text.index("--- rows:0 rejected ---")
    assert text.startswith("[0] rows:0: ")
    packed = load_dataset(pairs, chatml, max_seq_len=64, packing=True)
    assert len(show(packed)[0]["names"]) == 2 * len(packed.members(0))


def test_statistics_count_tokens(chatml: Any) -> None:
    rows = [{"prompt": "the cat " * i, "completion": "fine"} for i in range(1, 101)] + [
        {"prompt": "a", "completion": ""}
    ]
    dataset = load_dataset(rows, chatml, max_seq_len=150)
    lengths = sorted(len(dataset[i]["input_ids"]) for i in range(len(dataset)))
    found = stats(dataset, bins=4)
    assert found["tokens"] == sum(lengths)
    assert found["trained_tokens"] == sum(label != -100 for row in dataset for label in row["labels"])
    assert found["share_trained"] == round(found["trained_tokens"] / found["tokens"], 4)
    assert found["lengths"]["min"] == lengths[0]
    assert found["lengths"]["max"] == lengths[-1]
    assert found["lengths"]["p50"] == lengths[len(lengths) // 2]
    assert sum(part["count"] for part in found["lengths"]["histogram"]) == len(dataset)
    assert len(found["lengths"]["histogram"]) <= 4
    for part in found["lengths"]["histogram"]:
        assert part["count"] == sum(part["from"] <= length < part["to"] for length in lengths)
    assert found["dropped"] == dataset.report["dropped"]
    assert json.dumps(found)
    every_third = stats(dataset, sample=len(dataset) // 3)
    assert sum(part["count"] for part in every_third["lengths"]["histogram"]) <= len(dataset) // 3
    assert every_third["tokens"] == sum(len(dataset[i]["input_ids"]) for i in range(0, len(dataset), 4))
    for wrong in ({"bins": 0}, {"sample": 0}):
        with pytest.raises(ValueError, match="bins and sample must be positive"):
            stats(dataset, **wrong)


def test_statistics_of_packs_tell_the_efficiency(chatml: Any, make_chat_rows: Any) -> None:
    dataset = load_dataset(make_chat_rows(40), chatml, max_seq_len=100, packing=True)
    assert stats(dataset)["efficiency"] == pytest.approx(stats(dataset)["lengths"]["mean"] / 100, abs=1e-3)


def test_statistics_are_shown_with_bars(chatml: Any, make_chat_rows: Any) -> None:
    rows = [*make_chat_rows(40), {"messages": []}]
    figures = stats(load_dataset(rows, chatml, max_seq_len=100, packing=True), bins=3)
    lines = stats_as_text(figures).split("\n")
    bars = [line for line in lines if "\u2588" in line]
    assert [int(line.split()[-1]) for line in bars] == [
        p["count"] for p in figures["lengths"]["histogram"] if p["count"]
    ]
    assert max(line.count("\u2588") for line in bars) == 40
    assert f"packs    {figures['packs']}, {figures['efficiency']:.1%} full" in lines
    assert lines[-len(figures["problems"]) :] == figures["problems"]
    assert figures["problems"][0].startswith("rows:40: ")


def test_pieces_are_the_whole_text(chatml: Any, spm: Any, make_chat_rows: Any) -> None:
    """Also where sentencepiece's decoder drops the white space that a piece begins with."""
    rows = [{"messages": [*make_chat_rows(1, turns=200)[0]["messages"]]}]
    for tokenizer in (chatml, spm):
        template = None if tokenizer.has_chat_template else "llama2"
        dataset = load_dataset(rows, tokenizer, template=template)
        pieces = dataset.rendered(0)
        assert "".join(text for text, _ in pieces) == tokenizer.decode(dataset[0]["input_ids"], skip_special=False)
        assert sum(trained for _, trained in pieces) == 200
