"""What is measured and written down beside the steps: held-out loss, samples, rows of metrics.jsonl, loggers."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tt_train.evaluate import answer, held_out_loss, prompts
from tt_train.inputs.rows import count_rows
from tt_train.job import Job
from tt_train.losses import Objective
from tt_train.run.checkpoints import TrainingState, finite_or_none
from tt_train.run.console import Console
from tt_train.run.dir import RunDir
from tt_train.run.metrics import peak_memory_gib
from tt_train.run.stop import StopRequest

log = logging.getLogger("tt_train")


@dataclass(kw_only=True)
class Watch:
    """Everything that ``record`` needs to know. Evaluations and samples may be abandoned when a signal comes."""

    job: Job
    run: RunDir
    state: TrainingState
    objective: Objective
    loggers: list[Callable[[dict[str, Any]], None]]
    console: Console
    stop: StopRequest
    began: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.first, self.elapsed_before = self.state.step, self.state.elapsed_s
        config = self.job.config
        rows, tokenizer = self.job.rows_to_show, self.job.tokenizer
        self.asked = prompts(rows, tokenizer, num=config.samples.num, max_prompt=config.data.max_seq_len)

    def measure(self, *, tokens: int, seconds: float) -> None:
        """Add to the figures of the step that was just made what it took: its trained tokens, and its time."""
        state, per_epoch, now = self.state, self.job.steps_per_epoch, time.perf_counter() - self.began
        assert state.row is not None
        state.elapsed_s = round(self.elapsed_before + now, 3)
        state.row |= {
            "epoch": round(state.step / per_epoch, 4) if per_epoch else None,
            "tokens_per_s": round(tokens / seconds, 2),
            "memory_gib": round(peak_memory_gib(self.job.device), 4),
            "elapsed_s": state.elapsed_s,
            "eta_s": round(now / (state.step - self.first) * (self.job.steps_total - state.step), 1),
        }

    def record(self, *, sample: bool = True) -> bool:
        """Complete the figures of the step that was made, and write them; whether its held-out loss is the lowest."""
        state, improved = self.state, False
        assert state.row is not None
        row = dict.fromkeys(_KEYS) | state.row
        if state.step == 0:
            self._tell_what_comes_first(sample)
        if self.is_due(state.step):
            row["eval_loss"] = eval_loss = self.evaluate()
            improved = state.judge(eval_loss)
        if sample and (self.is_due(state.step) or state.step == 0):
            self.sample(state.step)
        if state.step > 0:
            self._write(row)
            self.console.step(row)
            log.info(
                "step %d loss %.6f grad_norm %.4f",
                state.step,
                *(math.nan if row[key] is None else row[key] for key in ("loss", "grad_norm")),
            )
        elif "eval_loss" in row:
            self._write(row | {"tokens": 0, "elapsed_s": 0.0})
            self.console.note(f"held-out loss before step 1: {row['eval_loss']:.4f}")
        state.row = None
        return improved

    def _tell_what_comes_first(self, sample: bool) -> None:
        """What takes its time before step 1, and shows nothing meanwhile."""
        rows = count_rows(self.job.held_out) if self.job.held_out is not None else None
        what = [f"evaluating {rows:,} held-out rows"] if rows is not None else []
        what += [f"answering {len(self.asked)} prompts"] if sample and self.asked else []
        if what:
            self.console.note(f"before step 1: {' and '.join(what)} ...")

    def _write(self, row: dict[str, Any]) -> None:
        self.run.append("metrics.jsonl", {key: finite_or_none(value) for key, value in row.items()})
        for logger in self.loggers:
            logger(row)

    def is_due(self, step: int) -> bool:
        """Whether the held-out rows are evaluated after this step: before the first, every ``eval_every``, and last."""
        if self.job.held_out is None:
            return False
        every = self.job.config.eval_every
        return step in (0, self.job.steps_total) or (every is not None and step % every == 0)

    def evaluate(self) -> float:
        """Mean loss over every trained token held out."""
        config = self.job.config
        with self.stop.at_once():
            return held_out_loss(
                self.state.model, self.job.held_out, self.objective, micro_batch_size=config.micro_batch_size,
                pad_id=self.job.tokenizer.pad_id, device=self.job.device,
            )  # fmt: skip

    def sample(self, step: int) -> None:
        """Answers to a few prompts, into samples.jsonl."""
        options: dict[str, Any] = {"max_new_tokens": self.job.config.samples.max_new_tokens, "device": self.job.device}
        with self.stop.at_once():
            rows = answer(self.state.model, self.job.tokenizer, self.asked, **options)
        self.run.append(
            "samples.jsonl", *({"step": step, "held_out": self.job.held_out is not None, **row} for row in rows)
        )


_KEYS = ("step", "epoch", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "memory_gib", "elapsed_s", "eta_s")
