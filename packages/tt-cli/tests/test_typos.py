"""Words with one slip of the keyboard in them: at least 95 % are answered with the word that was meant.

``python test_typos.py`` prints the share of each kind of word.
"""

import random
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

import click
import pytest

from tt_cli import errors
from tt_cli.main import cli
from tt_cli.names import config_keys
from tt_cli.torchrun_words import TORCHRUN
from tt_train.config import SCHEMAS
from tt_train.errors import ConfigError
from tt_train.settings.keys.schema import all_keys, unknown_key
from tt_train.settings.registry import config_names, find_config, recipe_names
from tt_train.settings.torchtune import names as torchtune

ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm", "1234567890")
NEAR = {a: b for row in ROWS for a, b in pairwise(row)} | {row[-1]: row[-2] for row in ROWS}


def slips(word: str, chance: random.Random, each: int) -> set[str]:
    """Words that differ by two letters that changed places, one left out, one typed twice, or one from the next key."""
    made = set()
    while len(made) < min(each, 2 * len(word)):
        at = chance.randrange(len(word))
        kinds = [
            word[:at] + word[at + 1 : at + 2] + word[at : at + 1] + word[at + 2 :],
            word[:at] + word[at + 1 :],
            word[:at] + word[at] + word[at:],
            word[:at] + NEAR.get(word[at], word[at]) + word[at + 1 :],
        ]
        made.add(chance.choice(kinds))
        made.discard(word)
    return made


def said(words: Sequence[str]) -> str:
    """The error of a command line."""
    try:
        with cli.make_context("tt", list(words)) as ctx:
            cli.invoke(ctx)
    except (click.ClickException, ValueError, OSError) as error:
        return "\n".join(errors.lines_of(error))
    except click.exceptions.Exit:
        pass
    return ""


def of_config(word: str) -> str:
    """The error of a name where a recipe, a config or a file may be."""
    try:
        find_config(word)
    except ConfigError as error:
        return str(error)
    return ""


def options() -> Iterator[tuple[str, str]]:
    """(verb, option), of every verb."""
    ctx = click.Context(cli)
    for verb in cli.table:
        command = cli.get_command(ctx, verb)
        assert command is not None
        if isinstance(command, click.Group):
            continue
        for param in command.params:
            if isinstance(param, click.Option) and not param.hidden:
                yield from ((verb, option) for option in param.opts if option.startswith("--"))
    yield from (("run", f"--{name}") for name in TORCHRUN)


def schema_of(key: str) -> type:
    """The config of the first recipe that has a key."""
    return next(schema for schema in SCHEMAS.values() if key in all_keys(schema))


def trials(kind: str, each: int) -> list[tuple[str, str, str]]:
    """(meant, typed, answer) for every slip of every word of a kind."""
    chance = random.Random(13)
    found = []
    if kind == "options":
        for verb, option in options():
            for typed in slips(option[2:], chance, each):
                found.append((option, f"--{typed}", said([verb, f"--{typed}"])))
        return found
    words = {"verbs": list(cli.table), "recipes": recipe_names() + list(torchtune.RECIPES), "configs": config_names(),
             "keys": config_keys()}[kind]  # fmt: skip
    ask = {
        "verbs": lambda typed: said([typed]),
        "recipes": lambda typed: said(["cat", typed]),
        "configs": of_config,
        "keys": lambda typed: unknown_key(schema_of(word), typed),
    }[kind]
    known = set(words)
    for word in words:
        found += [(word, typed, ask(typed)) for typed in slips(word, chance, each) if typed and typed not in known]
    return found


def is_right(meant: str, answer: str) -> bool:
    """Whether the word stands in the answer as a suggestion, alone or as the key of an assignment."""
    return re.search(rf"did you mean (?:tt run |tt )?'?{re.escape(meant)}(?:[='? ]|\b)", answer) is not None


@pytest.mark.parametrize("kind", ["verbs", "options", "recipes", "configs", "keys"])
def test_at_least_95_percent_of_typos_get_the_word_that_was_meant(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = [(meant, typed, answer) for meant, typed, answer in trials(kind, 2) if answer]
    wrong = [trial for trial in found if not is_right(trial[0], trial[2])]
    assert len(wrong) <= 0.05 * len(found), wrong


if __name__ == "__main__":
    for kind in ("verbs", "options", "recipes", "configs", "keys"):
        answered = [trial for trial in trials(kind, 6) if trial[2]]
        wrong = [trial for trial in answered if not is_right(trial[0], trial[2])]
        print(f"{kind:8} {len(answered):5} typos, {100 * (1 - len(wrong) / len(answered)):.1f} % right")
        for meant, typed, answer in wrong[:12]:
            print(f"    {typed} for {meant}: {answer[:110]!r}")
