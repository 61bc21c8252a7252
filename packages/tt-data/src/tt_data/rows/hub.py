"""Data sets of the hub, through the ``datasets`` library: its cache, its environment variables, no remote code."""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tt_data.rows.endpoint import PUBLIC_HUB, check_endpoint, without_password
from tt_data.rows.folders import read_rows
from tt_data.rows.json_files import Placed, file_kind
from tt_data.rows.tables import without_nulls

_REVISION = re.compile(r"[\w][\w./+=#@-]{0,249}", re.ASCII)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")
_ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".rar", ".7z")
_BUILDERS = ("json", "csv", "parquet", "arrow", "text")  # of the datasets library: rows in files


@dataclass(frozen=True, kw_only=True)
class Part:
    """The part of a source to read, in the words of ``datasets.load_dataset``. None: not restricted."""

    split: str | None = None
    data_dir: str | None = None
    data_files: Any = None  # a name or pattern, a list of them, or these by split
    revision: str | None = None

    def options(self) -> dict[str, Any]:
        """The options that are set, without the split."""
        given = {"data_dir": self.data_dir, "data_files": self.data_files, "revision": self.revision}
        return {name: value for name, value in given.items() if value is not None}

    def over(self, other: Part) -> Part:
        """This part, completed by ``other``."""
        return Part(**{f.name: _first(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)})


def _first(one: Any, other: Any) -> Any:
    return other if one is None else one


@dataclass(frozen=True)
class NamedDataset:
    """The place of a data set, the names of its columns, and the template for rows without a schema.
    ``split``, ``data_dir``, ``data_files`` and ``revision`` say which part of it, if the caller does not."""

    source: str
    columns: Mapping[str, str] = field(default_factory=dict)
    template: str | None = None
    split: str | None = "train"
    data_dir: str | None = None
    data_files: Any = None
    revision: str | None = None

    @property
    def part(self) -> Part:
        return Part(split=self.split, data_dir=self.data_dir, data_files=self.data_files, revision=self.revision)


DATASETS: dict[str, NamedDataset] = {
    "alpaca": NamedDataset("tatsu-lab/alpaca"),
    "alpaca_cleaned": NamedDataset("yahma/alpaca-cleaned"),
    "grammar": NamedDataset("liweili/c4_200m", {"sentence": "input"}, "grammar"),
    "samsum": NamedDataset("Samsung/samsum", {"output": "summary"}, "summarize"),
    "slimorca": NamedDataset("Open-Orca/SlimOrca-Dedup"),
    "stack_exchange_paired": NamedDataset(
        "lvwerra/stack-exchange-paired",
        {"prompt": "question", "chosen": "response_j", "rejected": "response_k"},
        "stack_exchange_paired",
        data_dir="data/rl",  # the other folders hold rows for supervised training and for a reward model
    ),
}


def register_dataset(name: str, dataset: NamedDataset) -> None:
    """Make a data set known by ``name``."""
    DATASETS[name] = dataset


def open_hub(name: str, part: Part, *, streaming: bool = False) -> Any:
    """The split of the data set ``org/name`` or ``org/name:config``. Raises ValueError or FileNotFoundError."""
    check_endpoint()
    import datasets

    if part.revision is not None and (".." in part.revision or not _REVISION.fullmatch(part.revision)):
        raise ValueError(f"revision: {part.revision[:80]!r} is not a branch, tag or commit; give one such as main")
    repository, _, config = name.partition(":")
    words = [config] if config else []
    try:
        builder = datasets.load_dataset_builder(repository, *words, **part.options())
        _refuse_foreign(repository, builder)
        if not streaming:
            builder.download_and_prepare()
        found = (builder.as_streaming_dataset if streaming else builder.as_dataset)(split=part.split)
    except Exception as error:
        raise _explain(name, repository, error) from None
    return found[name_of_split(name, list(found))] if isinstance(found, Mapping) else found


def _refuse_foreign(repository: str, builder: Any) -> None:
    """Raise ValueError unless the files that are to be read are rows, and of this repository.

    The page of a data set (README.md) may name any file of this machine, and any address.
    """
    kind = builder.__module__.rpartition(".")[2]
    if "packaged_modules" in builder.__module__ and kind not in (*_BUILDERS, "cache"):  # cache: read before
        raise ValueError(
            f"its files are read as {kind!r}, expected one of {', '.join(_BUILDERS)}; give it as such files"
        )
    own = f"hf://datasets/{repository}@".lower()
    for files in (getattr(builder.config, "data_files", None) or {}).values():
        for file in files:
            if not str(file).lower().startswith(own) or "::" in str(file) or ".." in str(file).split("/"):
                raise ValueError(f"it names a file that is not its own, {str(file)!r}; it is not read")
            if str(file).lower().endswith(_ARCHIVES):
                raise ValueError(f"{str(file)!r} is an archive, which is not unpacked; download it, and give its files")


def name_of_split(name: str, splits: Sequence[str]) -> str:
    """``train``, or the only split there is. Raises ValueError that lists them."""
    if "train" in splits or len(splits) == 1:
        return "train" if "train" in splits else splits[0]
    raise ValueError(f"{name}: name a split, expected one of {list(splits)}")


def rows_from(name: str, rows: Any, start: int = 0) -> Iterator[Placed]:
    """Numbered rows. Raises ValueError that names the row at which reading fails."""
    number = start
    try:
        for number, row in enumerate(rows, start):
            yield number, without_nulls(row)
    except Exception as error:
        raise ValueError(f"{name}: row {number} or a later one cannot be read ({_one_line(error)})") from None


def _explain(name: str, repository: str, error: BaseException) -> Exception:
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    kinds = {type(e).__name__ for e in chain}
    text = " ".join(_one_line(e) for e in chain)
    page = f"{without_password(os.environ.get('HF_ENDPOINT', PUBLIC_HUB))}/datasets/{repository}"
    if "GatedRepoError" in kinds or "is a gated dataset" in text:
        return ValueError(
            f"{name}: a gated data set; ask for access at {page}, then log in (hf auth login, or HF_TOKEN)"
        )
    here = f"{name}: no such file here (looked in {Path.cwd()}), and it could not be loaded from the hub"
    if "OfflineModeIsEnabled" in text or "OfflineModeIsEnabled" in kinds:
        return FileNotFoundError(
            f"{here}, which is switched off (HF_HUB_OFFLINE or HF_DATASETS_OFFLINE); not in its cache"
        )
    if kinds & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        return FileNotFoundError(
            f"{here}: there is no data set with this name, or it is private (hf auth login, or HF_TOKEN)"
        )
    if "Config name is missing" in text:
        configs = re.findall(r"'([^']+)'", text.partition("[")[2].partition("]")[0])
        choice = ", ".join(f"{repository}:{config}" for config in configs)
        return ValueError(f"{name}: contains several data sets; name one of {choice}")
    if kinds & {"DatasetGenerationError", "DatasetGenerationCastError"}:
        return ValueError(_broken_file(repository) or f"{name}: {_one_line(chain[-1])}")
    if isinstance(error, ValueError):
        return ValueError(f"{name}: {_one_line(error)}")
    return FileNotFoundError(f"{here} ({_one_line(error)})")


def _broken_file(repository: str) -> str | None:
    """What our own readers say of the files that were downloaded: ``datasets`` hides file and line."""
    import datasets

    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(datasets.config.HF_CACHE_HOME) / "hub")
    folder = cache / f"datasets--{repository.replace('/', '--')}" / "snapshots"
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and file_kind(path)):
        try:
            deque(read_rows(file), maxlen=0)
        except ValueError as error:
            return str(error)
    return None


def _one_line(error: BaseException) -> str:
    text = without_password(" ".join(str(error).split()))[:300]
    return text if text.isprintable() else ascii(text)[1:-1]
