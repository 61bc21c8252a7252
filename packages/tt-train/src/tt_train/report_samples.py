"""The samples of the report page: every prompt with its answers. Every text of a run is escaped here."""

from collections.abc import Sequence
from html import escape
from typing import Any

from tt_train.report_headline import answers, is_expected
from tt_train.report_run import Run

PROMPTS = 12
CHARACTERS = 4000  # of one prompt or answer
COLOURS = 8  # report.css defines as many

Samples = list[dict[str, Any]]


def samples_section(runs: Sequence[Run]) -> str:
    """Prompts with their answers: the first and the last of one run, the last of each of several."""
    grouped = [answers(run) for run in runs]
    prompts = list(dict.fromkeys(prompt for one in grouped for prompt in one))
    if not prompts:
        return ""
    cards = ""
    for prompt in prompts[:PROMPTS]:
        having = [
            (run.name, dot(index), one[prompt])
            for index, (run, one) in enumerate(zip(runs, grouped, strict=True))
            if prompt in one
        ]
        cards += _card(prompt, having) if len(runs) > 1 else _card_of_one(prompt, having[0][2])
    more = f"{PROMPTS} of {len(prompts):,} prompts; the rest is in samples.jsonl." if len(prompts) > PROMPTS else ""
    more = f'<p class="note">{more}</p>' if more else ""
    return f'<section><div class="bar"><h2>Samples</h2></div><div class="samples">{cards}</div>{more}</section>'


def dot(index: int) -> str:
    """The colour of a run."""
    return f'<i class="dot" style="--colour:var(--run-{index % COLOURS})"></i>'


def clipped(text: str) -> str:
    """``text``, escaped, and cut where it is very long."""
    cut = f" [... {len(text) - CHARACTERS:,} more characters]" if len(text) > CHARACTERS else ""
    return escape(text[:CHARACTERS] + cut)


def _card_of_one(prompt: str, samples: Samples) -> str:
    first, last, between = samples[0], samples[-1], samples[1:-1]
    shown = (
        _answer(first, "Before") + _answer(last, "After", last=True) if len(samples) > 1 else _answer(last, "Answer")
    )
    details = ""
    if between:
        title = "The answer in between" if len(between) == 1 else f"{len(between)} answers in between"
        inner = "".join(_answer(sample, "Answer") for sample in between)
        details = f'<details><summary>{title}</summary><div class="answers">{inner}</div></details>'
    return _article(prompt, shown + _expected(last, [last]), details)


def _card(prompt: str, having: Sequence[tuple[str, str, Samples]]) -> str:
    first, lasts = having[0][2], [samples[-1] for _, _, samples in having]
    before = _answer(first[0], "Before") if len(first) > 1 else ""
    after = "".join(_answer(samples[-1], name, last=True, mark=mark) for name, mark, samples in having)
    return _article(prompt, before + after + _expected(first[-1], lasts), "")


def _article(prompt: str, shown: str, details: str) -> str:
    prompt = f'<div class="prompt"><div class="tag">Prompt</div><pre>{clipped(prompt)}</pre></div>'
    return f'<article class="sample card">{prompt}<div class="answers">{shown}</div>{details}</article>'


def _answer(sample: dict[str, Any], label: str, *, last: bool = False, mark: str = "") -> str:
    verdict = {None: "", True: "right", False: "wrong"}[is_expected(sample)]
    badge = f'<span class="badge {verdict}">{verdict}</span>' if verdict else ""
    step = f", step {sample['step']}" if "step" in sample else ""
    generation = str(sample.get("generation", ""))
    text = clipped(generation) if generation.strip() else '<span class="note">(blank)</span>'
    return (
        f'<div class="answer{" last " * last}{verdict if last else ""}">'
        f'<div class="tag">{mark}<span>{escape(label + step)}</span>{badge}</div><pre>{text}</pre></div>'
    )


def _expected(sample: dict[str, Any], lasts: Samples) -> str:
    """What was expected, where an answer is not that."""
    if all(is_expected(last) is not False for last in lasts):
        return ""
    text = clipped(str(sample.get("expected", "")))
    return f'<div class="answer"><div class="tag">Expected</div><pre>{text}</pre></div>'
