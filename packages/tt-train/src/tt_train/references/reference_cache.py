"""Log-probabilities of answers under a reference model, computed once and kept on disk.

The folder holds one file of tensors and a manifest that says what they were computed from. Numbers of other rows,
weights or settings are refused, never used.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tt_data
from tt_ckpt.commit import fsync_dir, make_tmp, read_manifest, remove_tree, sha256_of, verify, write_manifest
from tt_ckpt.files import regular
from tt_ckpt.mapped_file import MappedFile
from tt_ckpt.safetensors_file import write_tensor_dict
from tt_ckpt.shown import plain, quoted
from tt_data.token_rows.dataset import LogProbs
from tt_train.config import RunConfig
from tt_train.devices.distributed import world
from tt_train.errors import ConfigError, counted
from tt_train.evaluate import evaluating, to_device
from tt_train.job import Job
from tt_train.losses.cross_entropy import Batch

FORMAT = 1
TENSORS = "log_probs.safetensors"
Rows = tt_data.TokenDataset | tt_data.PackedDataset
AnswerLogProbs = Callable[[Batch], Tensor]  # [A], the sums over the trained tokens of each answer of a batch


@dataclass(kw_only=True)
class ReferenceCache:
    """The reference's log-probabilities of every row of ``datasets``, in ``folder``.

    ``load`` and ``make`` give them to the rows: as ``reference_log_probs`` (and ``kl_reference_log_probs`` of judged
    rows) they are in every row, pack and batch from then on. All ranks call both.

    facts: what the numbers depend on beside the rows, from ``reference_facts``. key: the config key, for errors.
    """

    folder: Path
    datasets: Sequence[tt_data.Dataset]
    facts: Mapping[str, Any]
    key: str = "loss.reference_cache"

    def __post_init__(self) -> None:
        self.units = [unit for dataset in self.datasets for unit in _units(dataset)]
        self.leaves = [unit.rows if isinstance(unit, tt_data.PackedDataset) else unit for unit in self.units]
        judged = [leaf.seed for leaf in self.leaves if leaf.kind == "judged"]
        self.about: dict[str, Any] = {
            "format": FORMAT,
            **self.facts,
            "max_seq_len": sorted({leaf.max_seq_len or 0 for leaf in self.leaves}),
            **({"seed of mismatched answers": judged[0]} if judged else {}),
            "data": {leaf.fingerprint: leaf.names[:3] for leaf in self.leaves},
        }

    def load(self) -> bool:
        """Give the rows what is on disk; False if there is nothing yet. No weights are needed.

        Raises:
            ConfigError: the folder is something else, is damaged, or was made from other rows, weights or settings.
        """
        values: dict[str, Tensor] = {}
        problem: str | None = None
        if world().is_main and self.folder.exists():
            try:
                values, problem = self._read()
            except (ValueError, OSError, KeyError, TypeError) as error:
                problem = f"is damaged, or not a cache of log-probabilities ({str(error).partition(';')[0]})"
        self._refuse(problem, "; name another folder, or remove this one to make it again")
        found: bool = world().from_main(bool(values))
        if found:
            self._attach(values)
        return found

    def _refuse(self, problem: str | None, cure: str = "") -> None:
        """ConfigError on every rank if rank 0 has a problem."""
        if (problem := world().from_main(problem)) is not None:
            raise ConfigError([f"{self.key}: {plain(self.folder)} {problem}{cure}"])

    def _read(self) -> tuple[dict[str, Tensor], str | None]:
        """The tensors on disk, or why they are not used. Any other error: the folder is damaged."""
        found = read_manifest(self.folder)
        if lines := _differences(found, self.about):
            return {}, f"was made for something else: {'; '.join(lines)}"
        verify(self.folder)
        file = MappedFile(regular(self.folder / TENSORS, self.folder))
        values: dict[str, Tensor] = {}
        for leaf in self.leaves:
            for name in _names(leaf):
                tensor = values[_key(leaf, name)] = file.tensor(_key(leaf, name)).clone()
                if tensor.dtype != torch.float32 or tensor.shape != _shape(leaf) or not torch.isfinite(tensor).all():
                    raise ValueError(f"{TENSORS} does not have a number for each answer")
        return values, None

    def make(
        self, model: torch.nn.Module, log_probs: AnswerLogProbs, job: Job[RunConfig], say: Callable[[str], None]
    ) -> None:
        """Compute the log-probabilities, each rank its share, write the folder, and give them to the rows.

        model: the reference with its weights. log_probs: what it gives for a batch.

        Raises:
            ConfigError: a log-probability is not finite, or the folder cannot be written.
        """
        self._refuse(self._write(None) if world().is_main else None)  # before hours of work
        rows = sum({leaf.fingerprint: len(leaf) for leaf in self.leaves}.values())
        say(f"log-probabilities of the reference for {counted(rows, 'row')}, kept in {plain(self.folder)} ...")
        values: dict[str, Tensor] = {}
        with evaluating(model):
            for unit, leaf in zip(self.units, self.leaves, strict=True):
                if _key(leaf, "reference_log_probs") not in values:
                    values |= _computed(unit, leaf, log_probs, job)
        values = {name: world().sum(tensor) for name, tensor in values.items()}
        finite = all(bool(torch.isfinite(tensor).all()) for tensor in values.values())
        self._refuse(None if finite else "is not made: a log-probability of the reference is not finite")
        self._refuse(self._write(values) if world().is_main else None)
        self._attach(values)

    def _write(self, values: Mapping[str, Tensor] | None) -> str | None:
        """Put the folder in place, whole (None: try whether it can be); what went wrong, if anything."""
        tmp = None
        try:
            tmp = make_tmp(self.folder)
            if values is None:
                return None
            write_tensor_dict(tmp / TENSORS, values)
            write_manifest(tmp, self.about)
            fsync_dir(tmp)
            if not self.folder.exists():  # else another run was faster
                tmp.rename(self.folder)
                fsync_dir(self.folder.parent)
        except OSError as error:
            return f"cannot be written: {error.strerror or error}"
        finally:
            if tmp is not None:
                remove_tree(tmp)
        return None

    def _attach(self, values: Mapping[str, Tensor]) -> None:
        """Give rank 0's values to the rows of every rank."""
        for leaf in self.leaves:
            for name in _names(leaf):
                held = values[_key(leaf, name)] if world().is_main else torch.zeros(_shape(leaf))
                leaf.log_probs[name] = world().sum(held)


def reference_facts(
    job: Job[RunConfig], model: Path | None, *, adapter: Path | None = None, quantized: bool = False
) -> dict[str, Any]:
    """What log-probabilities under a reference depend on, beside the rows; rank 0 reads the weight files.

    model: its folder; None for the random weights of ``model.name``. adapter: the folder of the adapter that the
    reference has, if any. quantized: whether its weights are 4 bits wide.
    """
    config = job.config
    weights = None
    if world().is_main:
        drawn = f"random weights of {config.model.name}, seed {config.seed}"
        weights = [drawn if model is None else weights_of(model), None if adapter is None else weights_of(adapter)]
    model_weights, adapter_weights = world().from_main(weights)
    return {
        "model": model_weights, "adapter": adapter_weights, "quantized": quantized, "dtype": config.model.dtype,
        "tokenizer or template": job.tokenizer.fingerprint,
    }  # fmt: skip


def weights_of(folder: Path) -> str:
    """A sha256 over the names and contents of the safetensors files and configs in a folder."""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json")]):
        blob = file.resolve()  # the hub's cache calls a large file by its sha256
        known = blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name)
        digest.update(f"{file.name} {blob.name if known else sha256_of(regular(file, folder))}\n".encode())
    return digest.hexdigest()


def _units(dataset: tt_data.Dataset) -> list[Rows]:
    """The data sets of rows, or of packs, that a view shows parts of."""
    if isinstance(dataset, tt_data.Subset):
        return _units(dataset.dataset)
    if isinstance(dataset, tt_data.MixedDataset):
        return [unit for part in dataset.parts for unit in _units(part)]
    if isinstance(dataset, tt_data.JoinedDataset):
        return [unit for part in dataset.parts.values() for unit in _units(part)]
    assert isinstance(dataset, tt_data.TokenDataset | tt_data.PackedDataset)
    return [dataset]


def _names(leaf: tt_data.TokenDataset) -> list[LogProbs]:
    names: list[LogProbs] = ["reference_log_probs", "kl_reference_log_probs"]
    return names if leaf.kind == "judged" and len(leaf) > 1 else names[:1]


def _key(leaf: tt_data.TokenDataset, name: LogProbs) -> str:
    return f"{leaf.fingerprint}.{name}"


def _shape(leaf: tt_data.TokenDataset) -> tuple[int, int]:
    return len(leaf), 2 if leaf.kind == "pair" else 1


def _computed(
    unit: Rows, leaf: tt_data.TokenDataset, log_probs: AnswerLogProbs, job: Job[RunConfig]
) -> dict[str, Tensor]:
    """This rank's share of the log-probabilities, and 0 for the rows of others.

    Rows of similar length share a batch. Sharded weights need as many forward passes on every rank, so the last rows
    are computed twice if they do not divide.
    """
    found = {name: torch.zeros(_shape(leaf)) for name in _names(leaf)}
    order, rank, size = sorted(range(len(unit)), key=unit.length), world().rank, world().size
    share = [order[(start + rank) % len(order)] for start in range(0, len(order), size)]
    own = len(order[rank::size])  # the others come again from the beginning
    for start in range(0, len(share), job.config.micro_batch_size):
        places = share[start : start + job.config.micro_batch_size]
        batch = to_device(tt_data.collate([unit[i] for i in places], pad_id=unit.pad_id), job.device)
        mismatched = {name[3:]: tensor for name, tensor in batch.items() if name.startswith("kl_")}
        of_pack = [unit.members(i) if isinstance(unit, tt_data.PackedDataset) else [i] for i in places]
        kept = [row for rows in of_pack[: max(0, own - start)] for row in rows]
        for name, tensors in zip(_names(leaf), (batch, mismatched), strict=False):
            values = log_probs(tensors).float().cpu().view(-1, _shape(leaf)[1])
            found[name][kept] = values[: len(kept)]
    return {_key(leaf, name): tensor for name, tensor in found.items()}


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """A line for each fact that is not the same, and for each data set that the cache does not have."""
    lines = [
        f"{name} {_short(found.get(name))} there, {_short(value)} here"
        for name, value in wanted.items()
        if name != "data" and found.get(name) != value
    ]
    for fingerprint, files in wanted["data"].items():
        if fingerprint not in found["data"]:
            lines.append(f"data: the rows of {', '.join(map(plain, files))}, as they are read now, are not in it")
    return lines


def _short(value: object) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 64 and value.isalnum() else quoted(value)
