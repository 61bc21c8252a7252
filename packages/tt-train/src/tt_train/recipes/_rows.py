"""Rows of a data set by index, and how many there are."""

from typing import Any


class Subset:
    """Rows of a dataset chosen by index; what else the dataset knows is passed on."""

    def __init__(self, dataset: Any, indices: list[int]) -> None:
        self.dataset, self.indices = dataset, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = self.dataset[self.indices[index]]
        return row

    def rendered(self, index: int) -> list[tuple[str, bool]]:
        pieces: list[tuple[str, bool]] = self.dataset.rendered(self.indices[index])
        return pieces

    def where(self, index: int) -> str:
        place: str = self.dataset.where(self.indices[index])
        return place

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("dataset", "at"):  # a mix may not turn: it would meet the held-out
            raise AttributeError(name)
        return getattr(self.dataset, name)


def count_rows(rows: Any) -> int | None:
    """Rows of a data set, also if it packs them; None for a stream."""
    if not hasattr(rows, "__len__"):
        return None
    packs, chosen = (rows.dataset, rows.indices) if isinstance(rows, Subset) else (rows, range(len(rows)))
    return sum(len(packs.members(index)) for index in chosen) if hasattr(packs, "members") else len(rows)
