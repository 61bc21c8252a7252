"""``tt chat``: talk to a model in the template that it was trained with."""

import sys
from collections.abc import Iterator

import click

from tt_cli.group import Verb
from tt_cli.names import complete_runs
from tt_cli.options import base_option, sampling_options
from tt_cli.talk import Messages, Sampling, Speaker, check_text, read_prompts
from tt_cli.terminal import answer, say
from tt_train.errors import did_you_mean

COMMANDS = {
    "/exit": "leave the chat, as Ctrl-D does",
    "/reset": "forget the conversation",
    "/system": "TEXT: start over with this system message, or without one if TEXT is left out",
    "/help": "show these lines",
}


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
@sampling_options
def command(model: str | None, system: str | None, no_adapter: bool, base: tuple[str, ...], **sampling: object) -> None:
    """Chat with RUN or MODEL (default: the newest run).

    Each line of standard input is a prompt. /help lists the commands of the conversation.
    """
    speaker = Speaker(model, adapter=not no_adapter, base=base)
    settings = Sampling(**sampling)  # type: ignore[arg-type]
    interactive = sys.stdin.isatty()
    if interactive:
        alone = (
            "" if speaker.form == "chat" else f" (trained on {speaker.form} prompts, so each is answered on its own)"
        )
        say(f"{speaker.path}{alone}; /help shows commands, /exit leaves", err=True)
    messages = _opening(system)
    for line in _lines(interactive):
        word, _, rest = line.partition(" ")
        if word in ("/exit", "/quit"):
            return
        if word == "/help":
            for name, does in COMMANDS.items():
                say(f"{name:<8} {does}", err=True)
        elif word == "/reset":
            messages = [message for message in messages if message["role"] == "system"]
        elif word == "/system":
            messages = _opening(rest.strip() or None)
        elif interactive and word.startswith("/"):
            say(f"no command {word}{did_you_mean(word, COMMANDS)}", err=True)
        else:
            _take_turn(speaker, messages, line, settings)


def _opening(system: str | None) -> Messages:
    return [] if system is None else [{"role": "system", "content": check_text(system, "--system")}]


def _lines(interactive: bool) -> Iterator[str]:
    """Prompts that are not blank, from the keyboard or from a pipe."""
    if not interactive:
        yield from read_prompts()
        return
    import readline  # noqa: F401  (input() then has a history and can be edited)

    while True:
        try:
            line = check_text(input("> "), "the prompt")
        except EOFError:
            say()
            return
        except UnicodeDecodeError:
            say("the prompt: not UTF-8", err=True)
            continue
        except ValueError as error:
            say(error, err=True)
            continue
        if line.strip():
            yield line


def _take_turn(speaker: Speaker, messages: Messages, prompt: str, settings: Sampling) -> None:
    """Print the answer as it grows; both sides join the conversation. Ctrl-C cuts the answer, not the conversation."""
    messages.append({"role": "user", "content": prompt})
    said = []
    try:
        for piece in speaker.reply(speaker.prompt_ids(messages), settings):
            said.append(piece)
            answer(piece, nl=False)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
    except ValueError as error:
        messages.pop()
        if not sys.stdin.isatty():
            raise
        say(f"{error}; /reset forgets the conversation", err=True)
        return
    answer("")
    speaker.tell_cut(settings)
    messages.append({"role": "assistant", "content": "".join(said)})
