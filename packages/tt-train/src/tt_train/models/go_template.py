"""The part of Go's text/template that a Modelfile needs, executed as Ollama does: the check before one is written.

https://pkg.go.dev/text/template. Actions: values, variables, ``if``, ``range``, comments and trim marks; functions:
those of ``_FUNCTIONS``. Anything else is a ValueError.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_WORD = re.compile(
    r"\s*(?:(?P<raw>`[^`]*`)|(?P<text>\"(?:\\.|[^\"\\])*\")|(?P<mark>:=|[(),|])|(?P<number>-?\d+)"
    r"|(?P<name>\$?[\w.]+|\$))"
)
_OPENS = re.compile(r"\{\{(-\s)?")
_BODY = re.compile(r"(?:`[^`]*`|\"(?:\\.|[^\"\\])*\"|/\*.*?\*/|(?!\}\}).)*?(?P<closes>\s-\}\}|\}\})", re.DOTALL)

Node = tuple[Any, ...]  # ("text", str), ("print", Value), ("set", name, Value), ("if" or "range", ...)
Value = tuple[Any, ...]  # ("constant", any), ("field", variable or None, names), ("call", name, values)


def ollama_prompt(template: str, messages: Sequence[Mapping[str, str]]) -> str:
    """The prompt that Ollama makes of a conversation, by a Modelfile's TEMPLATE.

    One with ``.Messages`` runs once over all of them. One without runs for each finished turn with ``.System``,
    ``.Prompt`` and ``.Response``, and the last time as far as ``.Response``.
    """
    nodes = parse(template)
    if _mentions(nodes, "Messages"):
        collated: list[dict[str, str]] = []
        for message in messages:
            if collated and collated[-1]["Role"] == message["role"]:
                collated[-1]["Content"] += "\n\n" + message["content"]
            else:
                collated.append({"Role": message["role"], "Content": message["content"]})
        system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
        return execute(nodes, {"System": system, "Messages": collated, "Response": ""})
    names = {"system": "System", "user": "Prompt", "assistant": "Response"}
    turn, written = dict.fromkeys(names.values(), ""), ""
    for message in messages:
        name = names[message["role"]]
        begun = turn["Response"] or (name == "System" and turn["Prompt"])
        if begun and name != "Response":
            written, turn = written + execute(nodes, turn), dict.fromkeys(names.values(), "")
        turn[name] = message["content"]
    return written + execute(_until_response(nodes)[0], turn)


def execute(nodes: Sequence[Node], data: Mapping[str, Any]) -> str:
    """The text of parsed nodes over ``data``; ValueError if Go would print ``<no value>`` or stop with an error."""
    return "".join(_run(nodes, _Scope(data, {"$": data})))


def parse(template: str) -> list[Node]:
    """The nodes of a template; ValueError for what is not valid or not known here."""
    parser = _Parser(template)
    nodes, end = parser.nodes()
    if end is not None:
        raise ValueError(f"{{{{ {end} }}}} without an opening action")
    return nodes


@dataclass
class _Scope:
    dot: Any
    variables: dict[str, Any]


@dataclass
class _Parser:
    template: str
    at: int = 0
    trim_next: bool = False
    words: list[tuple[str, str]] = field(default_factory=list)

    def nodes(self) -> tuple[list[Node], str | None]:
        """Nodes as far as an ``end`` or ``else``, and that action's words."""
        found: list[Node] = []
        while (opens := _OPENS.search(self.template, self.at)) is not None:
            text = self.template[self.at : opens.start()]
            text = text.lstrip() if self.trim_next else text
            found.append(("text", text.rstrip() if opens[1] else text))
            body = _BODY.match(self.template, opens.end())
            if body is None:
                raise ValueError(f"an action is not closed: {self.template[opens.start() : opens.start() + 30]!r}")
            self.at, self.trim_next = body.end(), len(body["closes"]) > 2
            action = self.template[opens.end() : body.start("closes")].strip()
            if action == "end" or action.split(maxsplit=1)[:1] == ["else"]:
                return found, action
            if not action.startswith("/*"):
                found.append(self.action(action))
        text = self.template[self.at :]
        self.at = len(self.template)
        found.append(("text", text.lstrip() if self.trim_next else text))
        return found, None

    def action(self, action: str) -> Node:
        keyword, _, rest = action.partition(" ")
        if keyword == "if":
            return self.branch("if", (), self.value(rest))
        if keyword == "range":
            names, found, source = rest.rpartition(":=")
            variables = tuple(name.strip() for name in names.split(",")) if found else ()
            return self.branch("range", variables, self.value(source))
        if keyword in ("with", "define", "template", "block", "break", "continue"):
            raise ValueError(f"{{{{ {keyword} }}}} is not used in a Modelfile written here")
        name, found, source = action.partition(":=")
        if found and re.fullmatch(r"\$\w+", name.strip()):
            return ("set", name.strip(), self.value(source))
        return ("print", self.value(action))

    def branch(self, kind: str, variables: tuple[str, ...], value: Value) -> Node:
        body, end = self.nodes()
        otherwise: list[Node] = []
        if end is not None and end.startswith("else"):
            rest = end.removeprefix("else").strip()
            if rest:  # else if: one more branch, closed by the same end
                otherwise = [self.action(rest)]
                return (kind, variables, value, body, otherwise)
            otherwise, end = self.nodes()
        if end != "end":
            raise ValueError(f"{{{{ {kind} }}}} without {{{{ end }}}}")
        return (kind, variables, value, body, otherwise)

    def value(self, text: str) -> Value:
        self.words, at = [], 0
        while text[at:].strip():
            word = _WORD.match(text, at)
            if word is None:
                raise ValueError(f"cannot read {text[at:].strip()!r} in {{{{ {text.strip()} }}}}")
            self.words.append((str(word.lastgroup), word[str(word.lastgroup)]))
            at = word.end()
        found = self.pipeline()
        if self.words:
            raise ValueError(f"cannot read {self.words[0][1]!r} in {{{{ {text.strip()} }}}}")
        return found

    def pipeline(self) -> Value:
        found = self.command(())
        while self.words and self.words[0][1] == "|":
            self.words.pop(0)
            found = self.command((found,))
        return found

    def command(self, last: tuple[Value, ...]) -> Value:
        operands: list[Value] = []
        while self.words and self.words[0][1] not in (")", "|"):
            operands.append(self.operand())
        if operands and operands[0][0] == "function":
            return ("call", operands[0][1], (*operands[1:], *last))
        if len(operands) != 1 or last:
            raise ValueError("a value takes no arguments")
        return operands[0]

    def operand(self) -> Value:
        kind, word = self.words.pop(0)
        if word == "(":
            inner = self.pipeline()
            if not self.words or self.words.pop(0)[1] != ")":
                raise ValueError("a parenthesis is not closed")
            return inner
        if kind == "raw":
            return ("constant", word[1:-1])
        if kind == "text":
            return ("constant", re.sub(r"\\(.)", lambda m: {"n": "\n", "t": "\t"}.get(m[1], m[1]), word[1:-1]))
        if kind == "number":
            return ("constant", int(word))
        if kind == "name" and (word.startswith((".", "$"))):
            variable, _, names = word.partition(".")
            return ("field", variable or None, tuple(name for name in names.split(".") if name))
        if word in ("true", "false"):
            return ("constant", word == "true")
        if word in _FUNCTIONS:
            return ("function", word)
        raise ValueError(f"unknown function {word!r}")


def _run(nodes: Iterable[Node], scope: _Scope) -> Iterable[str]:
    for node in nodes:
        if node[0] == "text":
            yield node[1]
        elif node[0] == "print":
            value = _evaluate(node[1], scope)
            if value is None:
                raise ValueError(f"no value for {node[1]}")
            yield str(value).lower() if isinstance(value, bool) else str(value)
        elif node[0] == "set":
            scope.variables[node[1]] = _evaluate(node[2], scope)
        else:
            kind, variables, source, body, otherwise = node
            value = _evaluate(source, scope)
            items = list(enumerate(value or ())) if kind == "range" else [(0, scope.dot)] if value else []
            for index, item in items:
                named = dict(zip(variables[-2:], (index, item) if len(variables) == 2 else (item,), strict=False))
                yield from _run(body, _Scope(item, {**scope.variables, **named}))
            if not items:
                yield from _run(otherwise, _Scope(scope.dot, dict(scope.variables)))


def _evaluate(value: Value, scope: _Scope) -> Any:
    if value[0] == "constant":
        return value[1]
    if value[0] == "call":
        return _call(value[1], [_evaluate(argument, scope) for argument in value[2]])
    _, variable, names = value
    if variable is not None and variable not in scope.variables:
        raise ValueError(f"undefined variable {variable}")
    found = scope.dot if variable is None else scope.variables[variable]
    for name in names:
        if not isinstance(found, Mapping) or (name not in found and "Role" in found):
            raise ValueError(f"no field {name}")
        found = found.get(name)
    return found


def _call(name: str, arguments: list[Any]) -> Any:
    try:
        return _FUNCTIONS[name](*arguments)
    except (TypeError, IndexError) as error:
        raise ValueError(f"error calling {name}: {error}") from None


def _slice(value: Any, start: int = 0, stop: int | None = None) -> Any:
    if not 0 <= start <= (len(value) if stop is None else stop) <= len(value):
        raise IndexError(f"index out of range: {start}")
    return value[start:stop]


def _first(arguments: Sequence[Any], *, true: bool) -> Any:
    return next((argument for argument in arguments if bool(argument) is true), arguments[-1])


_FUNCTIONS: dict[str, Any] = {
    "eq": lambda one, *others: one in others,
    "ne": lambda one, other: one != other,
    "lt": lambda one, other: one < other,
    "gt": lambda one, other: one > other,
    "not": lambda value: not value,
    "and": lambda *values: _first(values, true=False),
    "or": lambda *values: _first(values, true=True),
    "len": len,
    "slice": _slice,
}


def _mentions(nodes: Iterable[Node], name: str) -> bool:
    def inside(part: Any) -> bool:
        if isinstance(part, tuple) and part[:1] == ("field",):
            return name in part[2]
        return isinstance(part, tuple | list) and any(inside(item) for item in part)

    return any(inside(node) for node in nodes)


def _until_response(nodes: Sequence[Node]) -> tuple[list[Node], bool]:
    """The nodes as far as ``{{ .Response }}`` in the order of the text, and whether it came."""
    kept: list[Node] = []
    for node in nodes:
        if node[0] in ("if", "range"):
            kind, variables, value, body, otherwise = node
            body, cut = _until_response(body)
            otherwise, cut = ([], True) if cut else _until_response(otherwise)
            kept.append((kind, variables, value, body, otherwise))
        else:
            kept.append(node)
            cut = node[0] == "print" and _mentions([node], "Response")
        if cut:
            return kept, True
    return kept, False
