"""A model's chat template: found in its directory, rendered in a process of its own (``render_worker``)."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tt_data.files import inside, read_object, read_text
from tt_data.messages import Message
from tt_data.trial import bare_environment

MAX_TEMPLATE_BYTES = 64 * 1024
_MAX_FILE_BYTES = 1 << 20  # a template that is too large is refused when it is used
MAX_OUTPUT_CHARACTERS = 8_000_000
RENDER_SECONDS = 1.0  # of CPU time for one conversation, and for each pair of its messages
_SECONDS_PER_PAIR = 6e-5
_SLACK_SECONDS = 5.0  # and twice the limit: until a process that hangs outside Python is killed
_PAIRS_PER_REQUEST = 10_000
_CHARACTERS_PER_REQUEST = 4_000_000


_LOST = {
    "words": "words of some messages",
    "reasoning": "the reasoning of some turns",
    "tool calls": "tool_calls",
    "tool results": "some results of tools",
    "tools": "tools (functions)",
}
_EMPTY_TURN = "the chat template leaves nothing of some turns but their end, so they are not trained"


PROMPT_DIFFERS = (
    "the chat template's generation prompt is not part of its training text (it may open a thought that it later "
    "deletes): what is trained is not quite what inference asks for"
)


DATED = (
    "the chat template writes the date of today: the same rows make other ids on another day, and the model is asked "
    "with another date than it was trained with"
)


class TemplateError(ValueError):
    """The chat template refused a conversation, failed, or went over a limit.

    ``reason``: the short name that reports count; ``ambiguous template`` for one that renders, but does not show which
    of the text is trained.
    """

    def __init__(self, text: str, *, reason: str = "template") -> None:
        super().__init__(text)
        self.reason = reason
        self.ambiguous = reason == "ambiguous template"


class Job:
    """A conversation to render, as the text that goes to the process, and how many messages it has."""

    def __init__(self, content: Mapping[str, Any], messages: int) -> None:
        self.text = json.dumps(content, default=str)
        self.messages = messages

    @property
    def seconds(self) -> float:
        """CPU time that it may take: turns are rendered again and again to find where each ends."""
        return RENDER_SECONDS + _SECONDS_PER_PAIR * self.messages**2

    def line(self) -> str:
        return f'{{"seconds": {self.seconds}, "job": {self.text}}}'


class ChatTemplate:
    """A Jinja chat template with the variables it may read. Starts its process when first used."""

    def __init__(
        self, source: str, *, variables: Mapping[str, Any] | None = None, special: Sequence[str] = (),
        ends: Sequence[str] = (), name: str = "chat template",
    ) -> None:  # fmt: skip
        if len(source.encode()) > MAX_TEMPLATE_BYTES:
            raise TemplateError(f"{name}: {len(source.encode())} bytes, expected at most {MAX_TEMPLATE_BYTES}")
        self.source, self.name = source, name
        self._setup = {
            "source": source, "variables": dict(variables or {}), "special": list(special), "ends": list(ends),
            "output_limit": MAX_OUTPUT_CHARACTERS,
        }  # fmt: skip
        self._process: subprocess.Popen[str] | None = None
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
        """What is to be known of the template, whatever it is given."""
        differs = [] if self.keeps_its_prompt else [PROMPT_DIFFERS]
        return [*differs, DATED] if self._facts["dated"] else differs

    @property
    def keeps_its_prompt(self) -> bool:
        """Whether training text begins with what inference begins with."""
        with self._lock:
            self._start()
            return bool(self._facts["keeps_its_prompt"])

    def run(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """Render ``jobs``; each answer has ``text`` or ``error``. If a job says what is trained, it also has ``spans``,
        ``lost`` (the kinds of things that the text does not hold), ``empty`` (of some turn nothing is left) and
        ``follows_prompts`` (what is trained follows what inference would ask with)."""
        answers: list[dict[str, Any]] = []
        with self._lock:
            for request in _requests(jobs):
                self._start()
                answers += self._ask(request) or self._one_by_one(request)
        return answers

    def error(self, answer: Mapping[str, Any], nonce: str = "") -> TemplateError:
        """The exception for an answer that is one: which template, which line, what. ``nonce`` is taken out."""
        line, text = answer.get("line"), str(answer["error"])
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

    def _one_by_one(self, request: Sequence[Job]) -> list[dict[str, Any]]:
        """A request killed the process: find the job that did."""
        answers: list[dict[str, Any]] = []
        for job in request:
            self._start()
            answers += self._ask([job]) or [{"error": "rendering used more time or memory than it may"}]
        return answers

    def _start(self) -> None:
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tt_data.render_worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, encoding="utf-8", errors="surrogatepass", env=bare_environment(),
        )  # fmt: skip
        self._owner = os.getpid()
        weakref.finalize(self, _stop, self._process, self._owner)
        answers = self._ask([Job(self._setup, 0)])
        if answers is None:
            raise TemplateError(f"{self.name}: its first rendering used more time or memory than it may")
        if "error" in answers[0]:
            _stop(self._process, self._owner)
            raise self.error(answers[0])
        self._facts = answers[0]

    def _ask(self, jobs: Sequence[Job]) -> list[dict[str, Any]] | None:
        """The answers, or None when the process died or had to be killed."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(_SLACK_SECONDS + 2 * max(job.seconds for job in jobs), process.kill)
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(f"[{','.join(job.line() for job in jobs)}]\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line.endswith("\n"):
            _stop(process, self._owner)
            self._process = None
            return None
        answers: list[dict[str, Any]] = json.loads(line)
        return answers

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "source": self.source, "_setup": self._setup}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _process=None, _owner=0, _facts={}, _lock=threading.Lock())


def _requests(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Jobs in lists that are answered within about a tenth of a second, in little memory."""
    request: list[Job] = []
    pairs = characters = 0
    for job in jobs:
        pairs, characters = pairs + job.messages**2, characters + len(job.text)
        if request and (pairs > _PAIRS_PER_REQUEST or characters > _CHARACTERS_PER_REQUEST):
            yield request
            request, pairs, characters = [], job.messages**2, len(job.text)
        request.append(job)
    if request:
        yield request


def _stop(process: subprocess.Popen[str], owner: int) -> None:
    if owner != os.getpid():  # a forked child holds a copy of the pipes, but the process is not its own
        return
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


def find_chat_template(directory: Path, config: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """The templates of a model directory by name (``default``, ``tool_use``, ...), and the file they came from.

    ``chat_template.jinja`` and ``additional_chat_templates/`` go before ``tokenizer_config.json``, as in transformers.
    """
    file, folder = directory / "chat_template.jinja", directory / "additional_chat_templates"
    templates: dict[str, str] = {}
    if os.path.lexists(file):
        templates["default"] = read_template(file, directory)
    if os.path.lexists(folder) and not inside(folder, directory).is_dir():
        raise ValueError(f"{folder}: expected a folder of .jinja files")
    for extra in sorted(folder.glob("*.jinja")):
        templates[extra.stem] = read_template(extra, directory)
    if templates:
        return templates, str(file)
    source, origin = config.get("chat_template"), directory / "tokenizer_config.json"
    legacy = directory / "chat_template.json"
    if source is None and os.path.lexists(legacy):
        source, origin = read_object(legacy).get("chat_template"), legacy
        if source is None:
            raise ValueError(f"{legacy}: expected the key chat_template; add it, or remove the file")
    return _of_config(source, origin), str(origin)


def _of_config(source: Any, origin: Path) -> dict[str, str]:
    if source is None:
        return {}
    if isinstance(source, str):
        return {"default": source}
    try:
        found = {entry["name"]: entry["template"] for entry in source if entry["template"].strip()}
    except (TypeError, LookupError, AttributeError):
        found = {None: None}
    if not all(isinstance(text, str) for pair in found.items() for text in pair):
        raise ValueError(
            f"{origin}: chat_template must be text, or a list of objects with name and template; correct it, or name a "
            "template (data.template=chatml, llama3, ...)"
        )
    return found


def read_template(path: Path, root: Path | None = None) -> str:
    """The text of a .jinja file of the folder ``root``. Raises ValueError for one that is no text, or too large."""
    return read_text(path, root, limit=_MAX_FILE_BYTES)


def notes_of_answer(answer: Mapping[str, Any]) -> list[str]:
    """What a report says of a rendering that does not hold all of its conversation."""
    notes = [f"the chat template does not write {_LOST[kind]}" for kind in answer.get("lost", ())]
    notes += [_EMPTY_TURN] if answer.get("empty") else []
    return notes if answer.get("follows_prompts", True) else [*notes, PROMPT_DIFFERS]


def as_dict(message: Any) -> dict[str, Any]:
    """What a template sees of a message: no None values, the reasoning under each of its names."""
    data = message.to_dict() if isinstance(message, Message) else dict(message)
    data = {key: value for key, value in data.items() if value is not None}
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((data[name] for name in names if data.get(name) is not None), None)
    return data if reasoning is None else {"thinking": reasoning, **data, "reasoning_content": reasoning}
