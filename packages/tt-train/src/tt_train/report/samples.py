"""The samples of the report page: every prompt with its answers. Every text of a run is escaped here."""

from collections.abc import Sequence
from html import escape
from typing import Any

from tt_train.records.visible import visible
from tt_train.report.read import Run
from tt_train.report.summary import answers, is_closed, is_expected

PROMPTS = 12
CHARACTERS = 4000  # of one prompt or answer
COLOURS = 8  # report.css defines as many

Samples = list[dict[str, Any]]


def samples_section(runs: Sequence[Run]) -> str:
    """Prompts with answers: the first and the last answer of one run, or the last answer of each of several."""
    grouped = [answers(run) for run in runs]
    prompts = list(dict.fromkeys(prompt for one in grouped for prompt in one))
    if not prompts:
        return ""
    closed = all(is_closed(run) for run in runs if run.samples)
    cards = ""
    for prompt in prompts[:PROMPTS]:
        having = [
            (run.name, dot(index), one[prompt])
            for index, (run, one) in enumerate(zip(runs, grouped, strict=True))
            if prompt in one
        ]
        cards += _card(having, closed) if len(runs) > 1 else _card_of_one(having[0][2], closed)
    more = f"{PROMPTS} of {len(prompts):,} prompts; the rest is in samples.jsonl." if len(prompts) > PROMPTS else ""
    more = f'<p class="note">{more}</p>' if more else ""
    return f'<section><div class="bar"><h2>Samples</h2></div><div class="samples">{cards}</div>{more}</section>'


def dot(index: int) -> str:
    """The colour of a run."""
    return f'<i class="dot" style="--colour:var(--run-{index % COLOURS})"></i>'


def html_text(text: str) -> str:
    """Text of a run as HTML; invisible characters and those that reverse text are shown as escapes."""
    return escape(visible(text))


def clipped(text: str) -> str:
    """``text``, escaped, and cut if it is very long."""
    cut = f" [... {len(text) - CHARACTERS:,} more characters]" if len(text) > CHARACTERS else ""
    return html_text(text[:CHARACTERS] + cut)


def _card_of_one(samples: Samples, closed: bool) -> str:
    first, last, between = samples[0], samples[-1], samples[1:-1]
    shown = _answer(last, "Answer", closed)
    if len(samples) > 1:
        shown = _answer(first, "Before", closed) + _answer(last, "After", closed, last=True)
    details = ""
    if between:
        title = "The answer in between" if len(between) == 1 else f"{len(between)} answers in between"
        inner = "".join(_answer(sample, "Answer", closed) for sample in between)
        details = f'<details><summary>{title}</summary><div class="answers">{inner}</div></details>'
    return _article(first, shown + _expected(last, [last]), details)


def _card(having: Sequence[tuple[str, str, Samples]], closed: bool) -> str:
    first, lasts = having[0][2], [samples[-1] for _, _, samples in having]
    before = _answer(first[0], "Before", closed) if len(first) > 1 else ""
    after = "".join(_answer(samples[-1], name, closed, last=True, mark=mark) for name, mark, samples in having)
    return _article(first[0], before + after + _expected(first[-1], lasts), "")


def _article(sample: dict[str, Any], shown: str, details: str) -> str:
    held_out = sample.get("held_out")
    source = "held-out row" if held_out is True else "row of the training data" if held_out is False else ""
    source = f'<span class="source">{source}</span>' if source else ""
    turns = _turns(sample)
    parts = "".join(
        f'<div class="turn"><div class="tag"><span>{html_text(role)}</span></div><pre>{clipped(content)}</pre></div>'
        for role, content in turns
    )
    title = "Prompt" if len(turns) < 2 else f"Prompt of {len(turns)} turns"
    prompt = f'<div class="prompt"><div class="tag"><b>{title}</b>{source}</div>{parts}</div>'
    return f'<article class="sample card">{prompt}<div class="answers">{shown}</div>{details}</article>'


def _turns(sample: dict[str, Any]) -> list[tuple[str, str]]:
    """Role and text of each turn of a prompt. A prompt without turns is one turn without a role."""
    turns = sample.get("turns")
    known = turns if isinstance(turns, list) else []
    found = [(str(one.get("role", "")), str(one.get("content", ""))) for one in known if isinstance(one, dict)]
    return found or [("", str(sample["prompt"]))]


def _answer(sample: dict[str, Any], label: str, closed: bool, *, last: bool = False, mark: str = "") -> str:
    expected = is_expected(sample)
    verdict = words = "" if expected is None else "right" if expected else "wrong"
    if not closed:  # several answers are possible, so no answer is wrong
        verdict, words = ("same", "as expected") if expected else ("", "")
    badge = f'<span class="badge {verdict}">{words}</span>' if verdict else ""
    step = f", step {sample['step']}" if "step" in sample else ""
    generation = str(sample.get("generation", ""))
    text = clipped(generation) if generation.strip() else '<span class="note">(blank)</span>'
    return (
        f'<div class="answer{" last " * last}{verdict if last else ""}">'
        f'<div class="tag">{mark}<span>{html_text(label + step)}</span>{badge}</div><pre>{text}</pre></div>'
    )


def _expected(sample: dict[str, Any], lasts: Samples) -> str:
    """The expected answer, if an answer differs from it."""
    if all(is_expected(last) is not False for last in lasts):
        return ""
    text = clipped(str(sample.get("expected", "")))
    return f'<div class="answer"><div class="tag">Expected</div><pre>{text}</pre></div>'
