"""``tt generate``: one prompt, one answer."""

import sys

import click

from tt_cli.group import Verb, json_option, print_json
from tt_cli.talk import Sampling, Speaker, sampling_options


@click.command("generate", cls=Verb)
@click.argument("model", required=False, metavar="[RUN|MODEL]", type=click.Path())
@click.option("-p", "--prompt", metavar="TEXT", help="What to answer; default: standard input.")
@click.option("--system", metavar="TEXT", help="A system message before it.")
@click.option("--raw", is_flag=True, help="Continue TEXT as it stands, in no template.")
@click.option("--no-adapter", is_flag=True, help="Ask the base model of a run.")
@sampling_options
@json_option
def command(
    model: str | None,
    prompt: str | None,
    system: str | None,
    raw: bool,
    no_adapter: bool,
    as_json: bool,
    **sampling: object,
) -> None:
    """Answer one prompt with RUN or MODEL (default: the newest run)."""
    text = prompt if prompt is not None else _read_stdin()
    if raw and system is not None:
        raise click.UsageError("--system needs the chat template, which --raw leaves out: give one of the two")
    speaker = Speaker(model, adapter=not no_adapter)
    ids = speaker.raw_ids(text) if raw else speaker.prompt_ids(_messages(system, text))
    answer = speaker.reply(ids, Sampling(**sampling))  # type: ignore[arg-type]
    if as_json:
        print_json({"model": speaker.path, "prompt": text, "text": "".join(answer)})
        return
    for piece in answer:
        click.echo(piece, nl=False)
    click.echo()


def _messages(system: str | None, prompt: str) -> list[dict[str, str]]:
    opening = [{"role": "system", "content": system}] if system is not None else []
    return [*opening, {"role": "user", "content": prompt}]


def _read_stdin() -> str:
    if sys.stdin.isatty():
        raise click.UsageError("no prompt: give -p TEXT, or pipe it in")
    return sys.stdin.read().rstrip("\n")
