"""The Go template with which Ollama renders a conversation as the model's chat template does."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tt_train.errors import ConfigError
from tt_train.models.go_template import ollama_prompt

_SYSTEM, USER, ANSWER = "0SYSTEM0", "0USER0", "0ANSWER0"  # words that no template contains
_ROLES = {_SYSTEM: "system", USER: "user", ANSWER: "assistant"}
_TURNS = [[USER], [USER, ANSWER, "1USER1"], [USER, ANSWER, "1USER1", "1ANSWER1", "2USER2"]]
_CONVERSATIONS = [opening + turns for turns in _TURNS for opening in ([], [_SYSTEM])]

Conversation = list[dict[str, str]]
Render = Callable[[list[str]], str]


def adds_bos(tokenizer: Any, form: str = "chat") -> bool:
    """Whether the tokenizer, not the template, puts the first token before a prompt."""
    if form != "chat" or not (tokenizer.adds_bos and tokenizer.has_chat_template):
        return bool(tokenizer.adds_bos)
    return bool(render_words(tokenizer, [USER]).startswith(_bos(tokenizer)))


def go_template(tokenizer: Any) -> str:
    """Ollama's template, made of what the chat template writes around each message, and compared with it.

    It is a sequence of ``.System``, ``.Prompt`` and ``.Response`` if that is enough, else it ranges over ``.Messages``.
    The first token is left out only if the tokenizer adds it.

    Raises:
        ConfigError: if neither renders six conversations (with and without a system message, one to three turns) as
            the chat template does.
    """
    start = _bos(tokenizer) if adds_bos(tokenizer) else ""

    def render(words: list[str]) -> str:
        return render_words(tokenizer, words).removeprefix(start)

    wanted = {}
    for words in _CONVERSATIONS:
        try:
            wanted[tuple(words)] = render(words)
        except ValueError as error:
            if words[0] != _SYSTEM:
                raise ConfigError([f"--to ollama: the chat template refuses a plain conversation: {error}"]) from None
    answered = tokenizer.render(_conversation([USER, ANSWER])).partition(ANSWER)[2]
    differs = "its turns are not a plain sequence"
    for make in (_sequence, _range):
        template = make(wanted, answered)
        if template is not None:
            found = _difference(template, wanted)
            if found is None:
                return template
            differs = found
    raise ConfigError(
        [
            f"--to ollama: no Go template of ours renders as the chat template does ({differs}); use --to hf: vLLM, "
            "SGLang and llama.cpp (--jinja) read the chat template itself"
        ]
    )


def render_words(tokenizer: Any, words: Sequence[str]) -> str:
    return str(tokenizer.render(_conversation(words), add_generation_prompt=True))


def _bos(tokenizer: Any) -> str:
    return "" if tokenizer.bos_id is None else str(tokenizer.decode([tokenizer.bos_id], skip_special=False))


def _conversation(words: Sequence[str]) -> Conversation:
    return [{"role": _role(word), "content": word} for word in words]


def _role(word: str) -> str:
    return "user" if "USER" in word else _ROLES.get(word, "assistant")


def _difference(template: str, wanted: Mapping[tuple[str, ...], str]) -> str | None:
    """A description of the first conversation that ``template`` renders differently; None if there is none."""
    for words in map(tuple, _CONVERSATIONS):
        try:
            found = ollama_prompt(template, _conversation(words))
        except ValueError:
            if words in wanted:
                raise
            continue  # both refuse a system message
        if found != wanted.get(words):
            system = "a system message and " if words[0] == _SYSTEM else ""
            turns = sum("USER" in word for word in words)
            return f"with {system}{turns} turns it writes {wanted.get(words)!r:.200}, not {found!r:.200}"
    return None


# ---- what the chat template writes between the words -----------------------------------------------------------------


def _gaps(text: str, words: Sequence[str]) -> list[str] | None:
    """The text before, between and after ``words``; None unless each occurs once, in this order."""
    if any(text.count(word) != 1 for word in words):
        return None
    gaps = []
    for word in words:
        before, found, text = text.partition(word)
        if not found:
            return None
        gaps.append(before)
    return [*gaps, text]


def literal(text: str) -> str:
    """``text`` as a Go template that writes it."""
    return re.sub(r'\{*"""|\{\{+|\{$', lambda found: f"{{{{ `{found.group()}` }}}}", text)


def _if(condition: str, text: str, otherwise: str = "") -> str:
    if not text and not otherwise:
        return ""
    otherwise = f"{{{{ else }}}}{otherwise}" if otherwise else ""
    return f"{{{{ if {condition} }}}}{text}{otherwise}{{{{ end }}}}"


_REFUSED = _if(".System", "{{ slice `no system role` 99 }}")  # an error that contains these words, as in Jinja


def _sequence(wanted: Mapping[tuple[str, ...], str], _closing: str) -> str | None:
    """A template of ``.System``, ``.Prompt`` and ``.Response``: every turn begins alike."""
    two = _gaps(wanted[tuple(_CONVERSATIONS[2])], _CONVERSATIONS[2])
    if two is None or not two[2].endswith(two[0]):
        return None
    start, asks, answered, _ = two
    with_system = wanted.get((_SYSTEM, USER))
    if with_system is None:
        system = _REFUSED
    elif _SYSTEM not in with_system:
        system = ""
    else:
        parts = _gaps(with_system, [_SYSTEM, USER])
        if parts is None or not parts[1].endswith(start):
            return None
        before, after = parts[0], parts[1].removesuffix(start)
        system = _if(".System", f"{literal(before)}{{{{ .System }}}}{literal(after)}")
    turn = _if(".Prompt", f"{literal(start)}{{{{ .Prompt }}}}{literal(asks)}")
    return f"{system}{turn}{{{{ .Response }}}}{literal(answered.removesuffix(start))}"


def _range(wanted: Mapping[tuple[str, ...], str], closing: str) -> str | None:
    """A template that ranges over ``.Messages``, with one turn without them for programs that do not know them."""
    two = _gaps(wanted[tuple(_CONVERSATIONS[2])], _CONVERSATIONS[2])
    if two is None:
        return None
    start, asks, answered, end = two
    system = _system_place(wanted, answered)
    if system is None:
        return None
    before, after, in_last = system
    opens = answered.removeprefix(closing)  # what starts a turn of the user, if it is the same everywhere
    if not all(text.endswith(opens) for text in ([start] if in_last or before is None else [start, after])):
        opens = ""
    head, closes = start.removesuffix(opens), answered.removesuffix(opens)
    folded = ""
    if before is None:
        head = ("" if (_SYSTEM, USER) in wanted else _REFUSED) + literal(head)
    elif in_last:
        head = literal(head)
        folded = f"{literal(before)}{{{{ $.System }}}}{literal(after)}"
    else:
        head = _head(head, before, after.removesuffix(opens))
    asked = _if("$last", literal(end), literal(asks)) if not asks.startswith(end) else literal(end)
    answers = literal(asks.removeprefix(end)) if asks.startswith(end) else ""
    user = f"{literal(opens)}{_if('and $last $.System', folded)}{{{{ .Content }}}}{asked}"
    assistant = f"{answers}{{{{ .Content }}}}{_if('not $last', literal(closes))}"
    ranged = (
        "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        f"{{{{ if eq .Role `user` }}}}{user}{{{{ else if eq .Role `assistant` }}}}{assistant}{{{{ end }}}}{{{{ end }}}}"
    )
    alone = f"{literal(opens)}{_if('.System', folded)}{{{{ .Prompt }}}}{literal(end)}{{{{ .Response }}}}"
    return f"{head}{_if('.Messages', ranged, alone + literal(closing))}"


def _system_place(wanted: Mapping[tuple[str, ...], str], answered: str) -> tuple[str | None, str, bool] | None:
    """What is written before and after the system message, and whether it is in the last turn, not the first.

    (None, "", False) if the template writes no system message; None if its place is not known.
    """
    one, two = wanted.get((_SYSTEM, USER)), wanted.get(tuple(_CONVERSATIONS[3]))
    if one is None or two is None or _SYSTEM not in one + two:
        return None, "", False
    first = _gaps(two, _CONVERSATIONS[3])
    if first is not None:
        return first[0], first[1], False
    last = _gaps(two, [USER, ANSWER, _SYSTEM, _CONVERSATIONS[2][-1]])
    if last is None or not last[2].startswith(answered):
        return None
    return last[2].removeprefix(answered), last[3], True


def _head(default: str, before: str, after: str) -> str:
    """What comes before the first turn: ``before``, the system message and ``after``, or without one ``default``."""
    shared = next((text for text in (before, default) if default.startswith(text) and before.startswith(text)), "")
    rest, tail = default.removeprefix(shared), after
    tail = after if after and rest.endswith(after) else ""
    own = f"{literal(before.removeprefix(shared))}{{{{ .System }}}}{literal(after.removesuffix(tail))}"
    return f"{literal(shared)}{_if('.System', own, literal(rest.removesuffix(tail)))}{literal(tail)}"
