"""What rows of a dataset share, known for every update from a few integers a row.

The rows of a map dataset are sorted by their tokens once. What two rows of an update share is then
the least that any two neighbours between them share: no update reads rows for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from hf_gradacc.updates.lengths import tokens_of_rows
from hf_gradacc.updates.stream import is_arrow_table
from hf_gradacc.updates.trees.flat_rows import FlatRows
from hf_gradacc.updates.trees.prefixes import Sorted, sort_by_prefix, sort_flat_rows

__all__ = ["MOST_TOKENS", "PrefixOrder", "sort_rows"]

MOST_TOKENS = 2**28
"""Tokens to hold while a dataset is sorted, 1 GiB. Of a larger one each row's first tokens count,
and what rows share beyond them is not seen by the deal; the ranks share it all the same."""

_ROWS_AT_ONCE = 10_000


class PrefixOrder:
    """The rows of a map dataset in the order of their tokens, sorted when first asked for.

    Args:
        dataset: A list of rows, or a ``datasets.Dataset``.
        main_input: The feature that holds the tokens.
        most_tokens: See `MOST_TOKENS`.

    Attributes:
        of_answers: The rows by the tokens of their first answer, once somebody has read them all.
    """

    def __init__(
        self, dataset: Any, *, main_input: str = "input_ids", most_tokens: int = MOST_TOKENS
    ) -> None:
        self._dataset = dataset
        self._main_input = main_input
        self._most_tokens = most_tokens
        self.of_answers: Sorted | None = None
        self._is_sorted = False
        self._rows: Sorted | None = None
        self._place_of = np.zeros(0, dtype=np.int64)

    def __call__(self, members: Sequence[int]) -> Sorted | None:
        """Sort some rows by their tokens.

        Args:
            members: Their indices in the dataset; a sampler may name one several times.

        Returns:
            The rows, ``order`` being their places in `members`; None if rows are not of tokens.

        >>> order = PrefixOrder([{"input_ids": ids} for ids in ([5, 6, 7], [9], [5, 6, 8], [5])])
        >>> found = order([2, 1, 0])
        >>> found.order.tolist(), found.lengths.tolist(), found.shared.tolist()
        ([2, 0, 1], [3, 3, 1], [0, 2, 0])
        """
        if self.all_rows is None:
            return None
        places = self._place_of[np.asarray(members, dtype=np.int64)]
        order = np.argsort(places, kind="stable")
        different, first = np.unique(places[order], return_index=True)
        lengths = self.all_rows.lengths[places[order]]
        shared = lengths.copy()  # of a row that is named again
        shared[first] = self.all_rows.among(different).shared
        return Sorted(order, lengths, shared)

    @property
    def all_rows(self) -> Sorted | None:
        """All rows of the dataset; None if they are not of tokens."""
        if not self._is_sorted:
            self._sort()
        return self._rows

    def _sort(self) -> None:
        self._is_sorted = True
        most = max(1, self._most_tokens // max(len(self._dataset), 1))
        rows = _flat_rows(self._dataset, self._main_input, most)
        if rows is None:
            return
        self._rows = sort_flat_rows(rows)
        self._place_of = np.empty(len(self._rows.order), dtype=np.int64)
        self._place_of[self._rows.order] = np.arange(len(self._rows.order))


def sort_rows(rows: Sequence[Any], *, main_input: str = "input_ids") -> Sorted | None:
    """Sort dataset rows that are at hand by their tokens; None if they are not of tokens."""
    tokens = tokens_of_rows(rows, main_input=main_input)
    return None if tokens is None else sort_by_prefix(tokens)


def _flat_rows(dataset: Any, main_input: str, most: int) -> FlatRows | None:
    """Return the tokens of a dataset's rows, read by its column where it has one."""
    if not is_arrow_table(dataset):
        tokens = tokens_of_rows(dataset, main_input=main_input)
        return None if tokens is None else FlatRows.of_rows(tokens, most=most)
    import pyarrow as pa
    import pyarrow.compute

    # What a function makes of a row when it is read, the table does not hold.
    if main_input not in dataset.column_names or dataset.format["type"] == "custom":
        return None
    kind: Any = dataset.data.schema.field(main_input).type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not is_list or not pa.types.is_integer(kind.value_type):
        return None
    lengths = pa.compute.list_value_length(dataset.data.column(main_input))
    held = pa.compute.sum(pa.compute.min_element_wise(lengths, most)).as_py() or 0
    column = _of_column(dataset.select_columns([main_input]).with_format("arrow"), main_input)
    # A selection has its part of the table's tokens, roughly.
    part = len(dataset) / max(len(lengths), 1)
    return FlatRows.of(column, most=most, num_tokens=int(part * held))


def _of_column(table: Any, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for batch in table.iter(batch_size=_ROWS_AT_ONCE):
        for chunk in batch[name].chunks:
            values = chunk.values.to_numpy(zero_copy_only=False)
            ends = chunk.offsets.to_numpy()
            yield values[ends[0] : ends[-1]], np.diff(ends).astype(np.int64)
