"""``tt generate``: one prompt, or all prompts of a file, answered."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from tt_cli.group import Verb
from tt_cli.names import complete_runs
from tt_cli.options import AT_LEAST_ONE, SAMPLES, base_option, device_option, json_option, sampling_options
from tt_cli.prompts import Prompt, check_text, read_prompt, read_prompts, row_file
from tt_cli.reply import CUT, Reply
from tt_cli.talk import Messages, Sampling, Speaker, show_answer, tell_cut, tell_room
from tt_cli.terminal import answer, is_hushed, print_json, say, tell
from tt_train.errors import counted, shell_word

_CHUNK = 8  # batches whose prompts are sorted by length together


@click.command(
    "generate",
    cls=Verb,
    examples=[
        'tt generate runs/first "What is a fjord?"',
        'tt generate Qwen/Qwen3-0.6B -p "What is a fjord?" --max-new-tokens 64 --json',
        'echo "Once upon a time" | tt generate --raw --temperature 0.8 --seed 1',
        "tt generate runs/first --prompts prompts.jsonl -o answers.jsonl",
    ],
)
@click.argument("model", required=False, metavar="[RUN|MODEL]", type=click.Path(), shell_complete=complete_runs)
@click.argument("question", required=False, metavar="[PROMPT]")
@click.option(
    "-p", "--prompt", metavar="TEXT", show_default="standard input", help="Prompt to answer, the same as PROMPT."
)
@click.option(
    "--prompts",
    metavar="FILE|-",
    type=click.Path(),
    help='File of prompts, or - for standard input: a line each, as text or as {"prompt": ...} or {"messages": [...]}, '
    "with an id if you like. The answers are JSON lines in the same order.",
)
@click.option(
    "-o",
    "--output",
    metavar="FILE|-",
    type=click.Path(),
    show_default="standard output",
    help="New file for the answers to --prompts.",
)
@click.option(
    "--batch-size", type=AT_LEAST_ONE, metavar="N", default=16, show_default=True, help="Prompts answered at a time."
)
@click.option("--num-samples", type=SAMPLES, metavar="N", default=1, show_default=True, help="Answers per prompt.")
@click.option("--system", metavar="TEXT", help="System message before the prompt.")
@click.option("--raw", is_flag=True, help="Continue the prompt as plain text, without a template.")
@click.option("--no-adapter", is_flag=True, help="Use the base model of a run, without its adapter.")
@base_option
@device_option
@sampling_options
@click.option("--stats", is_flag=True, help="Show tokens per second, the time to the first token and peak memory.")
@json_option
def command(
    model: str | None,
    question: str | None,
    prompt: str | None,
    prompts: str | None,
    output: str | None,
    batch_size: int,
    num_samples: int,
    system: str | None,
    raw: bool,
    no_adapter: bool,
    base: tuple[str, ...],
    device: str,
    stats: bool,
    as_json: bool,
    **sampling: object,
) -> int:
    """Answer prompts with RUN or MODEL (default: the newest run)."""
    if raw and system is not None:
        raise click.UsageError("--system needs the chat template, which --raw leaves out; give only one of them")
    if output is not None and prompts is None:
        raise click.UsageError("-o is for the answers to --prompts; redirect standard output, or use --json")
    opening = [] if system is None else [{"role": "system", "content": check_text(system, "--system")}]
    if prompts is None:
        model, text = _asked(model, question, prompt)
        rows = [Prompt(line=1, content=text)]
    elif question is not None or prompt is not None:
        raise click.UsageError(f"--prompts {prompts} and another prompt; give only one of them")
    else:
        path = None if output in (None, "-") else Path(str(output))
        if path is not None:
            _check_new(path)
        rows = read_prompts(prompts)
        _check_turns(rows, raw=raw, system=system)
    speaker = Speaker(model, adapter=not no_adapter, base=base, device=device)
    settings = speaker.sampling(sampling)
    if num_samples > 1 and not settings.temperature:
        raise ValueError("--num-samples: at temperature 0 all answers are the same; add --temperature 0.8, or another")
    asker = _Asker(speaker, settings, opening, raw=raw, batch_size=batch_size, num_samples=num_samples)
    if prompts is None:
        asker.one(rows[0], as_json=as_json)
        failed = 0
    else:
        failed = asker.all(rows, path, as_json=as_json)
    if stats:
        speaker.stats.show()
    return 1 if failed else 0


class _Asker:
    """Prompts on their way through a model."""

    def __init__(
        self, speaker: Speaker, settings: Sampling, opening: Messages, *, raw: bool, batch_size: int, num_samples: int
    ) -> None:
        self.speaker, self.settings, self.opening, self.raw = speaker, settings, opening, raw
        self.batch_size, self.num_samples = batch_size, num_samples

    def one(self, row: Prompt, *, as_json: bool) -> None:
        """Answer one prompt: as text while it grows, or as JSON."""
        ids = self.ids_of(row)
        if (problem := self.speaker.too_long(ids)) is not None:
            raise ValueError(problem)
        tell_room(self.speaker, ids, self.settings)
        if self.num_samples == 1 and not as_json:
            tell_cut(show_answer(self.speaker.replies([ids], self.settings, numbers=[(0, 0)])))
            return
        jobs = [(0, sample, ids) for sample in range(self.num_samples)]
        found = [reply for some in _batches(jobs, self.batch_size) for reply in self._replies(some)]
        if not as_json:
            for number, reply in enumerate(found, start=1):
                tell(f"{'' if number == 1 else chr(10)}sample {number} of {len(found)}")
                answer(reply.text.given)
                tell_cut(reply)
            return
        facts = {"model": self.speaker.path, "sampling": vars(self.settings), "stats": self.speaker.stats.facts()}
        samples = [{"text": reply.text.given, **_figures(reply)} for reply in found]
        print_json(facts, said={"prompt": row.content, **samples[0], "cut": found[0].cut, "samples": samples})

    def all(self, rows: Sequence[Prompt], path: Path | None, *, as_json: bool) -> int:
        """Answer all prompts in batches, in their order, as JSON lines. Returns how many could not be answered."""
        answered: list[dict[str, Any]] = []
        counts = {"prompts": len(rows), "answers": 0, "failed": 0, "cut": 0}
        with row_file(path) as write:
            put = answered.append if as_json and path is None else write
            try:
                with _progress(len(rows), shown=put is not write or path is not None) as advance:
                    self._put_all(rows, put, counts, advance)
            finally:
                self._tell_counts(counts, path)
        if as_json:
            facts: dict[str, Any] = {"ok": not counts["failed"], "model": self.speaker.path, **counts}
            facts |= {
                "output": None if path is None else str(path),
                "sampling": vars(self.settings),
                "stats": self.speaker.stats.facts(),
            }
            print_json(facts, said={"rows": answered} if path is None else {})
        return counts["failed"]

    def _put_all(self, rows: Sequence[Prompt], put: Any, counts: dict[str, int], advance: Any) -> None:
        """Give the rows of all answers to ``put``, in the order of the prompts, and count them."""
        size = self.batch_size * _CHUNK
        for start in range(0, len(rows), size):
            made: dict[tuple[int, int], dict[str, Any]] = {}
            try:
                self._answer(start, rows[start : start + size], made, advance)
            finally:  # after Ctrl-C, too: what was answered is kept
                for number, sample in sorted(made):
                    row, found = rows[number], made[number, sample]
                    put({"line": row.line, "id": row.id, "sample": sample, row.key: row.content, **found})
                    counts["failed" if "error" in found else "answers"] += 1
                    counts["cut"] += found.get("finish") in CUT

    def ids_of(self, row: Prompt) -> list[int]:
        """The tokens of a prompt."""
        if self.raw:
            return self.speaker.raw_ids(row.content)
        turns = row.content if row.key == "messages" else [{"role": "user", "content": row.content}]
        return self.speaker.prompt_ids([*self.opening, *turns])

    def _answer(
        self, start: int, rows: Sequence[Prompt], made: dict[tuple[int, int], dict[str, Any]], advance: Any
    ) -> None:
        """Put the answers to some rows into ``made``, by prompt and sample, the longest prompts first."""
        from tt_data import TemplateError

        jobs: list[tuple[int, int, list[int]]] = []
        for number, row in enumerate(rows, start=start):
            try:
                ids = self.ids_of(row)
                problem = self.speaker.too_long(ids)
            except (ValueError, TemplateError) as error:
                problem = str(error)
            if problem is None:
                jobs += [(number, sample, ids) for sample in range(self.num_samples)]
            else:
                made[number, 0] = {"error": problem}
                advance(1)
        for some in _batches(sorted(jobs, key=lambda job: -len(job[2])), self.batch_size):
            for (number, sample, _), reply in zip(some, self._replies(some), strict=True):
                made[number, sample] = {"text": reply.text.given, **_figures(reply)}
                advance(1 / self.num_samples)

    def _replies(self, jobs: Sequence[tuple[int, int, list[int]]]) -> list[Reply]:
        """The whole answers of a batch."""
        numbers = [(number, sample) for number, sample, _ in jobs]
        made: dict[int, Reply] = {}
        for row, reply, _ in self.speaker.replies([ids for _, _, ids in jobs], self.settings, numbers=numbers):
            made[row] = reply
        return [made[row] for row in range(len(jobs))]

    def _tell_counts(self, counts: dict[str, int], path: Path | None) -> None:
        """What became of the prompts, and the throughput; also after an interruption."""
        facts = self.speaker.stats.facts()
        where = f" in {path}" if path is not None and counts["answers"] + counts["failed"] else ""
        cut = f", {counts['cut']} of them cut" if counts["cut"] else ""
        answers, prompts = counted(counts["answers"], "answer"), counted(counts["prompts"], "prompt")
        tell(f"{answers} to {prompts}{where}{cut}; {counted(self.speaker.stats.tokens, 'token')} in "
             f"{facts['seconds']:,.1f} s, {facts['tokens_per_s'] or 0:,.1f} per second")  # fmt: skip
        if counts["failed"]:
            have = "has" if counts["failed"] == 1 else "have"
            say(f"{counts['failed']:,} of {prompts} {have} no answer; the rows say why", err=True)


def _figures(reply: Reply) -> dict[str, Any]:
    return {"finish": reply.finish, "prompt_tokens": reply.prompt_tokens, "tokens": reply.tokens}


def _batches(jobs: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (jobs[start : start + size] for start in range(0, len(jobs), size))


def _progress(total: int, *, shown: bool) -> Any:
    """Gives ``advance(prompts)``, which moves a bar if stderr is a terminal.

    ``shown``: False if rows go to standard output. On a terminal they are the progress, and a bar would fold them.
    """
    if not sys.stderr.isatty() or is_hushed() or (not shown and sys.stdout.isatty()):
        return nullcontext(lambda count: None)
    from tt_cli.console import count_progress

    return count_progress("prompts", total)


def _check_new(path: Path) -> None:
    """What is at ``path`` stays; only a file is worth the advice to remove it."""
    if not os.path.lexists(path):
        return
    if path.is_dir():
        raise ValueError(f"{path}: a folder; name a new file in it")
    if path.is_file() or path.is_symlink():
        raise ValueError(f"{path}: already there; remove it, or name another file for the answers")
    raise ValueError(f"{path}: not a regular file; name a new file, or leave out -o for standard output")


def _check_turns(rows: Sequence[Prompt], *, raw: bool, system: str | None) -> None:
    """The first conversation that --raw or --system does not go with."""
    for row in rows:
        if row.key == "messages" and raw:
            raise ValueError(f"line {row.line}: messages need the chat template, which --raw leaves out")
        if row.key == "messages" and system is not None and row.content[0]["role"] == "system":
            raise ValueError(f"line {row.line}: has a system message of its own; leave out --system")


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
    if not text.strip():
        raise click.UsageError("the prompt is empty")
    return model, check_text(text, "the prompt")
