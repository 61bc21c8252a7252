"""A chat template that is rendered in its own process (``worker``), under limits on time, memory and output."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from tt_data.messages import Message
from tt_data.template.sandbox import HAS_LIMITS, Process, start
from tt_data.wording import visible

MAX_TEMPLATE_BYTES = 64 * 1024
MAX_OUTPUT_CHARACTERS = 8_000_000
_OUTPUT_PER_CHARACTER, _OUTPUT_AT_LEAST = 32, 1 << 15  # characters that a template may write of a conversation
RENDER_SECONDS = 1.0  # of CPU time for one conversation, and for each pair of its messages
_SECONDS_PER_PAIR = 6e-5
_SECONDS_PER_CHARACTER = 1e-6
_SLACK_SECONDS = 60.0 if HAS_LIMITS else 5.0  # of wall time, if the system does not end what hangs
_USUAL_SECONDS, _USUAL_PER_PAIR = 1e-2, 2.5e-4  # of CPU time; templates take a tenth of it
_OTHER = "choose a different one (template=chatml, llama3, ...)"
_KILLED_SECONDS = RENDER_SECONDS + 1  # counted for a conversation that the process did not answer
_EXTRA_SECONDS = 2.0  # that all conversations together may take beyond the usual; then the template is given up
_PAIRS_PER_REQUEST = 10_000
_CHARACTERS_PER_REQUEST = 4_000_000


_LOST = {
    "words": "words of some messages",
    "reasoning": "the reasoning of some turns",
    "tool calls": "tool_calls",
    "tool results": "some results of tools",
    "tools": "tools (functions)",
}
_EMPTY_TURN = "the chat template removes the text of some turns, so they are not trained"


PROMPT_DIFFERS = (
    "the chat template's generation prompt is not part of its training text (it may open a thought that it later "
    "deletes): the trained text does not quite follow the prompt of inference"
)


DATED = (
    "the chat template writes the date of today: the same rows give different ids on a different day, and the model "
    "is used with a different date than in training"
)


class TemplateError(ValueError):
    """The chat template refused a conversation, failed, or exceeded a limit.

    ``reason``: the short name that reports count; ``ambiguous template`` for one that renders, but does not show which
    of the text is trained.
    """

    def __init__(self, text: str, *, reason: str = "template") -> None:
        super().__init__(text)
        self.reason = reason
        self.ambiguous = reason == "ambiguous template"


class Job:
    """A conversation to render: the text that goes to the process, how many messages it has, and the CPU time that it
    may take: alone (``seconds``; turns are rendered again and again to find their ends) or as one of many."""

    def __init__(self, content: Mapping[str, Any], messages: int) -> None:
        self.text = json.dumps(content, default=str)
        self.messages = messages
        pairs = messages**2
        self.seconds = RENDER_SECONDS + _SECONDS_PER_PAIR * pairs
        self.usual_seconds = _USUAL_SECONDS + _USUAL_PER_PAIR * pairs + _SECONDS_PER_CHARACTER * len(self.text)


class ChatTemplate:
    """A Jinja chat template with the variables it may read. Starts its process when first used."""

    def __init__(
        self, source: str, *, variables: Mapping[str, Any] | None = None, special: Sequence[str] = (),
        ends: Sequence[str] = (), name: str = "chat template",
    ) -> None:  # fmt: skip
        size = len(source.encode("utf-8", "surrogatepass"))
        if size > MAX_TEMPLATE_BYTES:
            raise TemplateError(f"{name}: {size} bytes, expected at most {MAX_TEMPLATE_BYTES}")
        self.source, self.name = source, name
        self._setup = {
            "source": source, "variables": dict(variables or {}), "special": list(special), "ends": list(ends),
        }  # fmt: skip
        self._spent, self._rendered = 0.0, 0
        self._process: Process | None = None
        self._owner = 0
        self._facts: dict[str, Any] = {}
        self._lock = threading.Lock()

    @property
    def turn_ends(self) -> tuple[str, ...]:
        """The special tokens that end an assistant turn."""
        with self._lock:
            self._start()
            return tuple(self._facts["ends"])

    @property
    def notes(self) -> list[str]:
        """What a report says of the template itself."""
        with self._lock:
            self._start()
            differs = [] if self._facts["keeps_its_prompt"] else [PROMPT_DIFFERS]
            return [*differs, DATED] if self._facts["dated"] else differs

    def run(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """Render ``jobs``; each answer has ``text`` or ``error``. If a job says which messages are ``trained``, its
        answer also has ``spans``, ``lost`` (the kinds of things that the text does not contain), ``empty`` (nothing is
        left of some turn) and ``follows_prompts`` (the trained text follows what inference would ask with)."""
        answers: list[dict[str, Any]] = []
        with self._lock:
            while len(answers) < len(jobs):
                self._start()
                request: list[Job] = []  # as many as are answered within about a tenth of a second, in little memory
                pairs = characters = 0
                for job in jobs[len(answers) :]:
                    pairs, characters = pairs + job.messages**2, characters + len(job.text)
                    if request and (pairs > _PAIRS_PER_REQUEST or characters > _CHARACTERS_PER_REQUEST):
                        break
                    request.append(job)
                found = self._ask(request)
                if len(found) < len(request):  # the process died on the next one
                    found.append({"error": "rendering used more time or memory than allowed", "cpu": _KILLED_SECONDS})
                    self._account(request[len(found) - 1], found[-1])
                answers += found
        return answers

    def _account(self, job: Job, answer: Mapping[str, Any]) -> None:
        """Count the time of a conversation. Raises TemplateError once all of them together take far more than usual:
        each may be within its limit while a million of them take days."""
        self._spent += answer["cpu"] - job.usual_seconds / (4 if "error" in answer else 1)
        self._rendered += 1
        if self._spent > _EXTRA_SECONDS:
            last = f" ({visible(str(answer['error']))})" if "error" in answer else ""
            raise TemplateError(
                f"{self.name}: its first {self._rendered} conversations took {self._spent:.0f} s longer to render than "
                f"allowed{last}, so this template is given up; {_OTHER}"
            )
        self._spent = max(self._spent, -_EXTRA_SECONDS * 4)

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

    def _start(self) -> None:
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return
        self._process = start("tt_data.template.worker")
        self._owner = os.getpid()
        weakref.finalize(self, _stop, self._process, self._owner)
        self._facts = {}
        answers = self._ask([Job(self._setup, 0)])
        if not answers:
            raise TemplateError(
                f"{self.name}: its first rendering used more time or memory than allowed, or crashed; {_OTHER}"
            )
        if "error" in answers[0]:
            _stop(self._process, self._owner)
            raise self.error(answers[0])
        self._facts = answers[0]

    def _ask(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """The answers: fewer than ``jobs`` if the process died on one or had to be killed."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        answers: list[dict[str, Any]] = []
        allowed = _SLACK_SECONDS + 2 * max(job.seconds for job in jobs)
        armed = time.monotonic()
        timer = _kill_after(allowed, process)
        lines: list[str] = []
        for job in jobs:  # a template may write all of its own text, and a multiple of the conversation
            most = _OUTPUT_AT_LEAST + len(self.source) + _OUTPUT_PER_CHARACTER * len(job.text)
            limits = f'"seconds": {job.seconds}, "most": {min(MAX_OUTPUT_CHARACTERS, most)}'
            lines.append(f'{{{limits}, "job": {job.text}}}')
        try:
            process.stdin.write(f"[{','.join(lines)}]\n".encode())
            process.stdin.flush()
            while len(answers) < len(jobs) and (line := process.stdout.readline()).endswith(b"\n"):
                answers.append(json.loads(line))
                self._account(jobs[len(answers) - 1], answers[-1])
                if (now := time.monotonic()) - armed > 1:
                    timer.cancel()
                    armed, timer = now, _kill_after(allowed, process)
        except BrokenPipeError:
            pass
        except TemplateError:
            _stop(process, self._owner)
            raise
        finally:
            timer.cancel()
        if len(answers) < len(jobs):
            _stop(process, self._owner)
            self._process = None
        return answers

    def close(self) -> None:
        """End the process; it starts again if it is needed."""
        if self._process is not None:
            _stop(self._process, self._owner)
            self._process = None

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "source": self.source, "_setup": self._setup}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _process=None, _owner=0, _facts={}, _lock=threading.Lock())
        self._spent, self._rendered = 0.0, 0


def _kill_after(seconds: float, process: Process) -> threading.Timer:
    timer = threading.Timer(seconds, process.kill)
    timer.daemon = True
    timer.start()
    return timer


def _stop(process: Process, owner: int) -> None:
    if owner != os.getpid():  # a forked child has a copy of the pipes, but not the process
        return
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


def notes_of_answer(answer: Mapping[str, Any]) -> list[str]:
    """What a report says of a text that does not contain all of its conversation."""
    notes = [f"the chat template does not write {_LOST[kind]}" for kind in answer.get("lost", ())]
    notes += [_EMPTY_TURN] if answer.get("empty") else []
    return notes if answer.get("follows_prompts", True) else [*notes, PROMPT_DIFFERS]


def template_dict(message: Message | Mapping[str, Any]) -> dict[str, Any]:
    """What a template sees of a message: no None values, the reasoning under each of its names."""
    if isinstance(message, Message):
        message = {"role": message.role, "content": message.content, **message.extra}
    if not isinstance(message, Mapping):
        raise ValueError(
            f"expected a list of Message or of mappings with role and content, found {type(message).__name__}"
        )
    data = {key: value for key, value in message.items() if value is not None}
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((data[name] for name in names if data.get(name) is not None), None)
    return data if reasoning is None else {"thinking": reasoning, **data, "reasoning_content": reasoning}
