"""The launcher of ``tt run --nproc N``: torchrun's agent in this process, and what its ranks said, shown once.

All options of torchrun work, and the PET_ variables that stand for them. Its log and the ranks' own words are kept in
the run directory. https://docs.pytorch.org/docs/stable/elastic/run.html
"""

import logging
import os
import shutil
import signal
import sys
import tempfile
import uuid
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import click
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.distributed.launcher.api import LaunchConfig
from torch.distributed.run import config_from_args, get_args_parser, parse_min_max_nnodes

from tt_ckpt import files
from tt_ckpt.redaction import redact
from tt_cli.errors import FAILED, WRONG_INPUT
from tt_cli.terminal import say
from tt_train.devices.launch import RESTARTED
from tt_train.errors import TrainingError, log_name
from tt_train.records.visible import visible

_FINAL = {WRONG_INPUT, 128 + signal.SIGINT, 128 + signal.SIGTERM}  # exit codes that starting again would only repeat
_ADDRESS = ("--master-addr", "--master_addr")
SECOND_S = 3  # for the ranks to end after a second signal
_TAIL = 200_000  # bytes of what a rank wrote


# ---- what torchrun is asked for --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What the command line asks of torchrun. ``nodes``: the most that may take part; ``nproc``: processes of each."""

    options: Namespace
    nodes: int
    nproc: int

    @property
    def most(self) -> int:
        """Ranks, if every node comes."""
        return self.nodes * self.nproc


def asked_for(words: Sequence[str], nproc: str | None) -> Launch:
    """``words``: torchrun's own; UsageError for one that it does not take, or that names something to run."""
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise click.UsageError(f"{message}; options of torchrun and what follows -- are for torchrun --help")

    parser.error = refuse  # type: ignore[method-assign]
    options = parser.parse_args([*words, *([f"--nproc-per-node={nproc}"] if nproc is not None else []), "tt"])
    for name in ("module", "no_python", "run_path"):
        if getattr(options, name):
            refuse(f"--{name.replace('_', '-')} does not go with tt run, which is what the processes run")
    if options.rdzv_endpoint and not any(word.startswith(("--rdzv-backend", "--rdzv_backend")) for word in words):
        options.rdzv_backend = os.environ.get("PET_RDZV_BACKEND", "c10d")
    try:
        nodes = parse_min_max_nnodes(options.nnodes)[1]
        alone = options.rdzv_backend == "static" and options.master_port is None and nodes == 1
        if options.standalone or (alone and not options.rdzv_endpoint):
            options.rdzv_backend, options.rdzv_endpoint = "c10d", "localhost:0"
            options.rdzv_id = uuid.uuid4().hex
        has_address = "PET_MASTER_ADDR" in os.environ or any(word.startswith(_ADDRESS) for word in words)
        if nodes > 1 and not options.rdzv_endpoint and not has_address:  # each machine would wait at its own address
            place = "add --rdzv-endpoint HOST:29500, the same on all of them"
            raise ValueError(f"--nnodes {options.nnodes}: the machines must know where to meet; {place}")
        options.master_port = options.master_port or 29500
        count = _processes(options.nproc_per_node)
    except (ValueError, RuntimeError) as error:
        refuse(str(error))
    return Launch(options=options, nodes=nodes, nproc=count)


def _processes(said: str) -> int:
    import torch

    if said.isdecimal() and int(said) > 0:
        return int(said)
    count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if said == "gpu" and not count:
        raise ValueError("--nproc gpu: there is no GPU")
    if said not in ("gpu", "cpu", "auto", "xpu"):
        raise ValueError(f"--nproc: expected a number of processes from 1 on, auto, gpu or cpu, got {said!r}")
    return count if count and said != "cpu" else os.cpu_count() or 1


# ---- the agent -------------------------------------------------------------------------------------------------------


class Agent(LocalElasticAgent):
    """torchrun's agent. It does not restart what starting again only repeats, and knows which ranks ended first."""

    asked = 0  # times to end
    first: Mapping[int, int] = {}  # local rank -> exit code of those that ended by themselves

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        ended = {rank: code for rank, code in self.exit_codes().items() if code}
        result: RunResult = super()._monitor_workers(worker_group)
        if result.failures:
            self.first = ended or {rank: code for rank, code in self.exit_codes().items() if code}
            if _FINAL & set(self.first.values()):
                self._remaining_restarts = 0
        return result

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        started: dict[int, Any] = super()._start_workers(worker_group)
        self.asked = 0
        os.environ[RESTARTED] = "1"  # for the next ones: torchrun does not count a start after another machine's loss
        return started

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        # after a second signal, which cuts the first one's wait short, a rank that still lives is killed soon
        self.asked, again = self.asked + 1, self.asked > 0
        super()._shutdown(death_sig, timeout=SECOND_S if again else timeout)

    def exit_codes(self) -> dict[int, int | None]:
        context = self._pcontext
        handlers = context.subprocess_handlers if isinstance(context, SubprocessContext) else {}
        return {rank: handler.proc.poll() for rank, handler in handlers.items()}

    def ends(self) -> list["End"]:
        """What became of each rank of this machine."""
        context, codes = self._pcontext, self.exit_codes()
        if context is None:
            return []
        ranks = {worker.local_rank: worker.global_rank for worker in self._worker_group.workers}
        return [
            End(rank=ranks.get(local, local), code=codes.get(local), by_itself=local in self.first,
                said=_read_error(Path(context.error_files[local])),
                streams=[Path(place) for place in (context.stdouts[local], context.stderrs[local]) if place])
            for local in sorted(codes)
        ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class End:
    """How a rank ended: its exit code (below 0: a signal) and the error that it left, if it did."""

    rank: int
    code: int | None
    by_itself: bool
    said: dict[str, Any]
    streams: list[Path]

    @property
    def lines(self) -> list[str]:
        """What is left to be shown of it: rank 0 has shown its error itself."""
        if self.said or not self.code or not self.by_itself or (self.rank == 0 and self.code > 0):
            return [] if self.rank == 0 else list(self.said.get("lines", []))
        if self.code < 0:
            name = signal.Signals(-self.code).name
            more = " (which the system sends if memory runs out)" if name == "SIGKILL" else ""
            return [f"rank {self.rank}: ended by {name}{more}{self._last_words()}"]
        return [f"rank {self.rank}: ended with exit code {self.code}{self._last_words()}"]

    def _last_words(self) -> str:
        text = "".join(_tail(place) for place in self.streams).strip()
        return f"; its last words: {text.splitlines()[-1][:300]}" if text else ""


def _read_error(place: Path) -> dict[str, Any]:
    try:
        found = files.read_json(place)["tt"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _tail(place: Path) -> str:
    try:
        with files.regular(place).open("rb") as file:
            file.seek(max(0, place.stat().st_size - _TAIL))
            return visible(redact(file.read(_TAIL).decode("utf-8", "replace")))
    except (OSError, ValueError):
        return ""


# ---- starting --------------------------------------------------------------------------------------------------------


def start(launch: Launch, words: Sequence[str], run_dir: Path | None) -> int:
    """Run ``tt WORDS`` as every rank of this machine, show what rank 0 has not, and return the exit code of the fault.

    ``run_dir``: where the run will write, if that is known; what the ranks wrote to their streams is kept there.
    """
    # without it, a rank that comes late to a restart ends the run: https://github.com/pytorch/pytorch/issues/150532
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // launch.nproc)))
    folder = Path(tempfile.mkdtemp(prefix="tt-ranks-"))
    _log_to(folder / "agent.log")
    config, agent = _agent(launch, words, folder)
    stopped: signal.Signals | None = None
    os.environ.pop(RESTARTED, None)
    try:
        agent.run()
    except SignalException as signaled:
        stopped = signaled.sigval
    except (RendezvousError, TimeoutError) as error:
        count = f"{launch.nodes} nodes" if launch.nodes > 1 else "the node"
        raise TrainingError(f"{count} did not meet at {config.rdzv_endpoint}: {_why(error)}") from error
    finally:
        if stopped is None:
            agent._worker_group.spec.rdzv_handler.shutdown()
        os.environ.pop(RESTARTED, None)
        ends = agent.ends()
        if run_dir is not None and run_dir.is_dir():
            _keep(folder, ends, run_dir)
        shutil.rmtree(folder, ignore_errors=True)
    return shown(ends, stopped)


def _why(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else f"{type(error).__name__}; see --rdzv-conf for the time to wait"


def _agent(launch: Launch, words: Sequence[str], folder: Path) -> tuple[LaunchConfig, Agent]:
    options = launch.options
    own = options.redirects == "0" and options.tee == "0" and options.log_dir is None
    config = config_from_args(Namespace(**{**vars(options), "nproc_per_node": str(launch.nproc)}))[0]
    logs = config.logs_specs
    if own:  # rank 0 of this machine has the terminal
        logs = DefaultLogsSpecs(log_dir=str(folder), redirects=dict.fromkeys(range(1, launch.nproc), Std.ALL))
    assert logs is not None
    address, _, port = config.rdzv_endpoint.rpartition(":") if config.rdzv_backend == "static" else ("", "", "")
    rendezvous = RendezvousParameters(
        backend=config.rdzv_backend, endpoint=config.rdzv_endpoint, run_id=config.run_id, min_nodes=config.min_nodes,
        max_nodes=config.max_nodes, local_addr=config.local_addr, **config.rdzv_configs,
    )  # fmt: skip
    spec = WorkerSpec(
        role=config.role, local_world_size=config.nproc_per_node, entrypoint=sys.executable,
        args=("-P", "-m", "tt_cli", *words), rdzv_handler=get_rendezvous_handler(rendezvous),
        max_restarts=config.max_restarts, monitor_interval=config.monitor_interval,
        master_addr=address or None, master_port=int(port) if port else None, local_addr=config.local_addr,
        event_log_handler=config.event_log_handler, numa_options=config.numa_options,
        virtual_local_rank=config.virtual_local_rank,
    )  # fmt: skip
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = config.signals_to_handle
    return config, Agent(
        spec=spec, logs_specs=logs, start_method=config.start_method, shutdown_timeout=_grace(options, config)
    )


def _grace(options: Namespace, config: LaunchConfig) -> int:
    """Seconds for the ranks to save after a signal. torchrun's 30 would cut a large checkpoint off."""
    known = options.shutdown_timeout is not None or "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" in os.environ
    return (config.shutdown_timeout or 0) if known else 3600


def _log_to(file: Path) -> None:
    """torchrun's own messages are for its log, not for the terminal."""
    logger = logging.getLogger("torch.distributed")
    logger.handlers = [logging.FileHandler(file, encoding="utf-8")]
    logger.propagate = False


def _keep(folder: Path, ends: Sequence[End], run_dir: Path) -> None:
    """Add what the ranks wrote to their streams, and torchrun's log, to the logs of the run."""
    for name, text in [
        *((log_name(end.rank), "".join(_tail(place) for place in end.streams)) for end in ends if end.rank),
        ("logs/agent.log", _tail(folder / "agent.log")),
    ]:
        if text.strip():
            (run_dir / name).parent.mkdir(exist_ok=True)
            files.append_text(run_dir / name, text)


def shown(ends: Sequence[End], stopped: signal.Signals | None = None) -> int:
    """Say each error once that rank 0 has not said, and return the exit code of the fault that came first."""
    failed = [end for end in ends if end.code and (end.by_itself or end.said.get("lines"))]
    causes = [end for end in failed if not end.said.get("lost")] or failed
    told: set[str] = set()
    for line in [line for end in causes for line in end.lines]:
        if line.partition(": ")[2] not in told:
            say(f"error: {line}", err=True)
        told.add(line.partition(": ")[2])
    if stopped is not None and not any(end.code and 0 < end.code < 128 for end in ends):
        return 128 + stopped
    codes = [end.code if end.code and end.code > 0 else FAILED for end in causes]
    return codes[0] if codes else 0
