"""The ``profile`` of a config: a Chrome trace of some steps, and a memory snapshot on CUDA, in the run directory.

A file of its own because a profiler that was started must be stopped by whatever ends the run.
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from tt_train.config import ProfileSection
from tt_train.errors import counted
from tt_train.records.run_files import own_folder

MOST_BYTES = 512 * 2**20  # of a trace, compressed
_SNAPSHOT_ENTRIES = 100_000  # allocations and frees


class Profile:
    """Traces the steps ``first_step`` to ``first_step + num_steps - 1``; the step before them warms the profiler up.

    ``begin(step)`` and ``end(step)`` go around every step, and ``close()`` comes at the end, whatever ends the run.
    What cannot be traced is said, and ends no run.
    """

    def __init__(
        self, section: ProfileSection, run: Path, device: torch.device, *, after: int, say: Callable[[str], None]
    ) -> None:
        self.section, self.folder, self.device, self.say = section, own_folder(run, "profile"), device, say
        self.first, self.last = section.first_step, section.first_step + section.num_steps - 1
        self.profiler: profile | None = None
        if after >= self.first:
            say(f"profile: step {self.first} was made before this continuation, so no step is traced")
            self.first = self.last = 0
        self.start = max(self.first - 1, after + 1)

    def begin(self, step: int) -> None:
        """Before a step."""
        if step != self.start or not self.first:
            return
        kinds = {"cuda": [ProfilerActivity.CUDA], "xpu": [ProfilerActivity.XPU]}.get(self.device.type, [])
        self.profiler = profile(
            activities=[ProfilerActivity.CPU, *kinds],
            schedule=schedule(wait=0, warmup=self.first - self.start, active=self.section.num_steps, repeat=1),
            record_shapes=self.section.record_shapes, with_stack=self.section.with_stack,
            profile_memory=self.section.memory, on_trace_ready=self._write,
        )  # fmt: skip
        self.profiler.start()
        if self._snapshots:
            torch.cuda.memory._record_memory_history(max_entries=_SNAPSHOT_ENTRIES)

    def end(self, step: int) -> None:
        """After a step, before anything else is done."""
        if self.profiler is None:
            return
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        self.profiler.step()  # after the last one, writes the trace
        if step == self.last:
            self.close()

    def close(self) -> None:
        """Stop. A trace that is not complete is not written."""
        if self.profiler is not None:
            profiler, self.profiler = self.profiler, None
            profiler.stop()
            if self._snapshots:
                torch.cuda.memory._record_memory_history(enabled=None)

    @property
    def _snapshots(self) -> bool:
        return self.section.memory and self.device.type == "cuda"

    def _write(self, profiler: profile) -> None:
        if profiler.step_num < self.last - self.start + 1:  # stopped before the last step
            return
        steps = f"steps-{self.first:06d}-{self.last:06d}"
        trace = self.folder / f"{steps}.json.gz"
        try:
            self.folder.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(trace))
            written = [trace]
            if self._snapshots:
                written.append(self.folder / f"{steps}-memory.pickle")
                torch.cuda.memory._dump_snapshot(str(written[1]))  # type: ignore[no-untyped-call]
            if (size := trace.stat().st_size) > MOST_BYTES:
                trace.unlink()
                self.say(f"profile: a trace of {size:,} bytes was not kept; lower profile.num_steps or batch_size")
                return
        except OSError as error:
            self.say(f"profile: not written: {error}")
            return
        made = ", ".join(os.path.relpath(path) for path in written)
        self.say(f"profile: {counted(self.section.num_steps, 'step')} in {made}; open it in https://ui.perfetto.dev")
