"""An adapter of torchtune 0.1 to 0.6 as a PEFT folder.

torchtune keeps the factors under its own names (``adapter_N.pt``, from 0.5 on ``epoch_N/adapter_model.pt``). The PEFT
files that it may have beside them are not read: they permute q and k of every family, also of those that do not rotate
neighbouring pairs (Qwen 2), and do not permute DoRA's magnitudes.
"""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tt_ckpt import commit
from tt_ckpt.files import inside, read_json
from tt_ckpt.formats.pickles import read_pickled
from tt_ckpt.formats.torchtune import Family, family_of
from tt_ckpt.formats.translation import rotated_heads, to_half_split
from tt_ckpt.hf.directory import CONFIG_BYTES, check_destination, new_directory, read_config
from tt_ckpt.mapped_file import MappedFile
from tt_ckpt.model_path import resolve
from tt_ckpt.safe_names import from_home
from tt_ckpt.safetensors_file import write_tensor_dict
from tt_ckpt.shown import plain, quoted

_KINDS = {"lora_a.weight": "lora_A.weight", "lora_b.weight": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
_KEY = re.compile(rf"(.+)\.({'|'.join(map(re.escape, _KINDS))})")
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


@dataclass(frozen=True)
class _Layer:
    """The factors of a linear layer: ``y += (alpha / rank) B A x``, A [rank, in], B [out, rank]; DoRA's magnitude."""

    a: Tensor
    b: Tensor
    magnitude: Tensor | None


@dataclass(frozen=True, kw_only=True)
class AdapterConversion:
    """The result, or that of a ``dry_run``. ``epochs``: those that the source has; the newest was taken."""

    source: str
    destination: str
    epochs: list[int]
    base: str
    rank: int
    alpha: float
    use_dora: bool
    target_modules: list[str]
    num_tensors: int
    num_bytes: int
    seconds: float


def convert_adapter(
    source: str | Path,
    destination: str | Path,
    *,
    config: str | Path | None = None,
    alpha: float | None = None,
    allow_pickle: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> AdapterConversion:
    """Write the adapter ``source`` (torchtune's output directory, or a file in it) as a PEFT folder.

    ``config``: the base model (directory or hub id), if its config.json is not beside the adapter. ``alpha``:
    lora_alpha, if no adapter_config.json beside the adapter has it, as in 0.1. Raises ValueError, FileNotFoundError.
    """
    started, target = time.monotonic(), from_home(destination)
    file, epochs = _find(from_home(source))
    settings = _settings(file)
    base = resolve(config) if config is not None else _folder_with_config(file)
    base_config = read_config(base)
    singles, family = _layers(read_pickled(file, allow_pickle=allow_pickle), base_config, file)
    own_ranks = {layer.a.shape[0] for layer in singles.values()}
    if len(own_ranks) != 1:
        raise ValueError(f"{file}: expected factors of one rank, found the ranks {sorted(own_ranks)}")
    (rank,) = own_ranks
    scale = _alpha(settings, alpha, rank, file) / rank
    layers = _fused(singles, family, base_config, file) if family.fused else singles
    ranks = {name: layer.a.shape[0] for name, layer in layers.items()}  # more, where several are one in PEFT's model
    rank = min(ranks.values())
    tensors = _tensors(layers)
    result = AdapterConversion(
        source=str(file), destination=str(target), epochs=epochs,
        base=str(config or settings.get("base_model_name_or_path") or base), rank=rank, alpha=scale * rank,
        use_dora=any(layer.magnitude is not None for layer in layers.values()), target_modules=_targets(list(layers)),
        num_tensors=len(tensors), num_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        seconds=round(time.monotonic() - started, 3),
    )  # fmt: skip
    if dry_run:
        check_destination(target, overwrite=overwrite)
        return result
    with new_directory(target, result.num_bytes, overwrite=overwrite) as tmp:
        write_tensor_dict(tmp / "adapter_model.safetensors", tensors)
        wider = {name.rpartition(".")[2]: found for name, found in ranks.items() if found != rank}
        commit.write_json(tmp / "adapter_config.json", _peft_config(result, wider, scale))
        written = MappedFile(tmp / "adapter_model.safetensors")
        if any(not torch.equal(written.tensor(name), tensor) for name, tensor in tensors.items()):
            raise ValueError(f"{target}: what was written differs when it is read back; the disk may be failing")
    return result


def _find(source: Path) -> tuple[Path, list[int]]:
    """The file of the newest epoch, and all epochs that there are; of a file, itself."""
    if source.is_file():
        return source, []
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such file or directory; give torchtune's output directory")
    found: dict[int, Path] = {}
    for entry in sorted(source.iterdir()):
        if match := re.fullmatch(r"adapter_(\d{1,9})\.pt", entry.name):
            found[int(match[1])] = entry
        elif (match := re.fullmatch(r"epoch_(\d{1,9})", entry.name)) and (entry / "adapter_model.pt").is_file():
            found[int(match[1])] = entry / "adapter_model.pt"
    if not found:
        alone = source / "adapter_model.pt"
        if not alone.is_file():
            raise FileNotFoundError(
                f"{source}: no adapter of torchtune (adapter_0.pt, epoch_0/adapter_model.pt); give its output directory"
            )
        return inside(alone, source), []
    return inside(found[max(found)], source), sorted(found)


def _settings(file: Path) -> dict[str, Any]:
    """adapter_config.json beside the adapter, which 0.2 and later write; {} if there is none."""
    path = file.parent / "adapter_config.json"
    found = read_json(path, limit=CONFIG_BYTES) if path.is_file() else {}
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def _folder_with_config(file: Path) -> Path:
    for folder in (file.parent, file.parent.parent):
        if (folder / "config.json").is_file():
            return folder
    raise ValueError(
        f"{file.parent}: no config.json, which states the number of heads; give config=DIR of the base model"
    )


def _alpha(settings: Mapping[str, Any], given: float | None, rank: int, file: Path) -> float:
    """lora_alpha as given, or as adapter_config.json has it."""
    said = settings.get("lora_alpha")
    if said is not None and (isinstance(said, bool) or not isinstance(said, int | float) or not abs(said) < 1e9):
        raise ValueError(f"{file.parent}: adapter_config.json: lora_alpha: expected a number, found {quoted(said)}")
    if said is None and given is None:
        raise ValueError(
            f"{file}: torchtune 0.1 does not store lora_alpha; give it, as in --alpha 16 (its configs have 16)"
        )
    if said is not None and given is not None and said != given:
        raise ValueError(f"{file.parent}: adapter_config.json has lora_alpha {said}, not {given:g}; leave alpha out")
    alpha = float(given if said is None else said)  # type: ignore[arg-type]  # one of the two is a number
    stated = settings.get("r", rank)
    if stated != rank:
        raise ValueError(
            f"{file.parent}: adapter_config.json has r {quoted(stated)}, the tensors of {file.name} {rank}"
        )
    return alpha


def _layers(tensors: Mapping[str, Tensor], config: Mapping[str, Any], file: Path) -> tuple[dict[str, _Layer], Family]:
    """The factors by the name of the layer in Hugging Face's terms, where q, k and v are not fused yet."""
    family, heads = family_of(config), rotated_heads(config)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        clean = key
        for wrapper in _WRAPPERS:
            clean = clean.replace(wrapper, "")
        if (match := _KEY.fullmatch(clean)) is None:
            raise ValueError(f"{file}: unknown tensor {plain(key)} in a torchtune adapter; give the file adapter_N.pt")
        name = family.rename.back(f"{match[1]}.weight", file).removesuffix(".weight")
        projection = name.rpartition(".")[2]
        if family.interleaved and projection in ("q_proj", "k_proj") and match[2] != "lora_a.weight":
            tensor = to_half_split(tensor, heads[projection], f"{file}: {plain(key)}")
        parts.setdefault(name, {})[match[2]] = tensor
    singles = {}
    for name, found in parts.items():
        if not {"lora_a.weight", "lora_b.weight"} <= found.keys():
            raise ValueError(f"{file}: {name} lacks lora_a or lora_b; the file is not whole")
        a, b = found["lora_a.weight"], found["lora_b.weight"]
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
            raise ValueError(f"{file}: {name}: lora_a {list(a.shape)} and lora_b {list(b.shape)} do not fit each other")
        singles[name] = _Layer(a, b, found.get("magnitude"))
    return singles, family


def _fused(singles: Mapping[str, _Layer], family: Family, config: Mapping[str, Any], file: Path) -> dict[str, _Layer]:
    """Of q, k and v (gate and up) one layer: A below each other, B in blocks, so that the product is the same."""
    sizes = _rows_of(config)
    result: dict[str, _Layer] = {}
    for name in singles:
        for fused, pieces in family.fused.items():
            names = [piece.removesuffix(".weight") for piece in pieces]
            if (match := next((piece for piece in names if name.endswith(piece)), None)) is None:
                continue
            prefix, whole = name.removesuffix(match), name.removesuffix(match) + fused.removesuffix(".weight")
            if whole not in result:
                result[whole] = _joined([singles.get(prefix + piece) for piece in names],
                                        [sizes[piece.rpartition(".")[2]] for piece in names], whole, file)  # fmt: skip
            break
        else:
            result[name] = singles[name]
    return result


def _rows_of(config: Mapping[str, Any]) -> dict[str, int]:
    heads = rotated_heads(config)
    head_dim = config.get("head_dim") or config["hidden_size"] // heads["q_proj"]
    width = config["intermediate_size"]
    keys = heads["k_proj"] * head_dim
    return {"q_proj": heads["q_proj"] * head_dim, "k_proj": keys, "v_proj": keys, "gate_proj": width, "up_proj": width}


def _joined(pieces: list[_Layer | None], sizes: list[int], name: str, file: Path) -> _Layer:
    there = [piece for piece in pieces if piece is not None]
    if any(piece.b.shape[0] != size for piece, size in zip(pieces, sizes, strict=True) if piece is not None):
        raise ValueError(f"{file}: the rows of {name} are not those of config.json; give config=DIR of the base model")
    blocks = [
        piece.b if piece is not None else there[0].b.new_zeros(size, 0)
        for piece, size in zip(pieces, sizes, strict=True)
    ]
    magnitudes = [piece.magnitude for piece in there if piece.magnitude is not None]
    if magnitudes and len(magnitudes) < len(pieces):
        raise ValueError(
            f"{file}: {name}: DoRA on a part of a layer that is one in Hugging Face's files; merge it first"
        )
    whole = torch.cat(magnitudes) if magnitudes else None
    return _Layer(torch.cat([piece.a for piece in there]), torch.block_diag(*blocks), whole)  # type: ignore[no-untyped-call]


def _tensors(layers: Mapping[str, _Layer]) -> dict[str, Tensor]:
    tensors = {}
    for name, layer in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.a.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.b.contiguous()
        if layer.magnitude is not None:
            tensors[f"base_model.model.{name}.lora_magnitude_vector"] = layer.magnitude.contiguous()
    return tensors


def _targets(names: list[str]) -> list[str]:
    """The last parts of the names if every block has each of them, else the full names."""
    blocks = {match[1] for name in names if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    short: dict[str, set[str]] = {}
    for name in names:
        short.setdefault(name.rpartition(".")[2], set()).add(name)
    whole = all(len(found) == (len(blocks) if next(iter(found)).startswith("model.layers.") else 1)
                for found in short.values())  # fmt: skip
    return list(short) if whole else names


def _peft_config(result: AdapterConversion, wider: Mapping[str, int], scale: float) -> dict[str, Any]:
    alpha = int(result.alpha) if result.alpha == int(result.alpha) else result.alpha
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": result.base, "r": result.rank,
        "lora_alpha": alpha, "lora_dropout": 0.0, "target_modules": result.target_modules, "bias": "none",
        "fan_in_fan_out": False, "use_dora": result.use_dora, "rank_pattern": dict(wider),
        "alpha_pattern": {name: scale * rank for name, rank in wider.items()}, "inference_mode": True,
    }  # fmt: skip
