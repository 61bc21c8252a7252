"""The process in which chat templates run: ``python -m tt_data.template.worker``, JSON lines in and out.

A chat template comes with the model and is not trusted. It runs in Jinja's immutable sandbox. This process has limits
on its memory and on the time of each rendering, and an empty environment; its parent kills it if it does not answer.
"""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from datetime import datetime
from types import FrameType
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from tt_data.template.facts import study
from tt_data.template.forms import MessageForms
from tt_data.template.limits import limit_cpu, limit_memory
from tt_data.template.spans import alternatives
from tt_data.template.turns import (
    BLOCK_EDGES,
    BLOCK_END,
    BLOCK_START,
    AmbiguousTemplateError,
    generation_spans,
    turn_spans,
)

_MEMORY_LIMIT = 1 << 30
_FIRST_SECONDS, _SECONDS_PER_MESSAGE = 1.0, 2e-3  # of CPU time, for a conversation's first rendering
_SLACK_SECONDS = 0.5
_STUDY_CHARACTERS = 1 << 20
# What a report says of a template, or of a text that does not contain all of its conversation.
_LOST = {
    "words": "words of some messages",
    "reasoning": "the reasoning of some turns",
    "tool calls": "tool_calls",
    "tool results": "some results of tools",
    "tools": "tools (functions)",
}
_EMPTY_TURN = "the chat template removes the text of some turns, so they are not trained"
_PROMPT_DIFFERS = (
    "the chat template's generation prompt is not part of its training text (it may open a thought that it later "
    "deletes): the trained text does not quite follow the prompt of inference"
)
_DATED = (
    "the chat template writes the date of today: the same rows give different ids on a different day, and the model "
    "is used with a different date than in training"
)


class _Generation(jinja2.ext.Extension):
    """``{% generation %} ... {% endgeneration %}``: what the model writes, between BLOCK_START and BLOCK_END."""

    tags = {"generation"}  # noqa: RUF012  jinja's own attribute

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    @staticmethod
    def _mark(caller: Any) -> str:
        return f"{BLOCK_START}{caller()}{BLOCK_END}"


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: Any = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def make_environment() -> jinja2.Environment:
    """The sandbox with the globals and filters that chat templates are written for."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment


class _Template:
    """One compiled template with its variables."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self.dated = False
        environment = make_environment()
        environment.globals["strftime_now"] = self._today
        self.template = environment.from_string(setup["source"])
        self.template.globals = dict(self.template.globals)  # every rendering walks them: a ChainMap is slow at it
        self.variables: dict[str, Any] = setup["variables"]
        self.most = _STUDY_CHARACTERS
        self._refuses: dict[str, bool] = {}
        self.special = alternatives(setup["special"]) if setup["special"] else None
        self.has_generation = re.search(r"\{%[-+]?\s*generation\b", setup["source"]) is not None
        self.forms = MessageForms(lambda messages, tools, extra: self.render(messages, False, tools, extra))
        self.facts = study(
            lambda m, prompt: self.render(self.forms.fit(m, None, None)[0], prompt), self.special, setup["ends"]
        )

    def _today(self, form: str) -> str:
        self.dated = True
        return datetime.now().strftime(form)

    def raw(self, messages: list[dict[str, Any]], prompt: bool, tools: Any = None, extra: Any = None) -> str:
        pieces: list[str] = []
        size = 0
        variables = {**self.variables, **(extra or {}), "messages": messages, "tools": tools or None, "documents": None}
        for piece in self.template.generate(variables, add_generation_prompt=prompt):
            size += len(piece)
            if size > self.most:
                raise _TooMuchError(f"the chat template wrote more than {self.most} characters")
            pieces.append(piece)
        return "".join(pieces)

    def render(self, messages: list[dict[str, Any]], prompt: bool, tools: Any = None, extra: Any = None) -> str:
        text = self.raw(messages, prompt, tools, extra)
        return BLOCK_EDGES.sub("", text) if self.has_generation else text

    def answer(self, job: dict[str, Any], seconds: float = 0, most: int = _STUDY_CHARACTERS) -> dict[str, Any]:
        """The text of a conversation; if the job says which messages are trained, also their spans, and what the text
        leaves out. ``seconds``: of CPU time for all of it, a small part of which is for the first rendering."""
        self.most = most
        _limit_time(min(seconds, _FIRST_SECONDS + _SECONDS_PER_MESSAGE * len(job["messages"])))
        tools, extra = job.get("tools"), job.get("extra")
        messages, losses = self.forms.fit(job["messages"], tools, extra)
        if "trained" not in job:
            return {"text": self.render(messages, job["prompt"], tools, extra)}
        raw = self.raw(messages, False, tools, extra)
        _limit_time(seconds)
        text = BLOCK_EDGES.sub("", raw)
        losses = self.forms.losses(messages, extra, text) if losses is None else losses
        trained = job["trained"]
        empty = [i for i in losses.empty if trained[i] and messages[i]["role"] == "assistant"]
        spans = generation_spans(raw, text, messages, trained, facts=self.facts, empty=empty)
        follows = True
        if spans is None:
            spans, follows = turn_spans(
                lambda m, prompt: self.render(m, prompt, tools, extra), messages, trained, text, special=self.special,
                facts=self.facts, empty=empty,
            )  # fmt: skip
        notes = [f"the chat template does not write {_LOST[kind]}" for kind in losses.kinds]
        notes += [_EMPTY_TURN] if empty and not all(trained) else []
        notes += [] if follows else [_PROMPT_DIFFERS]
        return {"text": text, "spans": spans, "notes": notes}

    def refuses(self, role: str) -> bool:
        """Whether the template takes conversations, but none that begins with a message of ``role``."""
        if role not in self._refuses:
            plain = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}]
            self._refuses[role] = self._takes(plain) and not self._takes(
                [{"role": role, "content": "Be brief."}, *plain]
            )
        return self._refuses[role]

    def _takes(self, messages: list[dict[str, Any]]) -> bool:
        try:
            self.answer({"messages": messages, "prompt": False}, _FIRST_SECONDS)
        except (Exception, _TooLong):
            return False
        return True


def _refused_role(template: _Template, job: dict[str, Any]) -> str:
    """``system`` (or ``developer``) if the conversation begins with such a message and the template refuses these."""
    role = (job.get("messages") or [{}])[0].get("role")
    return role if role in ("system", "developer") and template.refuses(role) else ""


def _failure(error: BaseException) -> dict[str, Any]:
    if isinstance(error, MemoryError):
        return {"error": "the chat template used more memory than it may"}
    line = getattr(error, "lineno", None)
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>" and isinstance(error, Exception):
            line = trace.tb_lineno
        trace = trace.tb_next
    kind = "" if isinstance(error, (jinja2.TemplateError, ValueError, _TooLong)) else f"{type(error).__name__}: "
    said = " ".join(f"{kind}{error}"[:10_000].split())[:500]
    return {"error": said, "line": line, "kind": type(error).__name__}


class _TooMuchError(ValueError):
    """More text than a conversation of this size gives."""


class _TooLong(BaseException):
    """Not an Exception, so that nothing on the way catches it."""


def _alarm(signum: int, frame: FrameType | None) -> None:
    raise _TooLong("the chat template took too long to render")


def _limit_time(seconds: float) -> None:
    """Raise _TooLong after so much CPU time; the system ends a process that hangs a little later. 0: no limit."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)
    limit_cpu(seconds + _SLACK_SECONDS if seconds else 0)


def main() -> None:
    """Read a line that sets the template up, then lists of jobs; write a line for each."""
    limit_memory(_MEMORY_LIMIT)
    if hasattr(signal, "SIGPROF"):
        signal.signal(signal.SIGPROF, _alarm)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    template: _Template | None = None
    for line in sys.stdin:
        for item in json.loads(line):
            job, begun = item["job"], time.process_time()
            answer: dict[str, Any]
            try:
                if template is None:
                    _limit_time(item["seconds"])
                    template = _Template(job)
                    facts = template.facts
                    notes = [] if facts.keeps_its_prompt else [_PROMPT_DIFFERS]
                    answer = {"ends": facts.ends, "notes": [*notes, _DATED] if template.dated else notes}
                else:
                    answer = template.answer(job, item["seconds"], item["most"])
            except (Exception, _TooLong) as error:
                answer = _failure(error)
                plain = not isinstance(error, (AmbiguousTemplateError, _TooLong, _TooMuchError, MemoryError))
                if plain and template is not None:
                    answer["refused_role"] = _refused_role(template, job)
            finally:
                _limit_time(0)
            answer["cpu"] = time.process_time() - begun
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
