"""Token rows in flat arrays: ids, trained spans, and where each row came from."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from tt_data.rendered import Encoded, Span

IGNORE_INDEX = -100


class TokenStore:
    """Append-only rows; 4 bytes a token, 8 a trained span, whatever the number of rows."""

    def __init__(self) -> None:
        self.ids, self.id_ends = array("i"), array("q", [0])
        self.spans, self.span_ends = array("i"), array("q", [0])

    def __len__(self) -> int:
        return len(self.id_ends) - 1

    def append(self, row: Encoded) -> None:
        self.ids.extend(row.ids)
        self.id_ends.append(len(self.ids))
        for start, end in row.trained:
            self.spans.append(start)
            self.spans.append(end)
        self.span_ends.append(len(self.spans))

    def length(self, i: int) -> int:
        return self.id_ends[i + 1] - self.id_ends[i]

    def get_ids(self, i: int) -> list[int]:
        return self.ids[self.id_ends[i] : self.id_ends[i + 1]].tolist()

    def get_spans(self, i: int) -> list[Span]:
        flat = self.spans[self.span_ends[i] : self.span_ends[i + 1]]
        return list(zip(flat[::2], flat[1::2], strict=True))


def labels_of(ids: Sequence[int], spans: Sequence[Span]) -> list[int]:
    """``ids`` where they are trained, -100 elsewhere."""
    labels = [IGNORE_INDEX] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    return labels
