"""The upper part of the report page: tiles with the summary of one run, or a table of several."""

from collections.abc import Callable, Iterable, Sequence

from tt_train.report.read import Run
from tt_train.report.samples import dot, html_text
from tt_train.report.summary import DASH, Headline, as_count, as_figure, as_percent, as_time, headline


def tiles(run: Run) -> str:
    """The summary of one run at a glance."""
    one = headline(run)
    speed = f"{as_count(one.tokens_per_s)} tokens per second" if one.tokens_per_s else ""
    steps = f"{one.steps:,} step" + "s" * (one.steps != 1)
    loss = f"{one.loss_over}; {as_figure(one.loss_first)} at first; {steps}" if one.steps else steps
    memory = f"{as_figure(one.memory_gib, 3)} <small>GiB</small>" if one.memory_gib else DASH
    shown = [
        _tile("Training loss", as_figure(one.loss_last), loss),
        _tile("Held-out loss", as_figure(one.eval_last), _best(one)),
        _tile("Trained tokens", as_count(one.tokens), f"{as_figure(one.epochs, 3)} epochs" if one.epochs else ""),
        _tile("Time", as_time(one.seconds), speed),
        _parameters(one),
        _tile("Peak memory", memory),
        _rows(one),
    ]
    if one.exact_match is not None:
        first = run.figures("eval_exact_match")[0]
        shown.append(_tile("Exact match", as_percent(one.exact_match), f"{as_percent(first)} at first"))
    if one.matches:
        before, after, total = one.matches
        title = "Samples right" if one.closed else "Samples as expected"
        shown.append(_tile(title, f"{after} <small>of {total}</small>", f"{before} of {total} at first"))
    return f'<section class="tiles" aria-label="Headline figures">{"".join(shown)}</section>'


def _tile(label: str, value: str, detail: str = "", extra: str = "") -> str:
    detail = f'<div class="detail">{detail}</div>' if detail else ""
    return (
        f'<div class="tile card"><div class="label">{label}</div><div class="value">{value}</div>{detail}{extra}</div>'
    )


def _best(one: Headline) -> str:
    if one.eval_best is None:
        return "no rows were held out"
    sets = [f"{html_text(name)} {as_figure(loss)}" for name, loss in one.eval_sets.items()]
    perplexity = [f"perplexity {as_figure(one.perplexity)}"] if one.perplexity is not None else []
    return "; ".join([*sets, f"best {as_figure(one.eval_best)} at step {as_figure(one.eval_best_step)}", *perplexity])


def _parameters(one: Headline) -> str:
    if not one.parameters:
        return _tile("Parameters", DASH)
    trainable = one.trainable or 0
    width = min(100.0, 100 * trainable / one.parameters)
    bar = f'<div class="share"><i style="width:{width:.2f}%"></i></div>'
    detail = f"{as_count(trainable)} trained, {as_percent(trainable / one.parameters)}"
    return _tile("Parameters", as_count(one.parameters), detail, bar)


def _rows(one: Headline) -> str:
    if one.rows is None:
        return _tile("Rows", DASH)
    reasons = ", ".join(f"{as_count(count)} {html_text(reason)}" for reason, count in one.dropped.items() if count)
    details = [f"in {as_count(one.packs)} packs"] if one.packs else []
    details += [f"{as_count(one.lost)} dropped" + (f" ({reasons})" if reasons else "")]
    details += [f"{as_count(one.truncated)} cut"] if one.truncated else []
    details += [f"{as_count(one.eval_rows)} held out"] if one.eval_rows else []
    return _tile("Rows", as_count(one.rows), ", ".join(details))


# title, field of Headline, how it is written, and which end is best
COLUMNS: tuple[tuple[str, str, Callable[[float | None], str], Callable[[Iterable[float]], float] | None], ...] = (
    ("Steps", "steps", as_count, None),
    ("Training loss", "loss_last", as_figure, min),
    ("Held-out loss", "eval_last", as_figure, min),
    ("Best held-out", "eval_best", as_figure, min),
    ("Exact match", "exact_match", as_percent, max),
    ("Tokens", "tokens", as_count, None),
    ("Time", "seconds", as_time, min),
    ("Tokens/s", "tokens_per_s", as_count, max),
    ("Peak GiB", "memory_gib", as_figure, min),
    ("Parameters", "parameters", as_count, None),
    ("Trained", "trainable", as_count, None),
    ("Rows", "rows", as_count, None),
    ("Dropped", "lost", as_count, None),
    ("Samples as expected", "right", as_percent, max),
)
PER_TOKEN = ("loss_last", "eval_last", "eval_best", "tokens_per_s")  # another tokenizer counts other tokens


def comparison(runs: Sequence[Run]) -> str:
    """The summaries of several runs: a row each, the best of a column in bold, what they share below."""
    heads = [headline(run) for run in runs]
    one_tokenizer = len({_tokenizer(run) for run in runs}) == 1
    same, titles = [], ""
    cells = ["" for _ in runs]
    for title, field, write, best in COLUMNS:
        values = [getattr(one, field) for one in heads]
        known = [value for value in values if value is not None]
        if not known:
            continue
        if len(set(values)) == 1:
            same.append(f"{title.lower()} {write(values[0])}")
            continue
        ranked = best is not None and (one_tokenizer or field not in PER_TOKEN)
        titles += f'<th scope="col">{title}</th>'
        for index, value in enumerate(values):
            mark = ' class="best"' if ranked and best is not None and value == best(known) else ""
            cells[index] += f"<td{mark}>{write(value)}</td>"
    body = "".join(
        f'<tr><th scope="row">{dot(index)}{html_text(run.name)}</th>{cells[index]}</tr>'
        for index, run in enumerate(runs)
    )
    table = f'<table><thead><tr><th scope="col">Run</th>{titles}</tr></thead><tbody>{body}</tbody></table>'
    notes = [f"The same in all: {', '.join(same)}."] if same else []
    if not one_tokenizer:
        notes.append("The runs have different tokenizers or templates: their losses are means over different tokens.")
    note = "".join(f'<p class="note">{text}</p>' for text in notes)
    return f'<section aria-label="Headline figures"><div class="card scroll" tabindex="0">{table}</div>{note}</section>'


def _tokenizer(run: Run) -> str:
    """What identifies the tokenizer of a run; for older runs, the model."""
    return str(run.manifest.get("tokenizer") or run.manifest.get("base_model"))
