"""A chat template that is rendered in its own process (``worker``), under limits on time, memory and output; and how
any process that works on untrusted files is started."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from tt_data.messages import Message
from tt_data.template.limits import HAS_LIMITS
from tt_data.wording import visible

Process: TypeAlias = "subprocess.Popen[bytes]"
TO_JSON = json.JSONEncoder(default=str)  # of the content of jobs
MAX_TEMPLATE_BYTES = 64 * 1024
MAX_OUTPUT_CHARACTERS = 8_000_000
_OUTPUT_PER_CHARACTER, _OUTPUT_AT_LEAST = 32, 1 << 15  # characters that a template may write of a conversation
RENDER_SECONDS = 1.0  # of CPU time for one conversation, and for each pair of its messages
_SECONDS_PER_PAIR = 6e-5
_SECONDS_PER_CHARACTER = 1e-6
_SLACK_SECONDS = 60.0 if HAS_LIMITS else 5.0  # of wall time, if the system does not end what hangs
_USUAL_SECONDS, _USUAL_PER_PAIR = 1e-2, 2.5e-4  # of CPU time; templates take a tenth of it
_OTHER = "choose a different one (template=chatml, llama3, ...)"
_DIED = {  # the answer of a process that died, or had to be killed
    "error": "rendering used more time or memory than allowed", "cpu": RENDER_SECONDS + 1,
}  # fmt: skip
_EXTRA_SECONDS = 2.0  # that all conversations together may take beyond the usual; then the template is given up
_PAIRS_PER_REQUEST = 10_000
_CHARACTERS_PER_REQUEST = 4_000_000


class TemplateError(ValueError):
    """The chat template refused a conversation, failed, or exceeded a limit.

    ``reason``: the short name that reports count; ``ambiguous template`` for one that renders, but does not show which
    of the text is trained.
    """

    def __init__(self, text: str, *, reason: str = "template") -> None:
        super().__init__(text)
        self.reason = reason
        self.ambiguous = reason == "ambiguous template"


class Job(NamedTuple):
    """A conversation to render: the JSON that goes to the process, and how many messages it has."""

    text: str
    messages: int


class ChatTemplate:
    """A Jinja chat template with the variables it may read. Starts its process when first used."""

    def __init__(
        self, source: str, *, variables: Mapping[str, Any] | None = None, special: Sequence[str] = (),
        ends: Sequence[str] = (), name: str = "chat template",
    ) -> None:  # fmt: skip
        self.source, self.name = source, name
        self._setup = {
            "source": source, "variables": dict(variables or {}), "special": list(special), "ends": list(ends),
        }  # fmt: skip
        self.notes: list[str] = []  # what a report says of the template itself, known once it has started
        self._spent, self._rendered = 0.0, 0
        self._process: Process | None = None
        self._owner = 0
        self._ends: tuple[str, ...] = ()
        self._lock = threading.RLock()

    @property
    def turn_ends(self) -> tuple[str, ...]:
        """The special tokens that end an assistant turn."""
        self.start()
        return self._ends

    def run(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """Render ``jobs``; each answer has ``text`` or ``error``. If a job says which messages are ``trained``, its
        answer also has ``spans`` and ``notes`` (what a report says of the conversation)."""
        answers: list[dict[str, Any]] = []
        with self._lock:
            while len(answers) < len(jobs):
                self.start()
                request: list[Job] = []  # as many as are answered within about a tenth of a second, in little memory
                pairs = characters = 0
                for job in jobs[len(answers) :]:
                    pairs, characters = pairs + job.messages**2, characters + len(job.text)
                    if request and (pairs > _PAIRS_PER_REQUEST or characters > _CHARACTERS_PER_REQUEST):
                        break
                    request.append(job)
                answers += self._ask(request)
        return answers

    def error(self, answer: Mapping[str, Any], nonce: str = "") -> TemplateError:
        """The exception for an answer with an error: which template, which line, what. ``nonce`` is taken out."""
        line, text = answer.get("line"), visible(str(answer["error"]))
        where = f"{self.name}{f', line {line}' if line else ''}"
        said = f"{where}: {text.replace(nonce, '') if nonce else text}"
        if answer.get("kind") == "AmbiguousTemplateError":
            return TemplateError(said, reason="ambiguous template")
        if role := answer.get("refused_role"):
            cure = (
                f"this template takes no {role} message: put its text at the beginning of the first user turn, or name "
                "a template that takes one (template=chatml, llama3, ...)"
            )
            return TemplateError(f"{said}; {cure}", reason="system message refused")
        return TemplateError(said)

    def start(self) -> None:
        """Start the process, unless it runs, and have it study the template. Raises TemplateError."""
        with self._lock:
            if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
                return
            size = len(self.source.encode("utf-8", "surrogatepass"))
            if size > MAX_TEMPLATE_BYTES:
                raise TemplateError(f"{self.name}: {size} bytes, expected at most {MAX_TEMPLATE_BYTES}")
            self._process, self._owner = start("tt_data.template.worker"), os.getpid()
            weakref.finalize(self, _stop, self._process, self._owner)
            (facts,) = self._ask([Job(json.dumps(self._setup), 0)])
            if facts is _DIED:
                raise TemplateError(
                    f"{self.name}: its first rendering used more time or memory than allowed, or crashed; {_OTHER}"
                )
            if "error" in facts:
                _stop(self._process, self._owner)
                raise self.error(facts)
            self._ends, self.notes = tuple(facts["ends"]), facts["notes"]

    def _ask(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """The answers. If the process died on a job, or had to be killed, the last one is ``_DIED``.

        Raises TemplateError once all conversations together take far more time than usual: each may be within its
        limit while a million of them take days.
        """
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        lines: list[str] = []
        allowed = _SLACK_SECONDS
        for job in jobs:  # a template may write all of its own text, and a multiple of the conversation
            seconds = RENDER_SECONDS + _SECONDS_PER_PAIR * job.messages**2  # turns are rendered again to find ends
            most = _OUTPUT_AT_LEAST + len(self.source) + _OUTPUT_PER_CHARACTER * len(job.text)
            limits = f'"seconds": {seconds}, "most": {min(MAX_OUTPUT_CHARACTERS, most)}'
            lines.append(f'{{{limits}, "job": {job.text}}}')
            allowed = max(allowed, _SLACK_SECONDS + 2 * seconds)
        request = f"[{','.join(lines)}]\n".encode()
        answers: list[dict[str, Any]] = []
        while len(answers) < len(jobs):
            timer = threading.Timer(allowed, process.kill)  # of the next answer; set anew once a second
            timer.daemon = True
            timer.start()
            armed = time.monotonic()
            try:
                if request:
                    with contextlib.suppress(BrokenPipeError):  # what has died does not answer either
                        process.stdin.write(request)
                        process.stdin.flush()
                    request = b""
                while len(answers) < len(jobs) and time.monotonic() - armed < 1:
                    line = process.stdout.readline()
                    answers.append(json.loads(line) if line.endswith(b"\n") else _DIED)
                    job, answer = jobs[len(answers) - 1], answers[-1]
                    if answer is not _DIED or job.messages:
                        usual = _USUAL_SECONDS + _USUAL_PER_PAIR * job.messages**2
                        usual += _SECONDS_PER_CHARACTER * len(job.text)
                        self._spent += answer["cpu"] - usual / (4 if "error" in answer else 1)
                        self._spent = max(self._spent, -_EXTRA_SECONDS * 4)
                        self._rendered += 1
                    if answer is _DIED or self._spent > _EXTRA_SECONDS:
                        _stop(process, self._owner)
                        self._process = None
                        if self._spent > _EXTRA_SECONDS:
                            raise self._too_slow(answer)
                        return answers
            finally:
                timer.cancel()
        return answers

    def _too_slow(self, answer: Mapping[str, Any]) -> TemplateError:
        last = f" ({visible(str(answer['error']))})" if "error" in answer else ""
        return TemplateError(
            f"{self.name}: its first {self._rendered} conversations took {self._spent:.0f} s longer to render than "
            f"allowed{last}, so this template is given up; {_OTHER}"
        )

    def close(self) -> None:
        """End the process; it starts again if it is needed."""
        if self._process is not None:
            _stop(self._process, self._owner)
            self._process = None

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "source": self.source, "_setup": self._setup}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, notes=[], _process=None, _owner=0, _ends=(), _lock=threading.RLock())
        self._spent, self._rendered = 0.0, 0


def start(module: str, *words: str) -> Process:
    """``python -m module words`` with pipes to its stdin and from its stdout, and with nothing of our environment that
    is a secret."""
    kept = {key: os.environ[key] for key in ("PATH", "SYSTEMROOT", "TZ", "LD_LIBRARY_PATH") if key in os.environ}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module, *words],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env={**kept, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONUTF8": "1"},
    )  # fmt: skip


def run(module: str, *words: str, data: bytes, seconds: float) -> tuple[bytes, int]:
    """What the process wrote when it was given ``data``, and its exit status. It is killed after ``seconds``."""
    process = start(module, *words)
    try:
        written, _ = process.communicate(data, timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        written, _ = process.communicate()
    return written, process.returncode


def _stop(process: Process, owner: int) -> None:
    if owner != os.getpid():  # a forked child has a copy of the pipes, but not the process
        return
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


def template_dict(message: Message | Mapping[str, Any]) -> dict[str, Any]:
    """What a template sees of a message: no None values, the reasoning under each of its names."""
    if isinstance(message, Message):
        if not message.extra:  # nearly every one
            return {"role": message.role, "content": message.content}
        message = {"role": message.role, "content": message.content, **message.extra}
    if not isinstance(message, Mapping):
        raise ValueError(
            f"expected a list of Message or of mappings with role and content, found {type(message).__name__}"
        )
    data = {key: value for key, value in message.items() if value is not None}
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((data[name] for name in names if data.get(name) is not None), None)
    return data if reasoning is None else {"thinking": reasoning, **data, "reasoning_content": reasoning}
