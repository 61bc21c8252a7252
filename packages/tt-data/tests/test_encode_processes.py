"""Encoding in several processes: the same rows, and errors that name theirs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from typing import Any

import pytest

from tt_data import Schema, load_dataset, register_schema
from tt_data.rows import schemas
from tt_data.rows.examples import Completion


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
