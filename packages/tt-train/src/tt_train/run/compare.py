"""Whether a run repeats another one: a digest of the tokens that each step saw, and the first step that differs."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tt_ckpt.commit import sha256_of
from tt_ckpt.files import regular
from tt_train.errors import ConfigError, counted
from tt_train.losses.cross_entropy import IGNORE, Batch
from tt_train.records.run_files import FinishedRun, is_run, read_rows
from tt_train.run.resume import flat

STREAM = "token_stream"
_EXACT = ("loss", "grad_norm", "lr", "tokens", "eval_loss")
_FACTS = ("base_model_sha256", "tokenizer", "recipe_sha256", "device", "ranks", "seed")


def digest_of(batches: Sequence[Batch], *, pad_id: int) -> int:
    """48 bits of the rows of a step: equal however they are padded, split into micro-batches or spread over ranks.

    Sums of these, modulo 2^64, are the digest of more rows. A row without a trained token does not count.
    """
    total = 0
    for batch in batches:
        ids, labels = batch["input_ids"].to("cpu", torch.int64), batch["labels"].to("cpu", torch.int64)
        used = (labels != IGNORE) | (ids != pad_id)
        for row, label, mask in zip(ids, labels, used, strict=True):
            if not bool((label != IGNORE).any()):
                continue
            length = int(mask.nonzero()[-1]) + 1
            whole = torch.stack([row[:length], label[:length]]).contiguous().numpy().tobytes()
            total += int.from_bytes(hashlib.blake2b(whole, digest_size=6).digest(), "little")
    return total & (1 << 63) - 1


def chained(before: str, digest: int) -> str:
    """The digest of all steps up to one whose rows have ``digest``; ``before`` is that of the steps before it."""
    return hashlib.blake2b(f"{before} {digest}".encode(), digest_size=8).hexdigest()


def compare(run: Path, other: Path) -> tuple[bool, list[str]]:
    """Whether ``run`` made the same steps as ``other``, to the bit, and lines for people: the first that differs."""
    here, there = ({row["step"]: row for row in read_rows(path / "metrics.jsonl")} for path in (run, other))
    shared = sorted(here.keys() & there.keys())
    if not any(shared):
        return False, [f"{other} has no step in common with {run}"]
    for step in shared:
        if found := _differences(here[step], there[step]):
            rows = (here[step].get(STREAM), there[step].get(STREAM))
            same = "the same" if rows[0] == rows[1] else "different"
            about = "" if step == 0 or None in rows else f"; its rows are {same}"
            return False, [f"the first step that differs from {other} is {step}: {', '.join(found)}{about}",
                           *_facts(run, other)]  # fmt: skip
    ends = max(here), max(there)
    made = f"the same as {other} in all {counted(len([step for step in shared if step]), 'step')} that both have"
    if ends[0] != ends[1]:
        return True, [f"{made}; this run ends at step {ends[0]}, the other one at step {ends[1]}"]
    results = [_result(FinishedRun(path)) for path in (run, other)]
    if None in results or results[0] == results[1]:
        return True, [f"{made}{'' if None in results else ', with the same result'}"]
    return False, [f"{made}, but the results differ", *_facts(run, other)]


def check_comparable(other: Path) -> None:
    """ConfigError, before anything is trained, unless ``other`` is a run that has made steps."""
    if not is_run(other):
        raise ConfigError([f"--compare: {other} is not a run directory; tt ls runs lists them"])
    if next(read_rows(other / "metrics.jsonl"), None) is None:
        raise ConfigError([f"--compare: {other} has not made a step"])


def _differences(row: dict[str, Any], other: dict[str, Any]) -> list[str]:
    keys = [key for key in _EXACT if row.get(key) != other.get(key)]
    return [f"{key} {row.get(key)} here, {other.get(key)} there" for key in keys] or (
        ["other rows"] if None not in (a := row.get(STREAM), b := other.get(STREAM)) and a != b else []
    )


def _facts(run: Path, other: Path) -> list[str]:
    """What the two runs were not made with alike, which may be why."""
    here, there = FinishedRun(run).manifest, FinishedRun(other).manifest
    found = [
        f"{key}: {here.get(key)} here, {there.get(key)} there" for key in _FACTS if here.get(key) != there.get(key)
    ]
    ours, theirs = ((m.get("environment") or {}).get("packages") or {} for m in (here, there))
    found += [f"{name}: {ours.get(name)} here, {theirs.get(name)} there" for name in sorted({*ours, *theirs})
              if ours.get(name) != theirs.get(name)]  # fmt: skip
    config, before = (flat(manifest.get("config") or {}) for manifest in (here, there))
    found += [f"{key}: {config.get(key)} here, {before.get(key)} there" for key in sorted({*config, *before})
              if config.get(key) != before.get(key)]  # fmt: skip
    return found


def _result(run: FinishedRun) -> list[str] | None:
    """The sha256 of each file of weights of the result."""
    folder = run.adapter or run.model
    return None if folder is None else [sha256_of(regular(file)) for file in sorted(folder.glob("*.safetensors"))]
