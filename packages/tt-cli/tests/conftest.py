"""What the tests share: ``tt`` called in this process, and as a process of its own."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from tt_cli.main import main


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Tt = Callable[..., Answer]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "_TT_COMPLETE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def tt(capfd: pytest.CaptureFixture[str]) -> Tt:
    """Call ``tt`` in this process; only what this call wrote is in the answer."""

    def call(*args: str) -> Answer:
        capfd.readouterr()
        code = main(list(args))
        written = capfd.readouterr()
        return Answer(code, written.out, written.err)

    return call


@pytest.fixture
def tt_process() -> Tt:
    """Call ``tt`` as a process, from another folder where ``cwd`` says so."""

    def call(*args: str, python: Sequence[str] = (), **settings: Any) -> Answer:
        command = [sys.executable, *python, "-m", "tt_cli", *args]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, **settings)
        return Answer(done.returncode, done.stdout, done.stderr)

    return call
