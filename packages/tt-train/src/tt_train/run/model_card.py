"""README.md of a run: what was trained on what, in the form that the hub shows."""

import json
import re
from typing import Any

from tt_train.config import RunConfig, to_yaml
from tt_train.job import Job
from tt_train.records.visible import visible
from tt_train.report.summary import method_words

_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_MARKUP = re.compile(r"[\\`*\[\]<>|!#&$~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|://|@(?=\w)")


def model_card(job: Job[RunConfig], manifest: dict[str, Any], summary: dict[str, Any]) -> str:
    """The card's markdown, with the metadata block of a Hugging Face model card."""
    header = {"library_name": "transformers" if job.lora is None else "peft", "base_model": job.base_model,
              "tags": ["tt", job.config.recipe, job.method]}  # fmt: skip
    if not _REPO_ID.fullmatch(job.base_model):  # the hub refuses a path there
        del header["base_model"]
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in header.items()), "---", ""]
    lines += [f"# {as_text(job.base_model.rstrip('/').split('/')[-1])}, {job.method} fine-tune", ""]
    lines += ["| | |", "|---|---|"]
    facts = {
        "base model": job.base_model,
        "method": method_words(job.method),
        "rows": f"{job.row_count} {job.train.report['schema']}",
        "data fingerprint": job.train.fingerprint,
        "steps": summary["steps"],
        "trained tokens": f"{summary['tokens']:,}",
        "training loss": _training_loss(summary),
        "held-out loss": _figure(summary["eval_loss"]),
        **_held_out(summary),
        "trained tokens per second": _count(summary["tokens_per_s"]),
        "versions": ", ".join(f"{name} {version}" for name, version in manifest["environment"]["packages"].items()),
    }
    lines += [f"| {key} | {as_text(value)} |" for key, value in facts.items()]
    lines += ["", "## Config", "", *fenced(to_yaml(job.config).rstrip(), "yaml"), ""]
    lines += ["Its limits are those of the base model and of the rows; nothing else was measured.", ""]
    return "\n".join(lines)


def as_text(value: object) -> str:
    """Text of a file in a line of Markdown, so that it is neither markup nor HTML, and stays in its cell."""
    return _MARKUP.sub(r"\\\g<0>", visible(" ".join(str(value).split())))


def fenced(text: str, language: str) -> list[str]:
    """A block of code that no line of the text can end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return [fence + language, visible(text), fence]


def _training_loss(summary: dict[str, Any]) -> str:
    """As in tt_train.report.summary."""
    if summary["loss_last"] is None:
        return "not measured"
    return f"{_figure(summary['loss_last'])} ({summary['loss_over']}; {_figure(summary['loss_first'])} at first)"


def _held_out(summary: dict[str, Any]) -> dict[str, str]:
    """Further figures of held-out rows, if they were measured."""
    sets = {f"held-out loss, {name}": each.get("loss") for name, each in summary.get("eval_sets", {}).items()}
    names = {"eval_perplexity": "held-out perplexity", "eval_exact_match": "exact match on held-out rows"}
    figures = sets | {name: summary[key] for key, name in names.items() if key in summary}
    return {name: _figure(value) for name, value in figures.items()}


def _count(value: float | None) -> str:
    return "not measured" if value is None else f"{value:,.0f}"


def _figure(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"
