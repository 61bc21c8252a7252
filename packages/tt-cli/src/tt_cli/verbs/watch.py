"""``tt watch``: a run that another terminal, or another machine of the same folder, is making."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import click

from tt_cli.group import Verb
from tt_cli.names import complete_runs
from tt_cli.options import COUNT, json_option
from tt_cli.terminal import print_json, say
from tt_train.errors import shell_word

if TYPE_CHECKING:
    from tt_train.run.follow import Follower, Look

POLL_S = 1.0
WAIT_S = 60


@click.command(
    "watch",
    cls=Verb,
    examples=[
        "tt watch",
        "tt watch runs/first --wait 600",
        "tt watch runs/first --json",
    ],
)
@click.argument("run", required=False, metavar="[RUN]", type=click.Path(), shell_complete=complete_runs)
@click.option(
    "-n", "--last", "num", type=COUNT, metavar="N", default=10, show_default=True, help="Number of past steps to print."
)
@click.option(
    "--wait",
    type=COUNT,
    metavar="SECONDS",
    help="Time to wait for a resume if the run is stopped, fails or is killed: 60 by default, none if it has ended "
    "already.",
)
@json_option
def command(run: str | None, num: int, wait: int | None, as_json: bool) -> int:
    """Follow RUN (default: the newest run) until it ends; nothing that the run does changes.

    On a terminal this is a screen that redraws itself, in a pipe or a file a line for each step. --json prints where
    the run is now, and does not follow it. The exit code is 0 if the run is finished, 1 if it was stopped or failed,
    and 130 after Ctrl-C.
    """
    from tt_train.run.dir import find_run
    from tt_train.run.follow import Follower, place

    path = find_run(run)
    if as_json:
        print_json(place(path))
        return 0
    follower = Follower(path, past=num)
    with _view() as view:
        return _follow(follower, view, wait)


class View(Protocol):
    """How a run is shown: after every look, and what happens to it in words."""

    def show(self, follower: "Follower", look: "Look") -> None: ...

    def note(self, text: str) -> None: ...


@contextmanager
def _view() -> Iterator[View]:
    if sys.stdout.isatty():
        from tt_cli.console import Terminal
        from tt_cli.screen import Screen

        terminal = Terminal(sys.stdout)
        if not terminal.is_dumb_terminal:
            with Screen(terminal) as screen:
                yield screen
            return
    yield _Lines()


def _follow(follower: "Follower", view: View, asked: int | None) -> int:
    """Until the run is finished, or has ended otherwise and is not resumed in time.

    A run that had ended before is waited for only if that was ``asked``.
    """
    seen: str | None = None
    wait = WAIT_S if asked is None else asked
    until = 0.0 if asked is None else time.monotonic() + asked
    while True:
        look = follower.look()
        if look.resumed_after is not None:
            view.note(f"resumed after step {look.resumed_after}")
        view.show(follower, look)
        state = follower.state
        if state == "finished":
            view.note(_ending(follower))
            return 0
        if state == "running":
            until = time.monotonic() + wait
        elif state != seen:
            waits = wait and (seen == "running" or asked is not None)
            view.note(_ending(follower) + (f"; waiting {wait} s for a resume" if waits else ""))
        if state != "running" and time.monotonic() >= until:
            return 1
        seen = state
        time.sleep(POLL_S)


def _ending(follower: "Follower") -> str:
    """What became of the run, and the next command."""
    run, step = follower.path, max(follower.rows, default=0)
    if follower.state == "finished" and not follower.rows:
        return f"finished, but {run / 'metrics.jsonl'} has no step that can be read"
    if follower.state == "finished":
        return f"finished after step {step}; tt report {shell_word(run)} shows it"
    why = follower.last_words() if follower.state == "failed" else None
    words = {"dead": "the process of the run is gone", "stopped": "stopped", "failed": "failed"}
    said = words.get(follower.state or "", f"the state of the run is {follower.state}")
    again = f"tt run {shell_word(run / 'config.yaml')} -o {shell_word(run)} --resume auto continues it"
    return f"{said} after step {step}{f': {why}' if why else ''}; {again}"


class _Lines:
    """A line on stdout for each step."""

    def show(self, follower: "Follower", look: "Look") -> None:
        from tt_train.run.console import step_line

        for row in look.new:
            say(step_line(row))

    def note(self, text: str) -> None:
        say(text)
