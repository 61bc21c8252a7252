"""What is dropped by default has a key; what is read in part says so."""

from __future__ import annotations

from collections import deque
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tt_data import MixedDataset, batches, load_dataset, summary_lines

ROWS = [{"prompt": f"the {i} ", "completion": "cat"} for i in range(20)]
BAD = {"prompt": "the ", "completion": ""}


def test_duplicates_are_dropped_within_what_is_given_once(chatml: Any, write_jsonl: Any) -> None:
    one, other = write_jsonl(ROWS + ROWS[:5], "one.jsonl"), write_jsonl(ROWS[10:], "other.jsonl")
    assert load_dataset(one, chatml).report["dropped"] == {"duplicate": 5}
    assert len(load_dataset(one, chatml, drop_duplicates=False)) == 25
    assert load_dataset([one, other], chatml).report["dropped"] == {"duplicate": 15}
    twice = load_dataset([one, other, one], chatml)
    assert (len(twice), twice.report["dropped"]) == (40, {"duplicate": 20})
    assert [twice[i] for i in range(20)] == [twice[i] for i in range(20, 40)]


@pytest.mark.parametrize("packing", [False, True])
def test_too_many_bad_rows_stop_unless_told(chatml: Any, tmp_path: Path, packing: bool) -> None:
    options: dict[str, Any] = {"packing": packing, "max_seq_len": 64, "max_dropped_share": 0.1}
    for bad, fits in ((2, True), (3, False)):
        rows = ROWS + [BAD] * bad
        if fits:
            assert load_dataset(rows, chatml, **options).report["dropped"] == {"empty": bad}
        else:
            with pytest.raises(ValueError, match=r"rows: 3 of 23 rows cannot be used \(3 empty\), max_dropped_share "
                               r"allows 10%: rows:20: .*; fix the rows, or set max_dropped_share=1"):  # fmt: skip
                load_dataset(rows, chatml, **options)
        assert load_dataset(rows, chatml, **{**options, "max_dropped_share": 1})
        assert load_dataset(rows, chatml, **{**options, "max_dropped_share": None})
    assert len(load_dataset(ROWS + ROWS * 3, chatml, max_dropped_share=0.1)) == 20  # duplicates are not bad rows
    with pytest.raises(ValueError, match="max_dropped_share must be between 0 and 1, got 10"):
        load_dataset(ROWS, chatml, max_dropped_share=10)


def test_the_share_is_judged_behind_the_cache_and_does_not_change_it(chatml: Any, tmp_path: Path) -> None:
    rows = ROWS + [BAD] * 5
    free = load_dataset(rows, chatml, cache_dir=tmp_path)
    with pytest.raises(ValueError, match="5 of 25 rows cannot be used"):
        load_dataset(rows, chatml, cache_dir=tmp_path, max_dropped_share=0.1)
    assert load_dataset(rows, chatml, max_dropped_share=0.5).fingerprint == free.fingerprint
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_with_too_many_bad_rows_stops_once_that_is_certain(
    chatml: Any, packing: bool, num_workers: int
) -> None:
    rows = [BAD if i % 5 == 0 else {"prompt": f"{i} ", "completion": "cat"} for i in range(1000)]
    options: dict[str, Any] = {"streaming": True, "buffer": 50, "packing": packing, "max_seq_len": 64}
    stream = batches(
        load_dataset(rows, chatml, **options, max_dropped_share=0.1), batch_size=4, num_workers=num_workers
    )
    with pytest.raises(ValueError, match="rows cannot be used"):
        deque(islice(stream, 300), maxlen=0)
    stream = batches(
        load_dataset(rows, chatml, **options, max_dropped_share=0.3), batch_size=4, num_workers=num_workers
    )
    assert len(list(islice(stream, 100))) == 100


def test_a_short_stream_is_judged_once_all_of_it_was_read(chatml: Any) -> None:
    options: dict[str, Any] = {"streaming": True, "max_seq_len": 64}
    for share, fits in ((0.1, False), (0.2, True)):
        stream = batches(load_dataset(ROWS + [BAD] * 4, chatml, **options, max_dropped_share=share), batch_size=4)
        if fits:
            assert len(list(islice(stream, 12))) == 12
        else:
            with pytest.raises(ValueError, match="4 of 24 rows cannot be used"):
                deque(islice(stream, 12), maxlen=0)


def test_a_limit_reads_no_further_and_says_so(chatml: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": ""}\n{"text": "b"}\n{"text": "c"}\n{broken\n')
    with pytest.raises(ValueError, match=r"rows.jsonl:5:2: broken JSON"):
        load_dataset(path, chatml)
    dataset = load_dataset(path, chatml, limit=2)
    assert [dataset.where(i) for i in range(len(dataset))] == [f"{path}:1", f"{path}:3"]
    assert summary_lines(dataset.report)[0] == "2 text rows (first 3 rows read); dropped: 1 empty; truncated: 0"
    (tmp_path / "more.jsonl").write_text('{"text": "d"}\n')
    more = load_dataset([tmp_path / "more.jsonl", path], chatml, limit=1)
    assert (len(more), more.report["partial"]) == (1, True)
    for limit in (1, 2):
        assert "partial" not in load_dataset(tmp_path / "more.jsonl", chatml, limit=limit).report
    mixed = load_dataset({tmp_path / "more.jsonl": 1, path: 1}, chatml, limit=1)
    assert isinstance(mixed, MixedDataset)
    assert mixed.report["partial"]
    for wrong in ({"limit": 0}, {"limit": 1, "packing": True, "max_seq_len": 8}):
        with pytest.raises(ValueError, match="limit must be at least 1 and not with packing"):
            load_dataset(path, chatml, **wrong)


def test_one_ambiguous_row_is_a_bad_row(chatml: Any, make_chat_rows: Any) -> None:
    """The template writes longer conversations backwards."""
    order = "(messages|reverse if messages|length > 2 else messages)"
    source = f"{{% for m in {order} %}}{{{{ m.content + '<|im_end|>' }}}}{{% endfor %}}"
    tokenizer = chatml.with_template({"default": source}, "backwards")
    report = load_dataset([*make_chat_rows(5), *make_chat_rows(1, turns=2)], tokenizer).report
    assert (report["rows"], report["dropped"]) == (5, {"ambiguous template": 1})


def test_a_template_that_refuses_the_system_message_says_the_cure(chatml: Any) -> None:
    turns = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    prompt = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    tokenizer = chatml.with_template({"default": refuses + turns + prompt}, "gemma-like")
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    system = {"role": "system", "content": "s"}
    pair = {"chosen": [system, *chat], "rejected": [system, chat[0], {"role": "assistant", "content": "c"}]}
    good: list[dict[str, Any]] = [{"messages": chat}, {"chosen": chat, "rejected": pair["rejected"][1:]}]
    for kept, row in zip(good, ({"messages": [system, *chat]}, pair), strict=True):
        report = load_dataset([kept, row], tokenizer).report
        assert report["dropped"] == {"system message refused": 1}
        assert "System role not supported; this template takes no system message: put its text" in report["problems"][0]
