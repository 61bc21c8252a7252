"""Encoding in several processes: the same rows, and errors that name theirs."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from tt_data import Schema, load_dataset, register_schema
from tt_data.encoding import workers
from tt_data.examples import Completion
from tt_data.processes import map_in_processes
from tt_data.rows import schemas


@pytest.mark.parametrize("packing", [False, True])
def test_processes_change_nothing(chatml: Any, write_jsonl: Any, make_chat_rows: Any, packing: bool) -> None:
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    rows = make_chat_rows(1300) + make_chat_rows(10) + [{"messages": []}, {"messages": None}]
    paths = [write_jsonl(rows, "a.jsonl"), write_jsonl(make_chat_rows(1400)[1300:], "b.jsonl")]
    alone = load_dataset(paths, chatml, max_seq_len=24, packing=packing)
    helped = load_dataset(paths, chatml, max_seq_len=24, packing=packing, num_workers=2)
    assert list(helped) == list(alone)
    assert helped.report == alone.report
    assert helped.report["dropped"] == {"duplicate": 10, "empty": 1, "null": 1}
    assert helped.fingerprint == alone.fingerprint
    assert os.environ.get("TOKENIZERS_PARALLELISM") == before


def test_spare_processes_encode_what_is_left_of_a_large_source_and_change_nothing(
    chatml: Any, make_chat_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []
    monkeypatch.setattr(workers, "_ALONE", 1)
    monkeypatch.setattr(workers, "map_in_processes", lambda *a, **k: started.append(1) or map_in_processes(*a, **k))
    rows = [*make_chat_rows(1100), {"messages": []}, *make_chat_rows(10), {"messages": None}]
    alone, helped = load_dataset(rows, chatml), load_dataset(rows, chatml, spare_workers=2)
    assert list(helped) == list(alone)
    assert (helped.report, helped.fingerprint) == (alone.report, alone.fingerprint)
    assert started == [1]
    load_dataset(rows[:512], chatml, spare_workers=2)
    monkeypatch.setattr(workers, "CAN_FORK", False)
    assert load_dataset(rows, chatml, spare_workers=2).report == alone.report
    assert started == [1]


@pytest.fixture
def troubled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with ``trouble`` do to the process that reads them what they say."""
    monkeypatch.setattr(schemas, "SCHEMAS", dict(schemas.SCHEMAS))

    def read(row: Mapping[str, Any], columns: Mapping[str, str]) -> Completion:
        if row["trouble"] == "hang":
            time.sleep(60)
        if row["trouble"] == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if row["trouble"] == "fail":
            raise KeyError("lost")
        return Completion("a", str(row["n"]))

    register_schema(Schema("troubled", (("trouble",),), read))


@pytest.mark.parametrize(
    ("trouble", "text"),
    [
        ("hang", "rows rows:512 to rows:1023: a process that encodes them did not answer within 2 s"),
        ("die", "a process that encodes them died; look for the kernel's out-of-memory killer"),
        ("fail", "rows:600: the converter of these rows failed: KeyError: 'lost'"),
    ],
)
def test_a_process_in_trouble_is_an_error_that_names_its_rows(
    chatml: Any, troubled: None, trouble: str, text: str
) -> None:
    rows = [{"n": i, "trouble": trouble if i == 600 else ""} for i in range(2000)]
    begin = time.monotonic()
    with pytest.raises(ValueError if trouble == "fail" else RuntimeError) as failure:
        load_dataset(rows, chatml, num_workers=2, timeout_s=2 if trouble == "hang" else 25)
    assert text in str(failure.value)
    assert "\n" not in str(failure.value)
    assert time.monotonic() - begin < 30


def test_a_setting_at_fault_is_a_value_error(chatml: Any, make_chat_rows: Any) -> None:
    source = "{% for m in messages|reverse %}{{ m.content + '<|im_end|>' }}{% endfor %}"
    tokenizer = chatml.with_template({"default": source}, "backwards")
    with pytest.raises(ValueError, match="rows:0: backwards: .* ambiguous"):
        load_dataset(make_chat_rows(5, turns=2), tokenizer, num_workers=1)


@pytest.mark.parametrize(("options", "text"), [({"num_workers": -1}, "num_workers"), ({"timeout_s": 0}, "timeout_s")])
def test_wrong_numbers_are_refused(chatml: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        load_dataset([{"text": "a"}], chatml, **options)


class Slow(Sequence[dict[str, str]]):
    """Rows of which one takes a minute when it is read to be encoded (before, it is read for the fingerprint)."""

    def __init__(self, pipe: int) -> None:
        self.pipe, self.times = pipe, 0

    def __len__(self) -> int:
        return 10_000

    def __getitem__(self, i: Any) -> Any:
        if i == len(self):
            raise IndexError(i)
        self.times += i == 5000
        if i == 5000 and self.times == 2:
            os.write(self.pipe, b"ready")
            time.sleep(60)
        return {"text": f"{i}"}


def test_processes_end_when_their_parent_is_killed(chatml: Any) -> None:
    """Two that wait for rows: neither stays behind."""
    reading, writing = os.pipe()
    parent = os.fork()
    if parent == 0:
        os.close(reading)
        load_dataset(Slow(writing), chatml, num_workers=2)
        os._exit(0)
    os.close(writing)  # the parent and its processes hold the other end, until the last of them is gone
    try:
        assert os.read(reading, 5) == b"ready"
    finally:
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
    assert select.select([reading], [], [], 30)[0], "a process is still there after 30 s"
    assert os.read(reading, 1) == b""
    os.close(reading)
