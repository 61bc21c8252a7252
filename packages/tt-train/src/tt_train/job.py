"""From a config to what a recipe needs. Every mistake that can be found is, before weights load."""

import functools
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

import tt_data
import tt_models
import tt_peft
from tt_train.config import RunConfig, method_of
from tt_train.devices.distributed import world
from tt_train.devices.launch import everywhere
from tt_train.errors import ConfigError, collect
from tt_train.inputs import components
from tt_train.inputs.methods import method_mistakes
from tt_train.inputs.model import (
    ONE_PROCESS,
    Processes,
    check_adapter,
    check_headers,
    model_folder,
    read_hf_config,
    vocabulary_mistakes,
)
from tt_train.inputs.questions import question_notes
from tt_train.inputs.rows import (
    Kind,
    count_rows,
    evaluation_mistakes,
    hold_out,
    kind_mistakes,
    packing_notes,
    sequence_length,
    training_rows,
    wanted_rows,
)
from tt_train.memory import DTYPES
from tt_train.optim.schedule import schedule_mistakes, schedule_notes
from tt_train.settings.keys.mistakes import missing, refuse_mistakes

C = TypeVar("C", bound=RunConfig)
C_co = TypeVar("C_co", bound=RunConfig, covariant=True)


@dataclass(kw_only=True)
class Job(Generic[C_co]):
    """A config with its files read: tokenizer, rows and shapes, but no weights yet."""

    config: C_co
    model_path: Path | None  # None: random weights
    model_config: tt_models.ModelConfig
    hf_config: dict[str, Any]
    lora: tt_peft.LoRAConfig | None
    tokenizer: tt_data.Tokenizer
    train: tt_data.Dataset | tt_data.Stream
    held_out: tt_data.Dataset | None
    head: tt_data.Report | None  # the report of a stream's first rows
    device: torch.device
    dtype: torch.dtype
    notes: list[str] = field(default_factory=list)

    @property
    def method(self) -> str:
        return method_of(self.config)

    @property
    def base_model(self) -> str:
        """The name to write into adapters and cards: a hub id stays one, a folder becomes absolute."""
        path = self.config.model.path
        if path is None:
            return self.config.model.name or "random"
        return str(self.model_path) if Path(path).exists() else path

    @property
    def num_rows(self) -> int | None:
        """Sequences of an epoch, packs if rows are packed; a stream does not know. Of a sample: about as many."""
        if isinstance(self.train, tt_data.Stream):
            return None
        report = self.train.report
        share = report["sampled_from"] / report["read"] if "sampled_from" in report else 1
        return round(len(self.train) * share)

    @property
    def row_count(self) -> str:
        """For people: the number of rows, or that nobody knows it yet."""
        count = count_rows(self.train)
        return "a stream of" if count is None else f"{count:,}"

    @property
    def data_lines(self) -> list[str]:
        """What became of the rows, as ``tt data show`` says it; the rows held out as well."""
        first, *rest = tt_data.summary_lines(self.data_report)
        if self.held_out is None:
            return [first, *rest]
        if isinstance(self.held_out, tt_data.Subset):  # a share of the rows that the first line counts
            return [f"{first}; held out: {count_rows(self.held_out):,} of them", *rest]
        sets = self.held_out.parts if isinstance(self.held_out, tt_data.JoinedDataset) else {"": self.held_out}
        for name, rows in sets.items():
            held_out, *others = tt_data.summary_lines(rows.report)
            key = f"held out as {name}" if name else "held out"
            first, rest = f"{first}; {key}: {held_out}", [*rest, *(f"{key}: {line}" for line in others)]
        return [first, *rest]

    @property
    def data_report(self) -> tt_data.Report:
        """What became of the rows; of a stream, what becomes of its first ones."""
        return self.train.report if self.head is None else self.head

    @property
    def steps_per_epoch(self) -> int | None:
        return tt_data.steps_per_epoch(self.num_rows, self.config.batch_size) if self.num_rows else None

    @property
    def rows_to_show(self) -> tt_data.Dataset:
        """A data set with an index to take prompts from: what is held out, else what trains."""
        if isinstance(self.held_out, tt_data.JoinedDataset):  # the rows of each set in turn
            ends = list(itertools.accumulate(map(len, self.held_out.parts.values()), initial=0))
            places = ((row - first, row) for first, end in itertools.pairwise(ends) for row in range(first, end))
            return tt_data.Subset(self.held_out, [row for _, row in sorted(places)])
        if self.held_out is not None:
            return self.held_out
        return self.train.head() if isinstance(self.train, tt_data.Stream) else self.train

    def rows_of(self, step: int) -> str:
        """For people: the rows that step ``step`` (counted from 1) is made of."""
        config = self.config
        if isinstance(self.train, tt_data.Stream):
            return f"the rows from {(step - 1) * config.batch_size} on"
        order: dict[str, Any] = {"batch_size": config.batch_size, "seed": config.seed, "shuffle": config.data.shuffle}
        rows = tt_data.rows_at(step - 1, num_rows=len(self.train), **order)
        epoch = (step - 1) // (self.steps_per_epoch or 1)
        places = [self.train.where(row, epoch) for row in rows[:8]]
        return f"{', '.join(places)}{' ...' if len(rows) > 8 else ''}"

    @property
    def steps_total(self) -> int:
        if self.config.max_steps is not None:
            return self.config.max_steps
        assert self.steps_per_epoch is not None  # compose has seen to it
        return self.config.epochs * self.steps_per_epoch


def assemble(config: C, *, rows: Kind | None = None, elsewhere: int | None = None, sample: bool = False) -> Job[C]:
    """Read everything that the config names but the weights. ConfigError holds every mistake that was found.

    ``rows``: what the recipe trains on: ``single`` answers, ``pair``s of a chosen and a rejected one, or ``judged``
    answers; by default what the loss of the config is over. A mistake that one of several ranks finds ends all of them.
    ``elsewhere``: the number of processes of a run that is planned for another machine, whose memory may be larger.
    ``sample``: read a sample of large data, to check it; the job cannot train.
    """
    processes = Processes(elsewhere or world().size, world().local_size)
    job = everywhere(lambda: _assemble(config, rows, processes=processes, here=elsewhere is None, sample=sample))
    assert job is not None
    return job


def look_over(config: RunConfig, *, processes: Processes = ONE_PROCESS, first: int = 64) -> None:
    """ConfigError for every mistake that ``assemble`` finds, but in the ``first`` rows alone: before ranks start."""
    _assemble(config, None, processes=processes, first=first)


def _assemble(
    config: C, rows: Kind | None, *, processes: Processes, here: bool = True, first: int | None = None,
    sample: bool = False,
) -> Job[C] | None:  # fmt: skip
    """None if only the ``first`` rows are to be looked at."""
    refuse_mistakes(config)
    problems: list[str] = []
    notes: list[str] = []
    device = collect(problems, "device", lambda: components.pick_device(config.device))
    problems += components.mistakes(config, device, ranks=processes.all)
    notes += components.device_notes(config, device)
    model_path = collect(problems, "model.path", lambda: model_folder(config))
    hf_config = model_config = lora = train = held_out = None
    if model_path is not None or config.model.path is None:
        key = "model.path" if model_path is not None else "model.name"
        hf_config = collect(problems, key, lambda: read_hf_config(config, model_path))
    if hf_config is not None:
        model_config = collect(problems, "model.path", lambda: tt_models.config_from_hf(hf_config))
    if model_config is not None:
        fits = processes if here else None
        lora = collect(problems, "adapter", lambda: check_adapter(config, model_config, device, notes, processes=fits))
        collect(problems, "model.path", lambda: check_headers(model_config, model_path))
    tokenizer = read_tokenizer(config, model_path, problems)
    if tokenizer is not None and model_config is not None:
        problems += vocabulary_mistakes(tokenizer, model_config)
        length = sequence_length(config, model_config, notes)
        some: dict[str, Any] = {"sample": sample and not config.data.streaming}
        if first is not None and not config.data.streaming:
            some = {"limit": first, "packing": False, "max_dropped_share": None}
        train = collect(problems, "data.train", lambda: training_rows(config, tokenizer, length, **some))
        if train is not None and config.data.eval is not None:
            parts = collect(problems, "data.eval", lambda: hold_out(config, train, tokenizer, length, sample=sample))
            train, held_out = parts or (train, None)
        if train is not None:
            method = functools.partial(method_mistakes, config, model_config, lora, train, length)
            problems += collect(problems, "kd.teacher", method) or []
        if first is None or config.recipe_sha256 is None:  # a recipe file may want other rows than its loss says
            for key, found in (("data.train", train), ("data.eval", held_out)):
                problems += kind_mistakes(config, key, found, wanted=rows or wanted_rows(config))
    head = collect(problems, "data.train", lambda: train.head_report() if isinstance(train, tt_data.Stream) else None)
    problems += evaluation_mistakes(config)
    if tokenizer is not None and held_out is not None:
        number = config.samples.exact_match
        notes += collect(problems, "data.eval", lambda: question_notes(held_out, tokenizer, num=number)) or []
    if problems:
        raise ConfigError(problems)
    if first is not None:
        return None
    assert hf_config is not None
    assert model_config is not None
    assert device is not None
    assert tokenizer is not None
    assert train is not None
    job = Job(
        config=config,
        model_path=model_path,
        model_config=model_config,
        hf_config=hf_config,
        lora=lora,
        tokenizer=tokenizer,
        train=train,
        held_out=held_out,
        head=head,
        device=device,
        dtype=DTYPES[config.model.dtype],
        notes=notes,
    )
    if too_long := schedule_mistakes(config.schedule, job.steps_total):
        raise ConfigError(too_long)
    if config.profile is not None:
        first, last = config.profile.first_step, config.profile.first_step + config.profile.num_steps - 1
        if last > job.steps_total:
            cure = "lower profile.first_step"
            raise ConfigError(
                [f"profile.first_step: step {first} to {last} are traced, the run has {job.steps_total} steps; {cure}"]
            )
    job.notes += schedule_notes(config, job.steps_total) + packing_notes(config, train, job.steps_total)
    return job


def read_tokenizer(config: RunConfig, model_path: Path | None, problems: list[str]) -> tt_data.Tokenizer | None:
    """The tokenizer with the template of the config; None if there is none to read, and why in ``problems``."""
    source = config.model.tokenizer or model_path
    if source is None:
        return None
    key = "model.path" if config.model.tokenizer is None else "model.tokenizer"
    plain = collect(problems, key, lambda: tt_data.load_tokenizer(source))
    if plain is None:
        return None
    return collect(problems, "data.template", lambda: tt_data.choose_template(plain, config.data.template))


def rows_to_train(config: RunConfig, *, limit: int | None = None) -> tt_data.Dataset | tt_data.Stream:
    """The rows of ``data.train`` (the first ``limit``) as a run would see them, those to be held out included.

    Needs no device and no weights, and takes any number of bad rows. ConfigError names every mistake.
    """
    if lacking := [line for line in missing(config) if not line.startswith("max_steps")]:
        raise ConfigError(lacking)
    problems: list[str] = []
    folder = collect(problems, "model.path", lambda: model_folder(config))
    tokenizer = read_tokenizer(config, folder, problems)
    rows: tt_data.Dataset | tt_data.Stream | None = None
    if tokenizer is not None and not problems:
        model_config = tt_models.config_from_hf(read_hf_config(config, folder))
        length = sequence_length(config, model_config, [])
        options = {
            "max_dropped_share": None,
            "limit": limit if not (config.data.packing or config.data.streaming) else None,
        }
        rows = collect(problems, "data.train", lambda: training_rows(config, tokenizer, length, **options))
    if rows is None:
        raise ConfigError(problems)
    return rows
