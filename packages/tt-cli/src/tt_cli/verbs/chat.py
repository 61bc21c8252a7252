"""``tt chat``: talk to a model in the template that it was trained with."""

import json
import shutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import click

from tt_cli.group import Verb
from tt_cli.names import complete_runs
from tt_cli.options import base_option, device_option, sampling_options
from tt_cli.prompts import check_text, read_lines
from tt_cli.reply import Reply, Stats
from tt_cli.talk import Messages, Sampling, Speaker, tell_cut, tell_room
from tt_cli.terminal import answer, say, tell
from tt_train.errors import did_you_mean

COMMANDS = {
    "/help": "show these lines",
    "/reset": "forget the conversation, but not the system message",
    "/system": "TEXT: start over with this system message, or with none",
    "/retry": "answer the last message again",
    "/compare": "TEXT: answer TEXT or the last message, with and without the adapter",
    "/save": "FILE.jsonl: append the conversation to a file of rows for tt run",
    "/exit": "leave the chat, as Ctrl-D does",
}
_BLOCK = '"""'
_NARROWEST = 60  # columns of a terminal on which two answers fit beside each other


@click.command(
    "chat",
    cls=Verb,
    examples=[
        "tt chat",
        'echo "What is a fjord?" | tt chat runs/first',
        'tt chat Qwen/Qwen3-0.6B --system "Answer in one sentence." --temperature 0.7',
    ],
)
@click.argument("model", required=False, metavar="[RUN|MODEL]", type=click.Path(), shell_complete=complete_runs)
@click.option("--system", metavar="TEXT", help="System message to start the conversation with.")
@click.option("--no-adapter", is_flag=True, help="Use the base model of a run, without its adapter.")
@base_option
@device_option
@sampling_options
@click.option("--stats", is_flag=True, help="Show tokens per second, the time to the first token and peak memory.")
def command(
    model: str | None, system: str | None, no_adapter: bool, base: tuple[str, ...], stats: bool, **sampling: Any
) -> None:
    """Chat with RUN or MODEL (default: the newest run).

    Each line of standard input is a prompt; on a terminal, several lines go between two lines of three quotes.
    /help lists the commands of the conversation. Ctrl-C stops an answer.
    """
    speaker = Speaker(model, adapter=not no_adapter, base=base, device=sampling.pop("device"))
    chat = Chat(speaker, speaker.sampling(sampling), stats=stats)
    chat.start_over(None if system is None else check_text(system, "--system"))
    speaker.load()
    if chat.interactive:
        alone = (
            "" if speaker.form == "chat" else f" (trained on {speaker.form} prompts, so each is answered on its own)"
        )
        say(f"{speaker.path}{alone}; /help shows commands, /exit leaves", err=True)
    for line in _lines(chat.interactive):
        word, _, rest = line.strip().partition(" ")
        if word in ("/exit", "/quit"):
            return
        if word in COMMANDS:
            chat.obey(word, rest.strip())
        elif chat.interactive and word.startswith("/") and "\n" not in line:
            say(f"no command {word}{did_you_mean(word, COMMANDS) or '; /help lists them'}", err=True)
        else:
            chat.ask(line)


class Chat:
    """A conversation with a model. What no longer fits into its context stays in ``turns``, and is said."""

    def __init__(self, speaker: Speaker, settings: Sampling, *, stats: bool) -> None:
        self.speaker, self.settings, self.stats = speaker, settings, stats
        self.interactive = sys.stdin.isatty()
        self.opening: Messages = []
        self.turns: Messages = []  # of the user and of the model, in turn
        self.first = 0  # the first turn that the model still reads
        self.attempt = 0

    def start_over(self, system: str | None) -> None:
        """An empty conversation with this system message."""
        self.opening = [] if system is None else [{"role": "system", "content": system}]
        self.forget()

    def forget(self) -> None:
        """An empty conversation."""
        if self.turns and self.interactive:
            tell("(a new conversation)")
        self.turns, self.first = [], 0

    def obey(self, word: str, rest: str) -> None:
        """A command. In a pipe its mistake ends the chat, on a terminal it is said."""
        try:
            if word == "/help":
                for name, does in COMMANDS.items():
                    say(f"{name:<9} {does}", err=True)
            elif word == "/reset":
                self.forget()
            elif word == "/system":
                self.start_over(rest or None)
            elif word == "/retry":
                self.retry()
            elif word == "/compare":
                self.compare(rest)
            else:
                self.save(rest)
        except (ValueError, OSError) as error:
            if not self.interactive:
                raise
            say(error, err=True)

    def ask(self, prompt: str) -> None:
        """Print the answer as it grows; both sides join the conversation. Ctrl-C stops the answer alone."""
        turns = [*self.turns, {"role": "user", "content": prompt}]
        said: list[str] = []
        replies: list[Reply] = []
        self.speaker.stats = Stats()
        try:
            ids = self._ids(turns)
            tell_room(self.speaker, ids, self.settings)
            for _, reply, piece in self._replies(ids, turns):
                replies.append(reply)
                said.append(piece)
                answer(piece, nl=False)
        except KeyboardInterrupt:
            if not self.interactive:
                raise
        except ValueError as error:
            if not self.interactive:
                raise
            say(f"{error}; /reset forgets the conversation", err=True)
            return
        answer("")
        if not replies or replies[-1].finish is None:
            tell("(stopped)" if replies else "(stopped before the first word; the message is forgotten)")
        if replies:
            tell_cut(replies[-1])
            self.turns = [*turns, {"role": "assistant", "content": "".join(said)}]
        if self.stats:
            self.speaker.stats.show()

    def retry(self) -> None:
        """Answer the last message again, and forget the first answer."""
        prompt = self._last_prompt()
        if not self.settings.temperature:
            raise ValueError("at temperature 0 the answer would be the same; start tt chat with --temperature 0.8")
        before, self.turns = self.turns, self.turns[:-2]
        self.attempt += 1
        self.ask(prompt)
        if len(self.turns) < len(before):
            self.turns = before  # stopped

    def compare(self, prompt: str) -> None:
        """Answers with and without the adapter; ``prompt`` joins the conversation with the first of them."""
        if not self.speaker.has_adapter:
            raise ValueError(f"{self.speaker.path} has no adapter here, so there is nothing to compare with")
        before = self.turns if prompt else self.turns[:-2]
        turns = [*before, {"role": "user", "content": prompt or self._last_prompt()}]
        ids = self._ids(turns)
        texts: list[str] = []
        try:
            for adapter in (True, False):
                found = list(self._replies(ids, turns, adapter=adapter))
                texts.append("".join(piece for _, _, piece in found))
                tell_cut(found[-1][1])
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            tell("(stopped)")
            return
        titles = ("with the adapter", "without the adapter")
        for line in _beside(titles, texts):
            answer(line)
        if prompt:
            self.turns = [*turns, {"role": "assistant", "content": texts[0]}]

    def save(self, name: str) -> None:
        """Append the conversation to a file of rows."""
        from tt_ckpt.files import append_text
        from tt_ckpt.safe_names import from_home

        if not name.endswith(".jsonl"):
            raise ValueError("/save needs the name of a .jsonl file, such as /save chat.jsonl")
        if not self.turns:
            raise ValueError("there is nothing to save yet")
        rows = _rows(self.speaker.form, self.opening, self.turns)
        append_text(from_home(name), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        tell(f"{len(rows)} {'row' if len(rows) == 1 else 'rows'} appended to {name}")

    def _last_prompt(self) -> str:
        if not self.turns:
            raise ValueError("there is no message yet")
        return str(self.turns[-2]["content"])

    def _replies(self, ids: list[int], turns: Messages, *, adapter: bool = True) -> Iterator[tuple[int, Reply, str]]:
        numbers = [(len(turns) // 2, self.attempt)]
        return self.speaker.replies([ids], self.settings, numbers=numbers, adapter=adapter)

    def _ids(self, turns: Messages) -> list[int]:
        """The prompt. The oldest turns leave it as far as they leave no room for an answer, which is said."""
        if self.speaker.form != "chat":
            return self.speaker.prompt_ids([*self.opening, *turns[-1:]])
        limit = self.speaker.limit
        assert limit is not None, "the model is loaded"
        room = min(self.settings.max_new_tokens, limit // 4)
        first = min(self.first, len(turns) - 1)
        whole = ids = self.speaker.prompt_ids([*self.opening, *turns[first:]])
        while len(ids) > limit - room and first + 2 < len(turns):
            first += 2
            ids = self.speaker.prompt_ids([*self.opening, *turns[first:]])
        if first > self.first:
            say(f"(the conversation has {len(whole)} tokens, and {self.speaker.path} can read {limit} with the answer: "
                f"its first {first} messages are no longer read)", err=True)  # fmt: skip
        self.first = first
        return ids


def _rows(form: str, opening: Messages, turns: Messages) -> list[dict[str, Any]]:
    """The conversation as rows of the form that the model was trained on."""
    if form == "chat":
        return [{"messages": [*opening, *turns]}]
    names = {"text": ("prompt", "completion"), "alpaca": ("instruction", "output")}.get(form)
    if names is None:
        raise ValueError(f"answers to {form} prompts cannot be saved; copy them into rows of your own")
    pairs = zip(turns[::2], turns[1::2], strict=True)
    return [{names[0]: asked["content"], names[1]: said["content"]} for asked, said in pairs]


def _beside(titles: tuple[str, str], texts: list[str]) -> Iterator[str]:
    """Two texts, beside each other on a terminal that is wide enough."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    if width < _NARROWEST:
        for title, text in zip(titles, texts, strict=True):
            yield f"{title}:\n{text}"
        return
    column = (width - 3) // 2
    sides = [
        [title, "-" * column, *(part for line in text.splitlines() for part in textwrap.wrap(line, column) or [""])]
        for title, text in zip(titles, texts, strict=True)
    ]
    for number in range(max(map(len, sides))):
        left, right = (side[number] if number < len(side) else "" for side in sides)
        yield f"{left:<{column}} | {right}".rstrip()


def _lines(interactive: bool) -> Iterator[str]:
    """Prompts that are not blank, from the keyboard or from a pipe."""
    if not interactive:
        yield from read_lines()
        return
    with suppress(ImportError):
        import readline  # noqa: F401  (input() then has a history and can be edited)

    while True:
        try:
            line = _typed("> ")
            if line.strip() == _BLOCK or (line.startswith(_BLOCK) and _BLOCK not in line[3:]):
                line = _block(line)
        except EOFError:
            say(err=True)
            return
        except KeyboardInterrupt:
            say("\n(/exit or Ctrl-D leaves)", err=True)
            continue
        except UnicodeDecodeError:
            say("the prompt: not UTF-8", err=True)
            continue
        except ValueError as error:
            say(error, err=True)
            continue
        if line.strip():
            yield line


def _block(line: str) -> str:
    """The lines up to the next three quotes."""
    lines = [line.strip()[len(_BLOCK) :]]
    while not lines[-1].rstrip().endswith(_BLOCK):
        lines.append(_typed(". "))
    lines[-1] = lines[-1].rstrip()[: -len(_BLOCK)]
    return "\n".join(lines).strip("\n")


def _typed(prompt: str) -> str:
    """A line from the keyboard. The prompt is shown on the terminal, and never in a pipe that stdout leads to."""
    if sys.stdout.isatty():
        return check_text(input(prompt), "the prompt")
    say(prompt, err=True, nl=False)
    return check_text(input(), "the prompt")
