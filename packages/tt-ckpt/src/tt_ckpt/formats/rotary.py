"""Two layouts of query and key rows: rotate-half (Hugging Face) and interleaved pairs (Meta, torchtune's Llama).

Within a head of size D, pair i is rows (i, i + D/2) in the first and rows (2i, 2i + 1) in the second.
"""

from torch import Tensor


def to_interleaved(tensor: Tensor, num_heads: int, name: str = "a projection") -> Tensor:
    """Rows of a q or k projection (or of its bias) from rotate-half to interleaved."""
    return _transposed(tensor, num_heads, 2, _pairs(tensor, num_heads, name))


def to_half_split(tensor: Tensor, num_heads: int, name: str = "a projection") -> Tensor:
    """The inverse of ``to_interleaved``."""
    return _transposed(tensor, num_heads, _pairs(tensor, num_heads, name), 2)


def _pairs(tensor: Tensor, num_heads: int, name: str) -> int:
    rows = tensor.shape[0]
    if num_heads <= 0 or rows % (2 * num_heads):
        raise ValueError(
            f"{name}: {rows} rows do not divide into {num_heads} heads of an even size: wrong config.json?"
        )
    return rows // num_heads // 2


def _transposed(tensor: Tensor, num_heads: int, outer: int, inner: int) -> Tensor:
    return tensor.reshape(num_heads, outer, inner, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
