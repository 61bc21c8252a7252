"""What a recipe says while it runs. This console prints plain lines to stderr; tt_cli shows the same with rich."""

import sys
from dataclasses import dataclass, field
from typing import Any

from tt_ckpt.redaction import redact
from tt_train.errors import counted
from tt_train.records.series import SERIES
from tt_train.records.visible import visible

MARKS = ("\u27e6", "\u27e7")  # around trained tokens where there is no colour


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What is known before step 1."""

    model: str
    method: str  # full | lora | qlora | dora
    parameters: int
    trainable: int
    data: list[str] = field(default_factory=list)  # tt_data.summary_lines: all rows in one, then what should be known
    steps_total: int
    step_first: int = 0
    device: str
    dtype: str  # of the forward pass
    precision: dict[str, str] = field(default_factory=dict)  # forward, trained, written: the dtype of each
    run_dir: str
    sample: list[tuple[str, bool]] = field(default_factory=list)  # pieces of text, and whether their tokens are trained


_STEP = [("step", "step", "", ""), ("loss", "loss", ".4f", ""), ("lr", "lr", ".2e", ""),
         ("grad_norm", "grad_norm", ".3f", ""), ("tokens_per_s", "tokens/s", ".0f", ""), ("eta_s", "eta", ".0f", "s"),
         ("eval_loss", "eval_loss", ".4f", ""), ("eval_perplexity", "eval_perplexity", ".4g", ""),
         ("eval_exact_match", "eval_exact_match", ".4f", "")]  # fmt: skip


def named_figures(row: dict[str, Any]) -> list[str]:
    """The figures of a step that the objective names, such as ``accuracy 0.5000``."""
    return [f"{key} {value:.4f}" for key, value in row.items() if value is not None and key not in SERIES]


def step_line(row: dict[str, Any]) -> str:
    """A row of metrics.jsonl in a line, such as ``step 3 loss 1.2000 lr 1.00e-04``."""
    shown = [f"{name} {row[key]:{form}}{unit}" for key, name, form, unit in _STEP if row.get(key) is not None]
    return " ".join([*shown, *named_figures(row)])


def held_out_line(row: dict[str, Any]) -> str:
    """The figures of held-out rows, such as ``held-out loss 1.2000, perplexity 3.32, loss_news 1.1000``."""
    known = {"eval_loss": "held-out loss", "eval_perplexity": "perplexity", "eval_exact_match": "exact match"}
    found = {key: value for key, value in row.items() if key.startswith("eval_") and value is not None}
    order = sorted(found, key=lambda key: key not in known)
    return ", ".join(f"{known.get(key, key.removeprefix('eval_'))} {found[key]:.4f}" for key in order)


def precision_line(facts: RunFacts) -> str:
    """Which dtype does what."""
    trained, written = facts.precision.get("trained"), facts.precision.get("written")
    line = f"forward pass in {facts.dtype}"
    if trained:
        line += f", trained weights in {trained}, result in {written}"
    if merged := facts.precision.get("merged"):
        line += f"; tt merge will write {merged}, as the base is, or all of it with --dtype fp32"
    return line


def continued(facts: RunFacts) -> str:
    """Of a resumed run: where it continues."""
    return f", continued after step {facts.step_first}" if facts.step_first else ""


class Console:
    """Plain lines on stderr: for pipes, logs and library use."""

    def start(self, facts: RunFacts) -> None:
        """Before the first step."""
        share = 100 * facts.trainable / max(facts.parameters, 1)
        self.note(f"model {facts.model}: {facts.parameters:,} parameters, {facts.trainable:,} trained ({share:.2f} %)")
        for number, line in enumerate(facts.data):
            self.warn(line) if number else self.note(f"data {line}")
        marked = "".join(f"{MARKS[0]}{text}{MARKS[1]}" if trained else text for text, trained in facts.sample)
        if marked:
            self.note(f"first row ({MARKS[0]}trained{MARKS[1]}): {marked!r}")
        steps = facts.steps_total - facts.step_first
        self.note(f"{counted(steps, 'step')} on {facts.device}, to {facts.run_dir}{continued(facts)}")
        self.note(precision_line(facts))

    def step(self, row: dict[str, Any]) -> None:
        """After a step: ``row`` is its line in metrics.jsonl."""
        self.note(step_line(row))

    def note(self, text: str) -> None:
        """A fact worth a line."""
        print(visible(redact(text)), file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """Something that may be wrong."""
        self.note(f"warning: {text}")

    def end(self, summary: dict[str, Any]) -> None:
        """After the last step: figures, and the commands that come next."""
        figures = {key: value for key, value in summary.items() if key != "next"}
        self.note("done: " + ", ".join(f"{key} {value}" for key, value in figures.items()))
        for command in summary.get("next", []):
            self.note(f"  {command}")
