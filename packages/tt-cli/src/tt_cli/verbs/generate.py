"""``tt generate``: one prompt, one answer."""

import sys
from pathlib import Path

import click

from tt_cli.group import Verb
from tt_cli.names import complete_runs
from tt_cli.options import base_option, json_option, sampling_options
from tt_cli.talk import Sampling, Speaker, check_text, read_prompt, show_answer
from tt_cli.terminal import print_json
from tt_train.errors import shell_word


@click.command(
    "generate",
    cls=Verb,
    examples=[
        'tt generate runs/first "What is a fjord?"',
        'tt generate Qwen/Qwen3-0.6B -p "What is a fjord?" --max-new-tokens 64 --json',
        'echo "Once upon a time" | tt generate --raw --temperature 0.8',
    ],
)
@click.argument("model", required=False, metavar="[RUN|MODEL]", type=click.Path(), shell_complete=complete_runs)
@click.argument("question", required=False, metavar="[PROMPT]")
@click.option(
    "-p", "--prompt", metavar="TEXT", show_default="standard input", help="Prompt to answer, the same as PROMPT."
)
@click.option("--system", metavar="TEXT", help="System message before the prompt.")
@click.option("--raw", is_flag=True, help="Continue the prompt as plain text, without a template.")
@click.option("--no-adapter", is_flag=True, help="Use the base model of a run, without its adapter.")
@base_option
@sampling_options
@json_option
def command(
    model: str | None,
    question: str | None,
    prompt: str | None,
    system: str | None,
    raw: bool,
    no_adapter: bool,
    base: tuple[str, ...],
    as_json: bool,
    **sampling: object,
) -> None:
    """Answer one prompt with RUN or MODEL (default: the newest run)."""
    model, text = _asked(model, question, prompt)
    if raw and system is not None:
        raise click.UsageError("--system needs the chat template, which --raw leaves out; give only one of them")
    messages = _messages(system, text)
    speaker = Speaker(model, adapter=not no_adapter, base=base)
    ids = speaker.raw_ids(text) if raw else speaker.prompt_ids(messages)
    settings = Sampling(**sampling)  # type: ignore[arg-type]
    answer = speaker.reply(ids, settings)
    if as_json:
        said = {"prompt": text, "text": "".join(answer), "cut": bool(speaker.cut)}
        print_json({"model": speaker.path}, said=said)
        return
    show_answer(answer)
    speaker.tell_cut(settings)


def _messages(system: str | None, prompt: str) -> list[dict[str, str]]:
    opening = [] if system is None else [{"role": "system", "content": check_text(system, "--system")}]
    return [*opening, {"role": "user", "content": prompt}]


def _asked(model: str | None, question: str | None, prompt: str | None) -> tuple[str | None, str]:
    """The model and the prompt. A lone word of several words is a prompt, for no directory or hub id has spaces."""
    if question is None and prompt is None and model is not None and " " in model.strip() and not Path(model).exists():
        model, question = None, model
    if question is not None and prompt is not None:
        raise click.UsageError(f"two prompts, '{question}' and -p '{prompt}'; give only one of them")
    text = question if question is not None else prompt
    if text is None:
        text = "" if sys.stdin.isatty() else read_prompt().rstrip("\n")
        if not text:
            asked = f"tt generate {shell_word(model) if model else 'RUN'}"
            raise click.UsageError(f'no prompt: {asked} "TEXT", or -p TEXT, or pipe it in')
    return model, check_text(text, "the prompt")
