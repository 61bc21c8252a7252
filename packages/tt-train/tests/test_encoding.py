"""What is said while the rows of a run are encoded, which takes minutes for a million of them."""

import io
import json
import sys

import pytest

import tt_data
from tt_train.config import DataSection, DPOConfig, PreferenceSection, RunConfig
from tt_train.devices.distributed import World
from tt_train.inputs import encoding
from tt_train.inputs.encoding import Encoding, progress_words, seconds_words, streaming_hint
from tt_train.inputs.rows import read_rows


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def encode(progress, clock, *, seconds, rate, total):
    """A source of ``rate`` rows a second for some seconds."""
    for _ in range(seconds):
        clock.now += 1
        progress(progress.read + rate, lambda: total)


def test_less_than_five_seconds_are_not_worth_a_line(capsys):
    clock = Clock()
    with Encoding(lambda: "a hint", clock=clock) as progress:
        encode(progress, clock, seconds=5, rate=512, total=2560)
    assert capsys.readouterr() == ("", "")


def test_a_pipe_has_a_line_every_ten_seconds_and_the_hint_once(capsys):
    clock = Clock()
    with Encoding(lambda: "a hint", clock=clock) as progress:
        encode(progress, clock, seconds=30, rate=1000, total=100_000)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "a hint",
        "encoding rows: 6,000 of 100,000 (1,000 rows/s, 94 s left)",
        "encoding rows: 16,000 of 100,000 (1,000 rows/s, 84 s left)",
        "encoding rows: 26,000 of 100,000 (1,000 rows/s, 74 s left)",
        "encoded 30,000 rows in 29 s",
    ]


def test_a_terminal_has_one_line_that_replaces_itself(monkeypatch):
    clock, screen = Clock(), Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    with Encoding(lambda: "a hint", clock=clock) as progress:
        encode(progress, clock, seconds=8, rate=1000, total=None)
    hint, *rest = screen.getvalue().split("\n")
    assert hint == "a hint"
    assert rest == [
        "".join(f"\r{text:<59}" for text in ("encoding rows: 6,000 (1,000 rows/s)",
                                             "encoding rows: 7,000 (1,000 rows/s)",
                                             "encoding rows: 8,000 (1,000 rows/s)", ""))
        + "\rencoded 8,000 rows in 7 s",
        "",
    ]  # fmt: skip
    assert "\x1b" not in screen.getvalue()  # no colour


def test_a_dumb_terminal_has_plain_lines(monkeypatch):
    clock, screen = Clock(), Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "dumb")
    with Encoding(clock=clock) as progress:
        encode(progress, clock, seconds=8, rate=1000, total=None)
    assert screen.getvalue() == "encoding rows: 6,000 (1,000 rows/s)\nencoded 8,000 rows in 7 s\n"


def test_after_an_error_there_is_no_last_line(capsys):
    clock = Clock()
    progress = Encoding(clock=clock)
    encode(progress, clock, seconds=8, rate=1000, total=None)
    with pytest.raises(ValueError, match="a bad row"), progress:
        raise ValueError("a bad row")
    assert capsys.readouterr().err == "encoding rows: 6,000 (1,000 rows/s)\n"


def test_the_sources_of_a_mix_are_counted_one_after_the_other(capsys):
    clock = Clock()
    with Encoding(clock=clock) as progress:
        encode(progress, clock, seconds=10, rate=1000, total=10_000)
        clock.now += 1
        progress(100, lambda: 2000)  # of the next one
        encode(progress, clock, seconds=10, rate=190, total=2000)
    assert capsys.readouterr().err.splitlines() == [
        "encoding rows: 6,000 of 10,000 (1,000 rows/s, 4 s left)",
        "encoding rows: 1,050 of 2,000 (190 rows/s, 5 s left)",
        "encoded 12,000 rows in 20 s",
    ]


def test_figures_are_short_and_an_estimate_says_so():
    assert progress_words(512, 12_345_678.0, 1000) == "512 of about 12,000,000 (1,000 rows/s, 3.4 h left)"
    assert progress_words(900, 800, 10) == "900 (10 rows/s)"  # the count was of something else
    assert [seconds_words(s) for s in (0.4, 99, 100, 3600, 7200)] == ["0 s", "99 s", "2 min", "60 min", "2.0 h"]


def config(**data):
    return RunConfig(data=DataSection(train="rows.jsonl", **data))


def test_the_hint_names_what_a_stream_needs():
    assert streaming_hint(config()) == (
        "all rows are encoded before step 1; with data.streaming=true and max_steps=N the run starts at once; "
        "it would keep duplicate rows"
    )
    some = RunConfig(data=DataSection(train="rows.jsonl", packing=True, drop_duplicates=False), max_steps=5)
    assert streaming_hint(some) == "all rows are encoded before step 1; with data.streaming=true the run starts at once"


def test_there_is_no_hint_for_a_config_that_cannot_stream():
    assert streaming_hint(config(eval=0.05)) == streaming_hint(config(eval="0.05")) == ""
    assert streaming_hint(DPOConfig(data=DataSection(train="rows.jsonl")))
    cached = PreferenceSection(reference_cache="cache")
    assert streaming_hint(DPOConfig(data=DataSection(train="rows.jsonl"), loss=cached)) == ""
    assert streaming_hint(RunConfig(data=DataSection(train={"alpaca": 1, "samsum": 1}))) == ""


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_says_it_while_rows_are_read(tmp_path, tokenizer_dir, monkeypatch, capsys, rank):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"Say red {i}."}) + "\n" for i in range(1300)))
    monkeypatch.setattr(encoding, "AFTER_S", 0.0)
    monkeypatch.setattr("tt_train.inputs.rows.world", lambda: World(rank=rank, size=2, local_size=2))
    tokenizer = tt_data.load_tokenizer(tokenizer_dir)
    train = RunConfig(data=DataSection(train=str(rows), num_workers=1))
    found = read_rows(train, train.data.train, tokenizer, 64)
    out, err = capsys.readouterr()
    assert (len(found), out) == (1300, "")
    if rank:
        assert err == ""
        return
    hint, first, last = err.splitlines()
    assert hint == streaming_hint(train)
    assert first.startswith("encoding rows: 1,024 of 1,300 (")
    assert last.startswith("encoded 1,300 rows in ")
    read_rows(train, [str(rows)], tokenizer, 64)  # other rows, such as held-out ones
    assert hint not in capsys.readouterr().err
