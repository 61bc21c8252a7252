"""Tensors that are spread over ranks: planned by ``torch.distributed.checkpoint``, stored as safetensors and JSON.

Each rank writes its parts of group ``g`` to ``g.00000.safetensors`` (the number is its rank), and rank 0 writes
``g.layout.json``, which says where each part belongs in its tensor. Any number of ranks can read what any number wrote.
DCP's own storage would be a pickle. A group in one plain ``g.safetensors`` is read as one part per tensor.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from tt_ckpt import commit
from tt_ckpt.ranks import Ranks, box
from tt_ckpt.safetensors_file import NAMES_OF_DTYPES, canonical_order, spec_of, write_tensors
from tt_ckpt.train.tensor_groups import Group, part_key

_SEPARATOR = "/"  # in DCP's flat names: group/name


# ---- writing ---------------------------------------------------------------------------------------------------------


def save_sharded(folder: Path, groups: Mapping[str, Mapping[str, Tensor]], ranks: Ranks) -> dict[str, str]:
    """Write ``groups`` into ``folder``, each rank its parts. Returns file name -> sha256, on rank 0.

    A tensor that is not a DTensor is taken to be equal on all ranks that have it, and one of them writes it.
    """
    flat = {f"{group}{_SEPARATOR}{name}": tensor for group, named in groups.items() for name, tensor in named.items()}
    writer = SafetensorsWriter(folder, ranks.rank)
    try:
        save(flat, storage_writer=writer, process_group=ranks.group, no_dist=ranks.size == 1)
    except CheckpointException as error:
        raise OSError(unwrapped(error)) from error
    return writer.hashes


def unwrapped(error: CheckpointException) -> str:
    """The causes by rank, which the first line of a CheckpointException leaves out."""
    return "; ".join(f"rank {rank}: {cause}" for rank, (cause, _) in sorted(error.failures.items()))


class SafetensorsWriter(StorageWriter):
    """Storage for ``torch.distributed.checkpoint.save`` without a pickle; one file per group and rank."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder
        self.rank = rank
        self.hashes: dict[str, str] = {}

    def reset(self, checkpoint_id: Any = None) -> None:
        self.hashes = {}

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        groups: dict[str, dict[str, Any]] = {}
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO:
                raise ValueError(f"{item.index.fqn}: not a tensor; put it into the state")
            groups.setdefault(item.index.fqn.split(_SEPARATOR, 1)[0], {})[_key(item.index)] = item
        results = []
        for group, items in groups.items():
            name = f"{group}.{self.rank:05d}.safetensors"
            tensors = {key: _tensor(planner, item) for key, item in items.items()}
            specs = {key: spec_of(tensor) for key, tensor in tensors.items()}
            ordered = {key: specs[key] for key in canonical_order(specs)}
            digest = write_tensors(
                self.folder / name, ordered, tensors.__getitem__, metadata={"format": "pt"}, hashed=True
            )
            results += [
                WriteResult(index=items[key].index, size_in_bytes=specs[key].nbytes, storage_data=(name, digest))
                for key in ordered
            ]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write one layout per group, on rank 0."""
        written = {_key(result.index): result for of_rank in results for result in of_rank}
        layouts: dict[str, dict[str, Any]] = {}
        for fqn, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise ValueError(f"{fqn}: not a tensor; put it into the state")
            group, name = fqn.split(_SEPARATOR, 1)
            chunks = []
            for chunk in entry.chunks:
                key = _key(MetadataIndex(fqn, chunk.offsets))
                file, digest = written[key].storage_data
                self.hashes[file] = digest
                chunks.append({"file": file, "offsets": list(chunk.offsets), "sizes": list(chunk.sizes)})
            dtype = NAMES_OF_DTYPES[entry.properties.dtype]
            layouts.setdefault(group, {})[name] = {"dtype": dtype, "shape": list(entry.size), "chunks": chunks}
        for group, tensors in layouts.items():
            commit.write_json(self.folder / f"{group}.layout.json", {"tensors": tensors})


def _tensor(planner: SavePlanner, item: WriteItem) -> Tensor:
    data = planner.resolve_data(item)
    assert isinstance(data, Tensor)
    return data.detach()


def _key(index: MetadataIndex) -> str:
    return part_key(index.fqn.split(_SEPARATOR, 1)[1], tuple(index.offset or ()))


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_sharded(folder: Path, targets: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Copy saved tensors into ``targets`` (group -> name -> tensor or DTensor), each rank the parts that it holds.

    Names, shapes and dtypes must be as saved: nothing is cast silently.
    """
    groups = {name: Group(folder, name) for name in targets}
    for name, named in targets.items():
        for key, tensor in named.items():
            whole = groups[name].wholes.get(key)
            if whole is None:
                raise ValueError(f"{folder}: {name} holds no {key}")
            if whole.dtype != tensor.dtype or whole.shape != tuple(tensor.shape):
                raise ValueError(
                    f"{folder}: {key} was saved as {whole.dtype} {list(whole.shape)}, "
                    f"the run has {tensor.dtype} {list(tensor.shape)}"
                )
    flat = {f"{group}{_SEPARATOR}{name}": tensor for group, named in targets.items() for name, tensor in named.items()}
    planner = DefaultLoadPlanner()
    planner.set_up_planner(flat, _metadata(groups), is_coordinator=True)
    for item in planner.create_local_plan().items:
        group, name = item.storage_index.fqn.split(_SEPARATOR, 1)
        whole = groups[group].wholes[name]
        offset = tuple(item.storage_index.offset or ())
        part = next(part for part in whole.parts if part.offsets == offset)
        source = box(groups[group].part(whole, part), tuple(item.storage_offsets), tuple(item.lengths))
        target = planner.resolve_tensor(item).detach()
        target.copy_(source)
        planner.commit_tensor(item, target)


def _metadata(groups: Mapping[str, Group]) -> Metadata:
    """The files as DCP's planner describes them."""
    return Metadata(
        state_dict_metadata={
            f"{group}{_SEPARATOR}{name}": TensorStorageMetadata(
                properties=TensorProperties(dtype=whole.dtype),
                size=torch.Size(whole.shape),
                chunks=[
                    ChunkStorageMetadata(offsets=torch.Size(part.offsets), sizes=torch.Size(part.sizes))
                    for part in whole.parts
                ],
            )
            for group, held in groups.items()
            for name, whole in held.wholes.items()
        }
    )
