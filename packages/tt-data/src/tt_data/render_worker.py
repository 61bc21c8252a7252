"""The process in which chat templates run: ``python -m tt_data.render_worker``, JSON lines in and out.

A chat template comes with the model and is not trusted. It runs in Jinja's immutable sandbox; this process has a limit
on its memory, on the time of each rendering, an empty environment, and its parent kills it when it does not answer.
"""

from __future__ import annotations

import json
import re
import secrets
import signal
import sys
from datetime import datetime
from types import FrameType
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from tt_data.rendered import alternatives
from tt_data.turn_spans import find_turn_ends, keeps_its_prompt, turn_spans

_MEMORY_LIMIT = 1 << 30
_OPEN, _CLOSE = (secrets.token_hex(12) for _ in range(2))
_MARKS = re.compile(f"{_OPEN}|{_CLOSE}")


class _Generation(jinja2.ext.Extension):
    """``{% generation %} ... {% endgeneration %}``: what the model writes, enclosed in two marks."""

    tags = {"generation"}  # noqa: RUF012  jinja's own attribute

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    @staticmethod
    def _mark(caller: Any) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


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
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


class _Template:
    """One compiled template and what it is rendered with."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self.template = make_environment().from_string(setup["source"])
        self.variables: dict[str, Any] = setup["variables"]
        self.output_limit: int = setup["output_limit"]
        self.control = alternatives(setup["controls"]) if setup["controls"] else None
        self.has_generation = re.search(r"\{%[-+]?\s*generation\b", setup["source"]) is not None
        self.ends: list[str] = []
        self.ends = find_turn_ends(self.render, self.control)
        self.ends += [end for end in setup["ends"] if end not in self.ends]
        self.keeps_its_prompt = keeps_its_prompt(self.render)

    def raw(self, messages: list[dict[str, Any]], prompt: bool, tools: Any = None, extra: Any = None) -> str:
        pieces: list[str] = []
        size = 0
        variables = {**self.variables, **(extra or {}), "messages": messages, "tools": tools or None, "documents": None}
        for piece in self.template.generate(variables, add_generation_prompt=prompt):
            size += len(piece)
            if size > self.output_limit:
                raise ValueError(f"the chat template wrote more than {self.output_limit} characters")
            pieces.append(piece)
        return "".join(pieces)

    def render(self, messages: list[dict[str, Any]], prompt: bool, tools: Any = None, extra: Any = None) -> str:
        text = self.raw(messages, prompt, tools, extra)
        return _MARKS.sub("", text) if self.has_generation else text

    def spans(self, job: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        messages, trained = job["messages"], job["trained"]
        assistant = [message["role"] == "assistant" for message in messages]
        if self.has_generation and not any(t and not a for t, a in zip(trained, assistant, strict=True)):
            found = self._generation_spans(job)
            if found is not None:
                return found
        return turn_spans(
            lambda m, prompt: self.render(m, prompt, job.get("tools"), job.get("extra")),
            messages, trained, control=self.control, ends=self.ends,
        )  # fmt: skip

    def _generation_spans(self, job: dict[str, Any]) -> tuple[str, list[tuple[int, int]]] | None:
        """The blocks that the template itself marks; None when they are not one for each assistant turn."""
        text = self.raw(job["messages"], False, job.get("tools"), job.get("extra"))
        pieces: list[str] = []
        blocks: list[list[int]] = []
        length = position = 0
        for match in _MARKS.finditer(text):
            pieces.append(text[position : match.start()])
            length += match.start() - position
            position = match.end()
            if match.group() == _OPEN:
                blocks.append([length, length])
            else:
                blocks[-1][1] = length
        full = "".join([*pieces, text[position:]])
        flags = [t for m, t in zip(job["messages"], job["trained"], strict=True) if m["role"] == "assistant"]
        if len(flags) != len(blocks):
            if all(flags) and blocks:
                flags = [True] * len(blocks)
            else:
                return None
        return full, [(a, self._with_end(full, b)) for (a, b), wanted in zip(blocks, flags, strict=True) if wanted]

    def _with_end(self, full: str, end: int) -> int:
        """A block that stops just before the end-of-turn token takes it in: it must be trained."""
        if any(full.endswith(token, 0, end) or full[:end].rstrip().endswith(token) for token in self.ends):
            return end
        return next((end + len(token) for token in self.ends if full.startswith(token, end)), end)


def _answer(template: _Template, job: dict[str, Any]) -> dict[str, Any]:
    if "trained" in job:
        text, spans = template.spans(job)
        return {"text": text, "spans": spans}
    return {"text": template.render(job["messages"], job["prompt"], job.get("tools"), job.get("extra"))}


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
    return {"error": " ".join(f"{kind}{error}".split())[:500], "line": line, "kind": type(error).__name__}


class _TooLong(BaseException):
    """Not an Exception: nothing on the way may catch it."""


def _alarm(signum: int, frame: FrameType | None) -> None:
    raise _TooLong("the chat template took too long to render")


def _limit_time(seconds: float) -> None:
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # no such limit on Windows: the parent's time limit remains
        return
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = _MEMORY_LIMIT if hard == resource.RLIM_INFINITY else min(_MEMORY_LIMIT, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def main() -> None:
    """Read a set-up line, then lists of jobs; write a line for each."""
    _limit_memory()
    if hasattr(signal, "SIGVTALRM"):
        signal.signal(signal.SIGVTALRM, _alarm)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    template: _Template | None = None
    for line in sys.stdin:
        request = json.loads(line)
        answers: list[dict[str, Any]] = []
        for item in request:
            job = item["job"]
            try:
                _limit_time(item["seconds"])
                if template is None:
                    template = _Template(job)
                    answers.append({"ends": template.ends, "keeps_its_prompt": template.keeps_its_prompt})
                else:
                    answers.append(_answer(template, job))
            except (Exception, _TooLong) as error:
                answers.append(_failure(error))
            finally:
                _limit_time(0)
        sys.stdout.write(json.dumps(answers) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
