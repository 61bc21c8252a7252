"""The training state of a run, out and back in: weights, optimizer, place in the data, figures so far."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tt_ckpt
import tt_models
import tt_peft
from tt_train.config import RunConfig
from tt_train.devices.launch import ending, is_lost
from tt_train.devices.sharding import local
from tt_train.errors import ConfigError, Interrupted, LostRank, counted
from tt_train.job import Job
from tt_train.optim.master_weights import MasterWeights, join, split_
from tt_train.optim.state import keeps_few_bits, load_optimizer_tensors_, optimizer_tensors, state_bytes
from tt_train.run.dir import RunDir
from tt_train.run.saved import check_tensors, held_groups
from tt_train.run.stop import Stopped
from tt_train.step import StepResult

_SAVED = ("step", "tokens", "elapsed_s", "row", "best", "evaluations_since_best", "judged", "token_stream")


class TrainingState:
    """What a run saves and restores: its trained weights and its optimizer. An adapter run leaves its base.

    ``step``: the last step whose update is in the weights. ``row``: its figures, until they are recorded.
    """

    def __init__(self, run: RunDir, job: Job[RunConfig], model: tt_models.Decoder, optimizer: MasterWeights) -> None:
        self.job, self.model, self.optimizer = job, model, optimizer
        self.names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.checkpoints = tt_ckpt.TrainCheckpoint(run.checkpoints, keep_last=job.config.keep_last,
                                                   timeout_s=job.config.process_group_timeout_s)  # fmt: skip
        self.step = 0
        self.tokens, self.elapsed_s = 0, 0.0
        self.row: dict[str, Any] | None = {"step": 0}
        self.best: dict[str, Any] | None = None  # step and eval_loss
        self.evaluations_since_best = 0
        self.token_stream: str | None = ""  # digest of the rows of all steps; None if a checkpoint did not know it
        self.judged = 0  # the last step whose held-out loss was compared
        self.saved: Path | None = None  # the checkpoint of this step, if there is one
        self.updates = 0  # of the optimizer, that ``step`` counts
        self.failed = 0  # saves in a row

    # ---- what happens in a run ---------------------------------------------------------------------------------------

    def made(self, step: int, result: StepResult, *, lr: float) -> None:
        """A step was made: to be called at once, so that ``step`` is always that of the weights."""
        self.step, self.saved, self.updates = step, None, self.optimizer.updates
        self.tokens += result.tokens
        self.row = {"step": step, "epoch": None, "loss": result.loss, "lr": lr, "grad_norm": result.grad_norm,
                    "tokens": self.tokens, **result.metrics}  # fmt: skip

    def recorded(self, row: dict[str, Any] | None) -> None:
        """``row``: what metrics.jsonl has of this step; its figures need not be recorded again."""
        if self.row is None or row is None:
            return
        self.row = None
        if row.get("eval_loss") is not None:
            self.judge(row["eval_loss"])

    def judge(self, eval_loss: float) -> bool:
        """Whether this held-out loss is the lowest so far. The one before step 1 does not count."""
        if self.judged == self.step:  # before step 1, and in a run that was stopped between this and its record
            return self.best is not None and self.best["step"] == self.step
        self.judged = self.step
        if math.isfinite(eval_loss) and (self.best is None or eval_loss < self.best["eval_loss"]):
            self.best, self.evaluations_since_best = {"step": self.step, "eval_loss": eval_loss}, 0
            return True
        self.evaluations_since_best += 1
        return False

    @property
    def complete(self) -> bool:
        """Whether no step is left to make."""
        patience = self.job.config.early_stop_after
        return self.step >= self.job.steps_total or (patience is not None and self.evaluations_since_best >= patience)

    # ---- saving ------------------------------------------------------------------------------------------------------

    def check_space(self, result_bytes: int) -> None:
        """ConfigError unless the checkpoints that are to come and the result fit on the disk."""
        config = self.job.config
        size = sum(tensor.nbytes for group in self._tensors().values() for tensor in group.values())
        if not self.optimizer.state:  # before the first step
            size += state_bytes(self.optimizer)
        kept, ways = 1, []
        if config.save_every:
            to_come = 1 + (self.job.steps_total - self.step - 1) // config.save_every  # the last step's among them
            kept = min(config.keep_last + 1, max(1, to_come)) + self.saves_best
            ways += ["raise save_every"] if to_come > 1 else []
            ways += ["lower keep_last"] if 2 < config.keep_last < to_come else []
        try:
            self.checkpoints.preflight(size, copies=kept, besides=result_bytes)
        except OSError as error:
            what = f"{error.filename}: {error.strerror}; choose another -o" if error.filename else str(error)
            raise ConfigError([f"output_dir: {'; or '.join([what, *ways])}"]) from error

    @property
    def saves_best(self) -> bool:
        """Whether a step with the lowest held-out loss so far is saved, and kept."""
        config = self.job.config
        return self.job.held_out is not None and (config.save_every is not None or config.early_stop_after is not None)

    def save(self) -> Path:
        """Write a checkpoint of this step, unless there is one; raises CheckpointNotSaved."""
        if self.saved is None:
            with suppress(tt_ckpt.CheckpointNotSaved):
                self.checkpoints.wait()  # one that failed in the background is made up for by this one
            self.saved = self.checkpoints.save(self.step, **self._content())
        return self.saved

    def save_if_due(self, *, improved: bool, warn: Callable[[str], None]) -> None:
        """Save every ``save_every`` steps, and the best step. A failure is a warning, see ``tolerate``."""
        self.tolerate(self.checkpoints.check, warn)  # whether one in the background has failed
        every = self.job.config.save_every
        if not (every and self.step % every == 0) and not (improved and self.saves_best):
            return
        if self.job.config.save_async:
            self.tolerate(self.checkpoints.wait, warn)
            self.checkpoints.save_async(self.step, **self._content())
        else:
            self.tolerate(self.save, warn)

    def drain(self, warn: Callable[[str], None]) -> None:
        """Wait for the save in the background."""
        self.tolerate(self.checkpoints.wait, warn)

    def tolerate(self, save: Callable[[], Path | None], warn: Callable[[str], None]) -> None:
        """A failed save is a warning as long as an older checkpoint exists and the last save went well."""
        try:
            if save() is not None:
                self.failed = 0
        except tt_ckpt.CheckpointNotSaved as error:
            self.failed += 1
            if self.failed > 1 or self.checkpoints.latest(hashes=False) is None:
                raise
            warn(f"{error}; training continues, and the checkpoint before it is complete")

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        adapted = self.job.lora is not None
        lost = {self.names[parameter]: bits for parameter, bits in self.optimizer.lost.items()}
        return {
            "adapter" if adapted else "model": tt_peft.adapter_state_dict(self.model) if adapted else self._weights(),
            **({"lost_bits": lost} if lost else {}),
            "optimizer": optimizer_tensors(self.optimizer, self.names),
        }

    def _content(self) -> dict[str, Any]:
        if self.best is not None:
            self.checkpoints.keep = {self.best["step"]}
        state = {key: getattr(self, key) for key in _SAVED}
        state["row"] = self.row and {key: finite_or_none(value) for key, value in self.row.items()}
        state |= {"data": self.job.train.fingerprint, "steps_total": self.job.steps_total}
        return {"tensors": self._tensors(), "state": state}

    # ---- whatever ends a run -----------------------------------------------------------------------------------------

    @contextmanager
    def kept(self, warn: Callable[[str], None]) -> Iterator[None]:
        """Whatever ends the block early, the last whole step is saved, and what to do next is said.

        Several ranks save together or not at all. LostRank instead of the error of a collective that failed.
        """
        try:
            yield
        except Stopped as stopped:
            if self.step == 0:
                raise
            try:
                checkpoint = self.save()
            except tt_ckpt.CheckpointNotSaved as error:
                self._advise(error, warn, reason=str(error))
                raise
            raise Interrupted(stopped.signal_number, str(checkpoint), self.step) from None
        except (Exception, KeyboardInterrupt) as error:
            apart = ending(self.step, error)
            if self.step > 0:
                self._advise(
                    error, warn, reason=f"not saved without the other ranks: {apart}" if apart else self._rescue()
                )
            if is_lost(error):
                raise LostRank(f"step {self.step + 1}: {apart}") from error
            raise

    def _rescue(self) -> str:
        """Save what can be saved; returns why nothing could."""
        if self.optimizer.half_done or self.optimizer.updates != self.updates:
            return "it failed within a step"
        try:
            self.save()
        except (tt_ckpt.CheckpointNotSaved, OSError, RuntimeError, MemoryError) as failure:
            return str(failure)
        return ""

    def _advise(self, error: BaseException, warn: Callable[[str], None], *, reason: str) -> None:
        advice = self._advice(reason)
        error.add_note(advice)
        warn(advice)

    def _advice(self, reason: str) -> str:
        newest = self.saved or self.checkpoints.latest(hashes=False, together=False)
        if newest is None:
            return f"{counted(self.step, 'step')} lost, since no checkpoint could be written: {reason}"
        if newest == self.saved and self.complete:
            return f"training is complete and saved in {newest}: --resume auto only writes what is missing"
        lost = "" if newest == self.saved else f" (that of step {self.step} could not be written: {reason})"
        return f"the newest checkpoint is {newest}{lost}; continue from there with --resume auto"

    # ---- restoring ---------------------------------------------------------------------------------------------------

    def restore(self, saved: tt_ckpt.TrainState) -> None:
        """Put a checkpoint into the model and the optimizer."""
        whole = {"adapter", *(["optimizer"] if keeps_few_bits(self.optimizer) else [])}
        here, groups = self._tensors(), held_groups(saved, self._weights(), whole=whole)
        group = "adapter" if self.job.lora is not None else "model"
        check_tensors(saved.path, group, groups.get(group), here[group])
        if "lost_bits" in groups or (self.job.lora is not None and "lost_bits" in here):
            check_tensors(saved.path, "lost_bits", groups.get("lost_bits"), here.get("lost_bits", here[group]))
        if self.job.lora is not None:
            tt_peft.load_adapter_state_(self.model, groups["adapter"])
            for parameter, bits in self.optimizer.lost.items():
                bits.copy_(groups["lost_bits"][self.names[parameter]])
        else:
            self._restore_weights(groups["model"], groups.get("lost_bits"))
        try:
            load_optimizer_tensors_(self.optimizer, groups.get("optimizer", {}), self.names)
        except ValueError as error:
            raise ConfigError([f"--resume: {saved.path}: {error}; choose another checkpoint"]) from error
        for key in _SAVED:
            setattr(self, key, saved.state.get(key))
        if saved.path.parent == self.checkpoints.directory:
            self.saved = saved.path

    @torch.no_grad()
    def _restore_weights(self, saved: Mapping[str, Tensor], bits: Mapping[str, Tensor] | None) -> None:
        """Trained weights of a full run: bf16 beside the bits that the rounding lost, or fp32 shards; from either."""
        for parameter, name in self.names.items():
            whole = saved[name] if bits is None else join(local(saved[name]), local(bits[name]))
            if parameter in self.optimizer.lost:
                split_(
                    whole.to(parameter.device, torch.float32, copy=True), parameter.data, self.optimizer.lost[parameter]
                )
            else:
                local(parameter).copy_(local(whole))

    def _weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for parameter, name in self.names.items()}


def finite_or_none(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
