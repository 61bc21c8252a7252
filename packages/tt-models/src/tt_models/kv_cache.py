"""The keys and values of tokens already seen, of KV heads only."""

import torch
from torch import Tensor

from tt_models.config import ModelConfig
from tt_models.limits import refuse_too_large


class LayerCache:
    """One layer's share, [batch, kv heads, capacity, head_dim] twice; with a window a ring of that many columns."""

    def __init__(self, keys: Tensor, values: Tensor, *, ring: bool) -> None:
        self.keys, self.values, self.ring = keys, values, ring

    @property
    def capacity(self) -> int:
        """How many columns fit."""
        return self.keys.shape[2]

    def columns_after(self, length: int, new: int, device: torch.device) -> Tensor:
        """The column of each key that ``update`` will return for ``new`` tokens after ``length``."""
        end = length + new
        if not self.ring or end <= self.capacity:
            return torch.arange(end, device=device)
        if new > 1:
            return torch.arange(max(0, length - self.capacity + 1), end, device=device)
        slots = torch.arange(self.capacity, device=device)
        return end - 1 - (end - 1 - slots) % self.capacity

    def update(self, keys: Tensor, values: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Store the new columns; return all that the new queries may see."""
        return self._update(self.keys, keys, length), self._update(self.values, values, length)

    def _update(self, store: Tensor, new: Tensor, length: int) -> Tensor:
        batch, count, end = new.shape[0], new.shape[2], length + new.shape[2]
        store = store[:batch]
        if not self.ring or end <= self.capacity:
            store[:, :, length:end] = new.detach()
            if new.requires_grad:  # earlier tokens are constants, the new ones are not
                return torch.cat((store[:, :, :length], new), dim=2)
            return store[:, :, :end]
        if count == 1:
            slot = length % self.capacity
            store[:, :, slot : slot + 1] = new.detach()  # a slice: the compiler would make an index a constant
            if new.requires_grad:
                store = store.clone()
                store[:, :, slot : slot + 1] = new
            return store
        before = torch.arange(max(0, length - self.capacity + 1), length, device=store.device) % self.capacity
        seen = torch.cat((store[:, :, before], new), dim=2)
        kept = min(count, self.capacity)
        slots = torch.arange(end - kept, end, device=store.device) % self.capacity
        store[:, :, slots] = new[:, :, -kept:].detach().to(store.dtype)  # autocast computes in a different dtype
        return seen

    def move_(self, sources: list[int], targets: list[int]) -> None:
        """Copy rows onto others."""
        for store in (self.keys, self.values):
            store[targets] = store[sources]


class KVCache:
    """Keys and values of up to ``batch_size`` sequences of up to ``max_seq_len`` tokens.

    A layer with a sliding window stores its window only. ``reset`` empties the cache and keeps the memory.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        batch_size: int,
        max_seq_len: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if batch_size <= 0 or max_seq_len <= 0:
            found = f"{batch_size} and {max_seq_len}"
            raise ValueError(f"KVCache: batch_size and max_seq_len must be positive, got {found}")
        self.batch_size, self.max_seq_len = batch_size, max_seq_len
        self.layers = []
        held = [max_seq_len if window is None else min(window, max_seq_len) for window in config.layer_windows]
        place = torch.get_default_device() if device is None else torch.device(device)
        width = (dtype or torch.get_default_dtype()).itemsize
        nbytes = 2 * batch_size * sum(held) * config.kv_heads * config.head_size * width
        what = f"KVCache of {max_seq_len:,} tokens for {batch_size:,} rows"
        refuse_too_large(what, nbytes, place, "lower max_seq_len (max_new_tokens) or batch_size")
        for columns in held:
            shape = (batch_size, config.kv_heads, columns, config.head_size)
            keys, values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
            self.layers.append(LayerCache(keys, values, ring=columns < max_seq_len))
        self.rows, self.length = 0, 0  # rows in use, columns filled
        self.first: Tensor | None = None  # [batch], the column where the current document of each row began; None: 0

    def reset(self) -> None:
        """Forget all sequences."""
        self.rows, self.length, self.first = 0, 0, None

    def keep_(self, rows: list[int]) -> list[int]:
        """Forget all rows but these, in place; where each row came from, in the order in which they are then.

        Those at the end take the places of the ones that leave: no other is copied.
        """
        kept, places = set(rows), list(range(len(rows)))
        free = [place for place in places if place not in kept]
        moved = [row for row in rows if row >= len(rows)]
        for place, row in zip(free, moved, strict=True):
            places[place] = row
        if moved:
            for layer in self.layers:
                layer.move_(moved, free)
        if self.first is not None:
            self.first = self.first[torch.tensor(places, device=self.first.device)]
        self.rows = len(places)
        return places

    def repeat_rows(self, counts_B: Tensor) -> None:
        """Make ``counts_B[i]`` rows of row i, which may then continue in different ways; no count is 0."""
        if counts_B.shape != (self.rows,):
            raise ValueError(f"KVCache has the tokens of {self.rows} rows, got {list(counts_B.shape)} counts")
        for layer in self.layers:
            layer.keys = layer.keys[: self.rows].repeat_interleave(counts_B, dim=0)
            layer.values = layer.values[: self.rows].repeat_interleave(counts_B, dim=0)
        if self.first is not None:
            self.first = self.first.repeat_interleave(counts_B)
        self.batch_size = self.rows = self.layers[0].keys.shape[0]

    def check_room(self, batch: int, seq_len: int) -> None:
        """ValueError if ``seq_len`` more tokens of ``batch`` rows do not fit."""
        if batch > self.batch_size:
            raise ValueError(f"KVCache was made for {self.batch_size} rows, got {batch}")
        if self.length and batch > self.rows:
            raise ValueError(f"KVCache has the tokens of {self.rows} rows, got {batch}: reset it first")
        if self.length + seq_len > self.max_seq_len:
            raise ValueError(
                f"KVCache has room for {self.max_seq_len} tokens: {self.length} are in it, {seq_len} more do not fit; "
                "make it with a larger max_seq_len"
            )

    def check_dtype(self, weight: Tensor) -> None:
        """ValueError if attention cannot read the stored dtype; autocast reads any."""
        stored = self.layers[0].keys.dtype
        if stored != weight.dtype and not torch.is_autocast_enabled(weight.device.type):
            raise ValueError(f"KVCache stores {stored}, the model computes in {weight.dtype}: make it with that dtype")

    def check_layers(self, layers: int) -> None:
        """ValueError if it is unknown which layer has which window."""
        if layers != len(self.layers) and len({layer.capacity for layer in self.layers}) > 1:
            raise ValueError(
                f"KVCache was made for {len(self.layers)} layers of several windows, the model has {layers}: "
                "make it with the num_hidden_layers and layer_types that are left"
            )

    @property
    def nbytes(self) -> int:
        """Memory of all keys and values."""
        return sum(tensor.nbytes for layer in self.layers for tensor in (layer.keys, layer.values))
