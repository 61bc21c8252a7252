"""``tt run``: train, with a recipe, a config, or a recipe file of one's own; on one process or many."""

import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tt_cli.group import Invocation, pass_invocation
from tt_cli.names import composed
from tt_cli.options import AT_LEAST_ONE, config_words, json_option
from tt_cli.terminal import answer, is_hushed, print_json, tell
from tt_cli.torchrun_words import RunVerb
from tt_train.errors import ConfigError, Interrupted, LostRank

if TYPE_CHECKING:
    from tt_train.config import RunConfig
    from tt_train.devices.launch import Place
    from tt_train.run.console import RunFacts

_PET = ("PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_RDZV_ENDPOINT")  # of a pod of Kubeflow's trainer


@click.command(
    "run",
    cls=RunVerb,
    examples=[
        "tt run sft model.path=Qwen/Qwen3-0.6B data.train=rows.jsonl adapter.rank=8",
        "tt run my_sft.py --config my.yaml optimizer.lr=1e-4 -o runs/mine",
        "tt run runs/first/config.yaml -o runs/first --resume auto",
        "tt run runs/first/config.yaml -o runs/repeated --compare runs/first",
        "tt run my.yaml --nproc 2 -o runs/two",
        "tt run my.yaml --nproc 2 -o runs/again --max-restarts 3",
        "tt run --check --nproc 2",
    ],
)
@config_words(optional=True)
@click.option(
    "-o",
    "--output-dir",
    metavar="DIR",
    type=click.Path(),
    show_default="runs/<time>-<model>-<method>",
    help="Run directory to write.",
)
@click.option(
    "--resume",
    metavar="auto|PATH",
    type=click.Path(),
    help="Continue a run: auto takes the newest checkpoint of the run at -o or of this config; PATH is a run or one of "
    "its checkpoints. PATH with -o starts a new run from there.",
)
@click.option("--dry-run", is_flag=True, help="Load everything, print what would be trained, and stop before step 1.")
@click.option(
    "--nproc",
    metavar="N|auto|gpu",
    help="Number of processes on this machine, one per GPU; auto takes all GPUs. Options of torchrun, such as "
    "--nnodes 2 or --max-restarts 3, may be given too.",
)
@click.option(
    "--compare",
    metavar="RUN",
    type=click.Path(),
    help="After training, report the first step that differs from RUN, to the bit; the exit code is 1 if one does.",
)
@click.option(
    "--check",
    is_flag=True,
    help="Train nothing: start the processes, let them meet and add up a number, and report which ones are missing.",
)
@click.option(
    "--check-timeout",
    type=AT_LEAST_ONE,
    metavar="SECONDS",
    default=30,
    show_default=True,
    help="Time that --check waits for the processes.",
)
@json_option
@pass_invocation
def command(
    invocation: Invocation,
    what: str | None,
    overrides: tuple[str, ...],
    config_file: str | None,
    output_dir: str | None,
    resume: str | None,
    dry_run: bool,
    nproc: str | None,
    compare: str | None,
    check: bool,
    check_timeout: int,
    allow_import: tuple[str, ...],
    as_json: bool,
) -> int | None:
    """Train a model with a recipe, a config or your own recipe file.

    KEY=VALUE words such as optimizer.lr=1e-4 override the config. adapter.rank=8 trains LoRA; adapter=null trains the
    whole model. The last line of stdout is the run directory.

    Several processes are started by --nproc, by torchrun, by srun, or in a pod of Kubeflow's trainer.
    """
    if any(name in os.environ for name in ("RANK", "SLURM_PROCID")):
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what a rank waits for is said in words of ours
    from tt_train.devices.launch import place

    here = place()
    invocation.rank = here.rank if here is not None else 0
    launches = nproc is not None or bool(invocation.launch)
    if launches and here is not None and "RANK" in os.environ:
        raise click.UsageError("this process is a rank of torchrun already; leave out --nproc and torchrun's options")
    launches = launches or (here is None and any(name in os.environ for name in _PET))
    if nproc == "1" and not invocation.launch and not check:
        launches, here = False, None
    if check:
        from tt_cli.check import check_ranks

        if as_json:
            raise click.UsageError("--json has no result to print with --check; give only one of the two")
        return check_ranks(None if launches else here, invocation.launch, nproc, timeout_s=check_timeout)
    if what is None:
        raise click.UsageError("missing argument 'RECIPE|CONFIG|FILE.py'", click.get_current_context())
    asked = _Asked(what, overrides, config_file, output_dir, resume, dry_run, compare, allow_import, as_json,
                   invocation.verbose)  # fmt: skip
    if launches:
        return _launch(asked, nproc, invocation.launch)
    if here is not None and here.size > 1:
        return _train_as_rank(asked, invocation, here)
    return _train(_restarted(asked, invocation), invocation, asked.config())


@dataclass(frozen=True)
class _Asked:
    """The words of the command line but those about processes."""

    what: str
    overrides: tuple[str, ...]
    config_file: str | None
    output_dir: str | None
    resume: str | None
    dry_run: bool
    compare: str | None
    allow_import: tuple[str, ...]
    as_json: bool
    verbose: bool

    def config(self, processes: int = 1) -> "RunConfig":
        from tt_train.settings.keys.paths import home

        config = composed(self.what, self.config_file, self.overrides, self.allow_import, devices=processes)
        return config if self.output_dir is None else replace(config, output_dir=home(self.output_dir))

    def words(self, run_dir: Path | None) -> list[str]:
        """The same command for a rank, which writes to ``run_dir``."""
        options = {"--config": self.config_file, "-o": run_dir or self.output_dir, "--resume": self.resume,
                   "--compare": self.compare}  # fmt: skip
        given = [str(word) for option, value in options.items() if value is not None for word in (option, value)]
        given += [word for module in self.allow_import for word in ("--allow-import", module)]
        flags = {"--dry-run": self.dry_run, "--json": self.as_json, "-v": self.verbose, "-q": is_hushed()}
        given += [flag for flag, is_set in flags.items() if is_set]
        return ["run", self.what, *self.overrides, *given]


def _launch(asked: _Asked, nproc: str | None, torchrun: Sequence[str]) -> int:
    """Start the processes, after the mistakes that can be found by one."""
    from tt_cli import agent
    from tt_train.inputs.components import too_many_processes
    from tt_train.inputs.model import Processes
    from tt_train.job import look_over
    from tt_train.run.resume import check_destination

    launch = agent.asked_for(torchrun, nproc)
    config = asked.config(launch.most)
    problems = too_many_processes(config, launch.nproc)
    if launch.nodes > 1 and launch.options.max_restarts and config.output_dir is None:
        problems.append("--max-restarts: on several machines a run needs a name that all know: add -o DIR")
    if problems:
        raise ConfigError(problems)
    if launch.nodes == 1:  # another machine's launcher may join a run that has begun
        check_destination(config, asked.resume)
    look_over(config, processes=Processes(launch.most, launch.nproc))
    run_dir = None if launch.nodes > 1 or asked.dry_run else _run_dir(config, asked.resume)
    return agent.start(
        launch, asked.words(run_dir), run_dir or (Path(config.output_dir) if config.output_dir else None)
    )


def _run_dir(config: "RunConfig", resume: str | None) -> Path:
    """Where the run will write: chosen here, so that a restart finds it."""
    from tt_train.config import method_of
    from tt_train.run.resume import find_origin, new_path

    origin = find_origin(config, resume)
    if origin is not None and origin.in_place:
        return origin.run
    if config.output_dir is not None:
        return Path(config.output_dir)
    return new_path(None, config.model.path or config.model.name or "", method_of(config))


def _restarted(asked: _Asked, invocation: Invocation) -> _Asked:
    """The command as it is after a rank was lost: it continues its own run."""
    from tt_train.devices.launch import is_restarted

    if not is_restarted():
        return asked
    if invocation.rank == 0:
        tell("a rank was lost: the run starts again from its newest checkpoint")
    return replace(asked, resume="auto")


def _train_as_rank(asked: _Asked, invocation: Invocation, here: "Place") -> int:
    """Train as one process of several: rank 0 prints and answers."""
    from tt_train.devices import launch
    from tt_train.inputs.components import pick_device

    store = launch.meet(here)
    config = launch.everywhere(lambda: asked.config(here.size), met=(here, store))
    asked = _restarted(asked, invocation)
    device = pick_device(config.device)
    with launch.joined(here, store, device_type=device.type, timeout_s=config.process_group_timeout_s):
        try:
            return _train(asked, invocation, config)
        except RuntimeError as error:
            if launch.is_lost(error):  # while loading, or in what a recipe does beside its steps
                raise LostRank(launch.ending(0, error)) from error
            raise


def _train(asked: _Asked, invocation: Invocation, config: "RunConfig") -> int:
    from tt_cli.console import QuietConsole, console_here
    from tt_train.records.run_files import read_manifest
    from tt_train.run.compare import check_comparable, compare
    from tt_train.settings.recipe_file import recipe_of
    from tt_train.settings.registry import finding_modules_here

    recipe = recipe_of(config)
    if asked.compare is not None:
        check_comparable(Path(asked.compare))
    shows = invocation.rank == 0
    # a recipe may import late
    with closing(console_here() if shows else QuietConsole()) as console, finding_modules_here(asked.allow_import):
        try:
            run_dir = recipe.main(config, console=console, resume=asked.resume, dry_run=asked.dry_run)
        except Interrupted:
            if (
                console.run_dir is not None and shows and not asked.as_json
            ):  # else it was stopped before there was anything to say
                answer(console.run_dir)
            raise
        finally:
            invocation.run_dir = console.run_dir
    if not shows:
        return 0
    if asked.dry_run:
        tell(f"would train, and write to {run_dir}; nothing was written")
        if asked.as_json:
            print_json({"run": None, "dry_run": True, **_about(console.facts)})
        return 0
    same, lines = (True, []) if asked.compare is None else compare(run_dir, Path(asked.compare))
    for line in lines:
        tell(line)
    if asked.as_json:
        facts = read_manifest(run_dir)
        differences = None if asked.compare is None or same else lines
        print_json({"run": str(run_dir), "dry_run": False, **{name: facts.get(key) for name, key in _FACTS.items()},
                    "summary": facts.get("summary"), "differences": differences})  # fmt: skip
    else:
        answer(run_dir)
    return 0 if same else 1


# what --json says of a run -> the key of its manifest
_FACTS = {"model": "base_model", "method": "method", "parameters": "parameters", "trainable": "trainable",
          "steps_total": "steps_total", "device": "device"}  # fmt: skip


def _about(facts: "RunFacts | None") -> dict[str, Any]:
    """The same before a run has a manifest."""
    said = {name: None if facts is None else getattr(facts, name) for name in _FACTS}
    return {**said, "summary": None, "differences": None}
