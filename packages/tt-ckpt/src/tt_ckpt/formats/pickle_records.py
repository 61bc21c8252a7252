"""Pickles read as plain records, without importing, creating or calling anything that they ask for.

A machine for the opcodes that torch writes. Each call in the file becomes a ``Record``. Steps are counted, so that
neither memory nor time grows beyond the needs of an honest file.
"""

import struct
from collections.abc import Callable
from typing import Any

from tt_ckpt.shown import quoted

MAX_BYTES = 128_000_000
_MAX_STEPS = 5_000_000  # some 120,000 tensors, or parts of them
_MAX_STACK = 200_000
_MAX_MARKS = 1000
_LONG_NAME = 200


class Name(str):
    """A global that the file asks for, as ``module.name``."""


class Record:
    """A call of ``name`` with ``args``; ``state`` is what the result would be given afterwards."""

    __slots__ = ("args", "name", "state")

    def __init__(self, name: str, args: Any) -> None:
        self.name, self.args = name, args
        self.state: Any = None

    def field(self, name: str) -> Any:
        if not isinstance(self.state, dict) or name not in self.state:
            raise ValueError(f"a {self.name.rpartition('.')[2]} lacks {name}")
        return self.state[name]


def read_inert(data: bytes, allowed: Callable[[str], bool], called: Callable[[str], bool]) -> Any:
    """The object in ``data``, with a ``Record`` for each call.

    ValueError, without the file's name, if it is damaged, asks for a name that is not ``allowed``, or calls one that is
    not ``called``.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"a pickle of {len(data)} bytes")
    try:
        return _Machine(data, allowed, called).run()
    except (IndexError, struct.error, UnicodeDecodeError, KeyError, TypeError):
        raise ValueError("a damaged pickle") from None


class _Machine:
    def __init__(self, data: bytes, allowed: Callable[[str], bool], called: Callable[[str], bool]) -> None:
        self.data, self.at, self.allowed, self.called = data, 0, allowed, called
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        data, steps = self.data, _STEPS
        for _ in range(_MAX_STEPS):
            code = data[self.at]
            self.at += 1
            if code == 0x2E:  # STOP
                return self.stack.pop()
            step = steps.get(code)
            if step is None:
                raise ValueError(f"a pickle with the operation {code:#04x}, which torch does not write")
            step(self)
            if len(self.stack) > _MAX_STACK:
                raise ValueError("a pickle that holds too much at once")
        raise ValueError(f"a pickle of more than {_MAX_STEPS} steps")

    # ---- bytes -------------------------------------------------------------------------------------------------------

    def take(self, count: int) -> bytes:
        if not 0 <= count <= len(self.data) - self.at:
            raise ValueError("a damaged pickle: it announces more bytes than there are")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> str:
        end = self.data.index(b"\n", self.at, self.at + _LONG_NAME) if self.at < len(self.data) else -1
        text = self.take(end - self.at).decode()
        self.at += 1
        return text

    def text(self, form: str) -> None:
        self.stack.append(self.take(self.number(form)).decode("utf-8"))

    def raw(self, form: str) -> None:
        self.stack.append(self.take(self.number(form)))

    # ---- values ------------------------------------------------------------------------------------------------------

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def push_name(self, module: object, name: object) -> None:
        whole = f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else ""
        if len(whole) > _LONG_NAME or not self.allowed(whole):
            raise ValueError(f"it asks for {quoted(whole)[1:-1]}")
        self.stack.append(Name(whole))

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.push_name(module, name)

    def call(self) -> None:
        args, name = self.stack.pop(), self.stack.pop()
        if type(name) is not Name or type(args) is not tuple or not self.called(name):
            raise ValueError(f"it calls {quoted(name)}")
        self.stack.append({} if name == "collections.OrderedDict" and not args else Record(name, args))

    def call_with_keys(self) -> None:
        if self.stack.pop() != {}:
            raise ValueError("it calls with keywords")
        self.call()

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is Record and target.state is None:
            target.state = state
        elif type(target) is not dict:  # an ordered dict may have attributes, which nobody reads
            raise ValueError("it changes what is not its own")

    def persistent(self) -> None:
        self.stack.append(Record("storage", (self.stack.pop(),)))

    def mark(self) -> None:
        if len(self.marks) == _MAX_MARKS:
            raise ValueError("a pickle that is nested too deeply")
        self.marks.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def make_tuple(self, count: int | None) -> None:
        items = self.since_mark() if count is None else self.stack[-count:]
        if count is not None:
            if len(items) != count:
                raise ValueError("a damaged pickle")
            del self.stack[-count:]
        self.stack.append(tuple(items))

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise ValueError("it appends to what is not a list")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise ValueError("it sets items of what is not a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # nested tuples with every item twice take forever to hash
            if type(key) not in (str, int, Name, Record):
                raise ValueError(f"it has the key {quoted(key)}, which is not a name")
            target[key] = value

    def keep(self, index: int) -> None:
        self.memo[index] = self.stack[-1]


def _nothing(_: object) -> None:
    pass


_STEPS: dict[int, Callable[[_Machine], None]] = {
    0x80: lambda m: _nothing(m.take(1)),  # PROTO
    0x95: lambda m: _nothing(m.take(8)),  # FRAME
    ord("("): _Machine.mark,
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("J"): lambda m: m.push(m.number("<i")),
    ord("K"): lambda m: m.push(m.number("<B")),
    ord("M"): lambda m: m.push(m.number("<H")),
    ord("G"): lambda m: m.push(m.number(">d")),
    0x8A: lambda m: m.push(int.from_bytes(m.take(m.number("<B")), "little", signed=True)),  # LONG1
    ord("X"): lambda m: m.text("<I"),
    0x8C: lambda m: m.text("<B"),
    ord("U"): lambda m: m.raw("<B"),
    ord("C"): lambda m: m.raw("<B"),
    ord("B"): lambda m: m.raw("<I"),
    ord("]"): lambda m: m.push([]),
    ord("}"): lambda m: m.push({}),
    ord(")"): lambda m: m.push(()),
    ord("t"): lambda m: m.make_tuple(None),
    0x85: lambda m: m.make_tuple(1),
    0x86: lambda m: m.make_tuple(2),
    0x87: lambda m: m.make_tuple(3),
    ord("a"): lambda m: m.append([m.stack.pop()]),
    ord("e"): lambda m: m.append(m.since_mark()),
    ord("s"): lambda m: m.set_items([m.stack.pop(-2), m.stack.pop()]),
    ord("u"): lambda m: m.set_items(m.since_mark()),
    ord("c"): lambda m: m.push_name(m.line(), m.line()),
    0x93: _Machine.stack_global,
    ord("R"): _Machine.call,
    0x81: _Machine.call,  # NEWOBJ
    0x92: _Machine.call_with_keys,  # NEWOBJ_EX
    ord("b"): _Machine.build,
    ord("Q"): _Machine.persistent,
    ord("q"): lambda m: m.keep(m.number("<B")),
    ord("r"): lambda m: m.keep(m.number("<I")),
    0x94: lambda m: m.keep(len(m.memo)),  # MEMOIZE
    ord("h"): lambda m: m.push(m.memo[m.number("<B")]),
    ord("j"): lambda m: m.push(m.memo[m.number("<I")]),
    ord("0"): lambda m: _nothing(m.stack.pop()),
}
