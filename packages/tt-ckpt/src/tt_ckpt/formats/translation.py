"""What the other formats have in common: names by a table, the rows of query and key, and numbers of a config.

Query and key rows have two orders: rotate-half (Hugging Face) and interleaved pairs (Meta, torchtune's Llama). Within a
head of size D, pair i is rows (i, i + D/2) in the first and rows (2i, 2i + 1) in the second.
"""

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tt_ckpt.hf.weights import in_pieces
from tt_ckpt.safetensors_file import TensorSpec, spec_of
from tt_ckpt.shown import plain, quoted

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class Rename:
    """``Rename({"model.layers.{}.mlp.up_proj.weight": "layers.{}.mlp.w3.weight"})``: names of ours to theirs and back.

    ``{}`` stands for a number.
    """

    def __init__(self, table: Mapping[str, str], *, what: str) -> None:
        self.what = what
        self._there = dict(table)
        self._back = {theirs: ours for ours, theirs in table.items()}
        assert len(self._back) == len(self._there), "a table must be one to one"

    def there(self, name: str, file: Path | None = None) -> str:
        """The other format's name; ValueError with the closest known name if ``name`` is unknown."""
        return self._apply(self._there, name, file)

    def back(self, name: str, file: Path | None = None) -> str:
        """The Hugging Face name. ``file`` is the file in which ``name`` was found."""
        return self._apply(self._back, name, file)

    def _apply(self, table: Mapping[str, str], name: str, file: Path | None) -> str:
        pattern = _NUMBER.sub("{}", name)
        if pattern not in table:
            close = difflib.get_close_matches(pattern[:200], table, 1, 0.6)
            hint = f"; did you mean {close[0].replace('{}', 'N')}?" if close else ""
            where = "" if file is None else f"{file}: "
            cure = hint or "; give the files of one model"
            raise ValueError(f"{where}unknown tensor {plain(name)} in {self.what}{cure}")
        return table[pattern].format(*_NUMBER.findall(name))


# ---- rows of query and key -------------------------------------------------------------------------------------------


def to_interleaved(tensor: Tensor, num_heads: int, name: str = "a projection") -> Tensor:
    """Rows of a q or k projection (or of its bias) from rotate-half to interleaved."""
    return _transposed(tensor, num_heads, 2, _pairs(tensor, num_heads, name))


def to_half_split(tensor: Tensor, num_heads: int, name: str = "a projection") -> Tensor:
    """The inverse of ``to_interleaved``."""
    return _transposed(tensor, num_heads, _pairs(tensor, num_heads, name), 2)


def _pairs(tensor: Tensor, num_heads: int, name: str) -> int:
    rows = tensor.shape[0]
    if num_heads <= 0 or rows % (2 * num_heads):
        heads = f"{num_heads} heads of an even size"
        raise ValueError(f"{name}: {rows} rows do not divide into {heads}: wrong config.json?")
    return rows // num_heads // 2


def _transposed(tensor: Tensor, num_heads: int, outer: int, inner: int) -> Tensor:
    return tensor.reshape(num_heads, outer, inner, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def rotated_heads(config: Mapping[str, Any]) -> dict[str, int]:
    """The number of heads in the rows of q_proj and of k_proj."""
    queries = positive(config, "num_attention_heads")
    return {"q_proj": queries, "k_proj": positive(config, "num_key_value_heads", default=queries)}


# ---- numbers and sizes -----------------------------------------------------------------------------------------------


def positive(given: Mapping[str, Any], key: str, *, default: int | None = None, where: object = "config.json") -> int:
    """The whole number above 0 at ``key``, or a ValueError that names the key."""
    value = given.get(key)
    if value is None and default is not None:
        return default
    if type(value) is not int or not 0 < value < 2**40:
        raise ValueError(f"{where}: {key}: expected a whole number above 0, found {quoted(value)}")
    return value


def number(
    settings: Mapping[str, Any], key: str, *, default: float | None = None, where: object = "config.json"
) -> float:
    """The finite number above 0 at ``key``, or a ValueError that names the key."""
    value = settings.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e300:
        raise ValueError(f"{where}: {key}: expected a number above 0, found {quoted(value)}")
    return float(value)


def pieces_of(tensors: Mapping[str, Tensor], name: str) -> Iterator[Tensor]:
    """A tensor as ``in_pieces`` gives it, not in memory whole if it need not be."""
    pieces: Callable[[str], Iterator[Tensor]] | None = getattr(tensors, "pieces", None)
    return in_pieces(tensors[name]) if pieces is None else pieces(name)


def specs_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    """The dtypes and shapes of tensors; those that are read when asked for are not read."""
    known: dict[str, TensorSpec] | None = getattr(tensors, "specs", None)
    return known if known is not None else {name: spec_of(tensor) for name, tensor in tensors.items()}
