"""The help pages: full phrases, the same words for the same option, no line wider than the terminal."""

from collections.abc import Iterator

import click
import pytest

from tt_cli.main import cli


def verbs(group: click.Group = cli, *path: str) -> Iterator[tuple[str, click.Command]]:
    ctx = click.Context(group)
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from verbs(command, *path, name)
        else:
            yield " ".join([*path, name]), command


VERBS = dict(verbs())
PAGES = ["", "data", *VERBS]


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("page", PAGES)
def test_no_line_of_a_help_page_is_wider_than_the_terminal(page, columns, tt, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = tt(*page.split(), "--help").out.splitlines()
    assert max(map(len, lines)) <= columns - 2
    assert not any("<=x" in line for line in lines)  # click's bounds
    assert lines[0].startswith(f"Usage: tt {page}".rstrip())


@pytest.mark.parametrize("name", VERBS)
def test_the_help_of_every_option_is_a_full_phrase(name):
    for option in VERBS[name].params:
        if isinstance(option, click.Option):
            text = (option.help or "").removesuffix(" [default: private]")
            assert text[:1].isupper(), option.opts
            assert text.endswith("."), option.opts
            assert len(text.split()) >= 3 or text == "Commit message.", option.opts


@pytest.mark.parametrize("name", VERBS)
def test_the_help_of_every_verb_has_examples_of_that_verb(name, tt):
    examples = VERBS[name].examples
    page = tt(*name.split(), "--help").out
    assert examples
    for example in examples:
        assert f"tt {name}" in example
        assert f"\n  {example}\n" in page


def test_the_same_option_has_the_same_words_in_every_verb():
    own = {"--output", "--output-dir", "--config", "--seed", "--system", "--revision", "--dry-run", "--to", "--nproc",
           "--dtype", "--allow-import", "--stats", "--batch-size", "--data"}  # fmt: skip
    said: dict[str, set[str | None]] = {}
    for name, command in VERBS.items():
        for option in command.params:
            if name == "ls" and "--base" in option.opts:  # which runs to list
                continue
            if isinstance(option, click.Option) and not own & set(option.opts):
                said.setdefault(option.opts[-1], set()).add(option.help)
    assert {name: words for name, words in said.items() if len(words) > 1} == {}


def test_every_verb_has_a_section_in_the_help(tt):
    page = tt("--help").out
    for section, table in cli.sections.items():
        place = page.index(f"\n{section}:\n")
        assert all(f"\n  {verb} " in page[place:].split("\n\n")[0] for verb in table)
