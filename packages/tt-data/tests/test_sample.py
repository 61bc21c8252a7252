"""A sample of large data: which rows it holds, and what is said of it."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

import tt_data
from tt_data.report import SAMPLE_ENDS, SAMPLE_SPREAD

ROWS = 10_500


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of three words, of which the second and the last one are empty."""
    path = tmp_path_factory.mktemp("large") / "rows.jsonl"
    bad = {1, ROWS - 1}
    path.write_text("".join(json.dumps({"text": "" if i in bad else f"row no {i}"}) + "\n" for i in range(ROWS)))
    return path


def test_a_sample_holds_the_first_rows_the_last_and_others_at_even_distances(
    large: Path, chatml: tt_data.Tokenizer
) -> None:
    rows = tt_data.load_dataset(large, chatml, sample=True)
    lines = [int(rows.where(i).rpartition(":")[2]) for i in range(len(rows))]
    assert len(lines) == 2 * SAMPLE_ENDS + SAMPLE_SPREAD - 2  # but the bad ones
    assert lines[: SAMPLE_ENDS - 1] == [1, *range(3, SAMPLE_ENDS + 1)]
    assert lines[1 - SAMPLE_ENDS :] == [*range(ROWS - SAMPLE_ENDS + 1, ROWS)]
    between = lines[SAMPLE_ENDS - 1 : 1 - SAMPLE_ENDS]
    gaps = {after - before for before, after in pairwise(between)}
    assert gaps == {2, 3}
    assert rows.rendered(2000)[0] == (f"row no {lines[2000] - 1}<|im_end|>", True)


def test_the_report_of_a_sample_says_so_and_names_its_bad_rows(
    large: Path, chatml: tt_data.Tokenizer, tmp_path: Path
) -> None:
    report = tt_data.load_dataset(large, chatml, sample=True).report
    assert (report["read"], report["sampled_from"], report["partial"]) == (4200, ROWS, True)
    assert report["dropped"] == {"empty": 2}
    assert f"a sample: 4,200 of {ROWS:,} rows were read" in tt_data.summary_lines(report)[0]
    assert report["problems"][1].startswith(f"{large}:{ROWS}: ")
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "one more"}\n')
    mix = tt_data.load_dataset({large: 0.5, other: 0.5}, chatml, sample=True)
    assert (mix.report["read"], mix.report["sampled_from"]) == (4201, ROWS + 1)


def test_empty_lines_do_not_count_among_the_rows_that_a_sample_stands_for(
    chatml: tt_data.Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"row no {i}"}) + "\n\n" for i in range(20_000)))
    report = tt_data.load_dataset(path, chatml, sample=True).report
    assert abs(report["sampled_from"] - 20_000) < 100


def test_data_of_few_rows_is_read_whole(large: Path, chatml: tt_data.Tokenizer, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join(large.read_text().splitlines(keepends=True)[:10_000]))
    rows = tt_data.load_dataset(few, chatml, sample=True)
    assert len(rows) == 9_999
    assert not {"sampled_from", "partial", "read"} & rows.report.keys()


def test_a_sample_is_not_kept_in_place_of_all_rows(large: Path, chatml: tt_data.Tokenizer, tmp_path: Path) -> None:
    rows = tt_data.load_dataset(large, chatml, sample=True, cache_dir=tmp_path)
    whole = tt_data.load_dataset(large, chatml, cache_dir=tmp_path)
    assert len(whole) == ROWS - 2
    assert rows.fingerprint != whole.fingerprint


def test_bad_rows_at_the_ends_of_a_sample_alone_do_not_exceed_the_share(
    chatml: tt_data.Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    for bad, refused in ((range(100), False), (range(0, ROWS, 9), True)):
        path.write_text("".join(json.dumps({"text": "" if i in bad else f"row no {i}"}) + "\n" for i in range(ROWS)))
        if refused:
            with pytest.raises(ValueError, match="max_dropped_share allows 1%"):
                tt_data.load_dataset(path, chatml, sample=True, max_dropped_share=0.01)
        else:
            tt_data.load_dataset(path, chatml, sample=True, max_dropped_share=0.01)


def test_a_sample_is_neither_a_stream_nor_limited(large: Path, chatml: tt_data.Tokenizer) -> None:
    for wrong in ({"streaming": True}, {"limit": 3}):
        with pytest.raises(ValueError, match="sample: not with streaming or limit"):
            tt_data.load_dataset(large, chatml, sample=True, **wrong)
