"""``tt completion``: the script that teaches a shell the words of ``tt``."""

import click

from tt_cli.completion import SCRIPTS
from tt_cli.group import Verb
from tt_cli.terminal import answer


@click.command(
    "completion",
    cls=Verb,
    examples=[
        "tt completion bash",
        "tt completion zsh",
        "tt completion fish",
    ],
)
@click.argument("shell", type=click.Choice(list(SCRIPTS)))
def command(shell: str) -> None:
    """Print the script that completes verbs, options, recipes, configs, runs and config keys in SHELL.

    \b
    bash: eval "$(tt completion bash)" in ~/.bashrc
    zsh:  eval "$(tt completion zsh)" in ~/.zshrc
    fish: tt completion fish > ~/.config/fish/completions/tt.fish
    """
    answer(SCRIPTS[shell], nl=False)
