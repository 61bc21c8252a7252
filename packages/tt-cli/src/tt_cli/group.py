"""The two click classes of ``tt``: a group that imports a verb when it is asked for, and a verb."""

import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from tt_cli.names import ELSEWHERE, config_keys
from tt_cli.terminal import hush
from tt_train.errors import closest, did_you_mean, shell_word, slip
from tt_train.settings.keys.foreign import FOREIGN
from tt_train.settings.registry import RECIPES

_SEEN = "what is on the command line can be seen by every user of the machine (ps) and stays in the shell's history; "
_TOKEN_ELSEWHERE = f"{_SEEN}set HF_TOKEN, or run `hf auth login` once, and leave the option out"
# options of other tools that no verb has, and why
REFUSED = dict.fromkeys(("--hf-token", "--hf_token", "--token", "--api-key", "--wandb-key"), _TOKEN_ELSEWHERE)

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass
class Invocation:
    """What the one place that reports errors must know of the running verb; it is click's ``ctx.obj``."""

    verbose: bool = False
    json: bool = False
    rank: int = 0  # among the processes of the run
    launch: list[str] = field(default_factory=list)  # words for torchrun
    run_dir: Path | None = None  # set once a run has begun: later errors are failures, not wrong input


pass_invocation = click.make_pass_decorator(Invocation, ensure=True)


class LazyGroup(click.Group):
    """A click group over ``section -> verb -> (module, help)``; a module is imported when its verb runs."""

    def __init__(
        self, name: str, *, sections: Mapping[str, Mapping[str, tuple[str, str]]], help: str, **more: Any
    ) -> None:
        super().__init__(name, help=help, invoke_without_command=True, callback=_help_when_alone, **more)
        self.subcommand_metavar = "VERB [ARGS]..."
        self.params += spoken_options()
        self.sections = sections
        self.table = {verb: row for table in sections.values() for verb, row in table.items()}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.table:
            return None
        command: click.Command = importlib.import_module(self.table[cmd_name][0]).command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in self.table and not name.startswith("-"):
            raise click.UsageError(f"{ctx.command_path} has no verb '{name}'{self._meant(ctx, name)}", ctx)
        return super().resolve_command(ctx, args)

    def _meant(self, ctx: click.Context, name: str) -> str:
        """What an unknown verb may mean: a recipe, a config, another tool's word, or a slip."""
        if name == "help":
            return f"; the help is {ctx.command_path} --help"
        meant = ""
        if "run" in self.table:
            if name in RECIPES or name.endswith((".yaml", ".yml", ".py")):
                return f"; did you mean tt run {shell_word(name)}?"
            meant = ELSEWHERE.get(name.lower().replace("_", "-"), "")
        verb, _, more = meant.partition(" ")
        if verb in self.table:
            return f"; did you mean {f'tt {meant}' if more else repr(verb)}?"
        if more:
            return f"; {meant}"
        near = did_you_mean(name, self.table)
        if near or "run" not in self.table:
            return near
        if recipe := closest(name, RECIPES, cutoff=0.8):
            return f"; did you mean tt run {recipe}?"
        theirs = closest(name, ELSEWHERE, cutoff=0.8)
        return self._meant(ctx, theirs) if theirs and theirs != name else ""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self.table))
        for title, table in self.sections.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), help) for name, (_, help) in table.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        verbs = [CompletionItem(n, help=help) for n, (_, help) in self.table.items() if n.startswith(incomplete)]
        return verbs + click.Command.shell_complete(self, ctx, incomplete)


class Verb(click.Command):
    """A command with ``-q``, ``-v`` and examples; if it takes ``--json``, it also fails in JSON.

    ``examples``: commands as a user types them, shown under the options. A test runs every one.
    """

    more_options: Collection[str] = ()  # names that the verb takes beside its own

    def __init__(self, *args: Any, examples: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples
        self.params += spoken_options()

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if ctx.resilient_parsing:  # for completion
            return super().parse_args(ctx, args)
        # Noted before parsing, so that a mistake in the options is answered in JSON as well.
        if any("--json" in param.opts for param in self.params):
            ctx.ensure_object(Invocation).json = "--json" in args
        if "" in args and self._names_a_file(args[args.index("") - 1] if args[0] else ""):
            raise click.UsageError("an empty argument (an unset shell variable?); leave it out or give it a value", ctx)
        for word in args:
            self._refuse_half_option(ctx, word)
        given = list(args)  # the parser empties its list
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            # -json is taken for -j, and -vx for -v and -x
            typed = next((word for word in given if word.startswith(error.option_name)), error.option_name)
            name, sign, value = typed.partition("=")
            if why := REFUSED.get(name):
                raise click.UsageError(f"{name}: {why}", ctx) from None
            following = given[given.index(typed) + 1 :] if typed in given else []
            hint = self.meant(name, value if sign else _value_after(following))
            raise click.UsageError(f"no option {name}{hint}", ctx) from None
        except click.BadOptionUsage as error:
            error.ctx = error.ctx or ctx
            raise

    def meant(self, name: str, value: str) -> str:
        """What an unknown option may mean: ``; did you mean '--resume'?``, or nothing."""
        known = {option.lstrip("-"): option for param in self.params for option in param.opts}
        known |= {word: f"--{word}" for word in self.more_options if slip(name.lstrip("-"), word) is not None}
        near = closest(name.lstrip("-"), [word for word in known if len(word) > 1])
        return f"; did you mean '{known[near]}'?" if near else ""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if not self.examples:
            return
        with formatter.section("Examples"):
            for line in self.examples:  # not wrapped, so that it can be copied
                formatter.write(f"{'':{formatter.current_indent}}{line}\n")

    def _refuse_half_option(self, ctx: click.Context, word: str) -> None:
        """``--resume=`` of a shell variable that is not set, and ``-o=DIR``, whose value would be ``=DIR``."""
        name, sign, value = word.partition("=")
        option = next((param for param in self.params if name in param.opts), None) if sign else None
        if option is None or not isinstance(option.type, click.Path):
            return
        if not value:
            raise click.UsageError(f"{name} has no value (an unset shell variable?); leave it out", ctx)
        if not name.startswith("--"):
            raise click.UsageError(f"{word}: write {name} {value}, without =", ctx)

    def _names_a_file(self, before: str) -> bool:
        """Whether the word after ``before`` is an argument, or the path of an option, and not a text of the user's."""
        option = next((param for param in self.params if before in param.opts), None)
        return isinstance(option.type, click.Path) if option is not None else not before.startswith("-")


class ConfigVerb(Verb):
    """A verb that takes ``key=value`` words: a word with dashes is answered with the key that it may mean."""

    def meant(self, name: str, value: str) -> str:
        if value.endswith((".yaml", ".yml")):
            return f"; did you mean --config {shell_word(value)}?"
        return super().meant(name, value) or _key_hint(name, value)


def _help_when_alone() -> None:
    ctx = click.get_current_context()
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def _value_after(words: Sequence[str]) -> str:
    """The value of ``--key value``, where the next word is one."""
    return words[0] if words and "=" not in words[0] and not words[0].startswith("-") else "VALUE"


def _key_hint(name: str, value: str) -> str:
    """The config key that ``name`` stands for, in the form in which it is overridden."""
    word, keys = name.lstrip("-").replace("-", "_"), config_keys()
    ours, note = FOREIGN.get(word.lower(), (None, ""))
    if ours == "":
        return f"; tt has no such key: {note}"
    last_parts = {key: key.rsplit(".", 1)[-1] for key in keys}
    meant = ours or next((key for key in keys if word in (key, last_parts[key])), None)
    if meant is None and (close := closest(word, last_parts.values())):
        meant = next(key for key in keys if last_parts[key] == close)
    if meant is None:
        return f"; a config key is written {word or 'key'}={value}"
    key = next((key for key in keys if key.startswith(f"{meant}.")), meant)  # of a section: its first key
    return f"; did you mean {shell_word(f'{key}={value}')}?{f' ({note})' if note else ''}"


def spoken_options() -> list[click.Parameter]:
    """``-q`` and ``-v``, which every verb takes, before or after its name."""
    kinds: list[tuple[list[str], Callable[[click.Context], None], str]] = [
        (["-q", "--quiet"], lambda _: hush(), "Show only results, warnings and errors."),
        (["-v", "--verbose"], _set_verbose, "Show the traceback of an error."),
    ]
    return [
        click.Option(
            names,
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=lambda ctx, _param, given, act=act: act(ctx) if given else None,
            help=help,
        )
        for names, act, help in kinds
    ]


def _set_verbose(ctx: click.Context) -> None:
    ctx.ensure_object(Invocation).verbose = True
