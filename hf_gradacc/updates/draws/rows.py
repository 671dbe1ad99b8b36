"""What is drawn for a row belongs to the row: to seed, epoch and row, not to how updates are cut.

A collator that masks at random draws one matrix for all rows of a micro-batch. Cut the update
otherwise and every mask is another one: the counts of targets and the gradient change with the cut,
with the number of ranks, and with a cut after running out of memory. So a collator that is seen to
draw is called with each row by itself, under that row's seed, and the results are put under one
another, padded as the collator pads them. A collator that draws nothing is called as ever.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from hf_gradacc.updates.batch import (
    count_rows_per_sequence,
    find_main_input,
    order_blocks,
    slice_rows,
)
from hf_gradacc.updates.draws.join import CannotJoin, Joiner, same_values
from hf_gradacc.updates.draws.randomness import RandomSources

__all__ = ["DrawsByRow", "ReadsByRow"]

logger = logging.get_logger(__name__)

_COLLATING, _READING, _TRYING = 0, 1, 2
_TRIES = 12
"""How often rows are collated with and without their neighbours: a mixup of half of all batches
goes unseen once in 300 times."""


class DrawsByRow:
    """Calls a data collator so that each row's random numbers are its own.

    Args:
        collate: The data collator.
        seed: The run's seed.
        main_input: The feature that holds the sequence.

    Attributes:
        is_drawing: It has been seen to draw.
        by_row: Rows are collated one by one; None until a collator that draws was tried.
    """

    def __init__(
        self,
        collate: Callable[[list[Any]], Any],
        *,
        seed: int = 0,
        main_input: str = "input_ids",
    ) -> None:
        self.collate = collate
        self.seed = seed
        self.main_input = main_input
        self.is_drawing = False
        self.by_row: bool | None = None
        self._joiner = Joiner()
        self._sources: RandomSources | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is no fork has generators of its own.
        return {**self.__dict__, "_sources": None}

    def __call__(
        self,
        rows: Sequence[Any],
        indices: Sequence[int],
        *,
        epoch: int,
        salt: int = 0,
        rows_per_sequence: int | None = 1,
    ) -> Any:
        """Collate rows.

        Args:
            rows: Dataset rows.
            indices: Their places in the dataset.
            epoch: The pass they are of.
            salt: One more number to draw by, if rows come several times in a pass.
            rows_per_sequence: Collated rows of each, see `slice_rows`.

        Returns:
            What the data collator makes of them.
        """
        if self._sources is None:
            self._sources = RandomSources(self.collate)
        sources = self._sources
        if not self.is_drawing:
            before = sources.state()
            batch = self.collate(_copies(rows))
            if not sources.has_drawn(before):
                return batch
            sources.restore(before)
            self.is_drawing = True
        inner = getattr(
            self.collate, "data_collator", self.collate
        )  # behind one that drops columns
        own_seed = getattr(inner, "seed", None)
        entropy = (_COLLATING, self.seed, own_seed if isinstance(own_seed, int) else 0, epoch, salt)
        with sources.put_back():
            return self._draw(list(rows), indices, entropy, rows_per_sequence)

    def _draw(
        self, rows: list[Any], indices: Sequence[int], entropy: Sequence[int], per: int | None
    ) -> Any:
        if len(rows) > 1 and self.by_row is not False:
            try:
                return self._collate_by_row(rows, indices, entropy, per)
            except CannotJoin as why:
                self.by_row = False
                _tell(f"what the data collator ({type(self.collate).__name__}) draws", why)
        self._seed(*entropy, *indices)
        return self.collate(_copies(rows))

    def _collate_by_row(
        self, rows: list[Any], indices: Sequence[int], entropy: Sequence[int], per: int | None
    ) -> Any:
        parts = []
        for row, index in zip(_copies(rows), indices, strict=True):
            self._seed(*entropy, index)
            try:
                parts.append(self.collate([row]))
            except Exception as error:
                if self.by_row:
                    raise
                raise CannotJoin(f"it fails on one row alone: {error}") from error
        if not all(isinstance(part, Mapping) for part in parts):
            raise CannotJoin("it returns no mapping")
        if self.by_row is None:
            self._check_rows_alone(rows, parts, per)

        def beside(i: int, j: int) -> Any:
            self._seed(*entropy, indices[i])
            return self.collate(_copies([rows[i], rows[j]]))

        joined = order_blocks(
            self._joiner(parts, beside), [1] * len(parts), rows_per_sequence=per or 1
        )
        self.by_row = True
        if not isinstance(parts[0], MutableMapping):
            return joined
        whole = copy.copy(parts[0])  # of the collator's own type
        whole.update(joined)
        return whole

    def _check_rows_alone(self, rows: list[Any], parts: list[Any], per: int | None) -> None:
        """Check that a row comes out the same beside other rows, whatever those are.

        A mixup draws, too, but what it makes of a row by itself is no mixup.

        Raises:
            CannotJoin: If it does not.
        """
        mains = [find_main_input(part, self.main_input) for part in parts]
        widths = [0 if m is None or m.ndim < 2 else m.shape[1] for m in mains]
        order = sorted(range(len(rows)), key=lambda i: -widths[i])[:4]
        beside = [rows[i] for i in order]  # the widest first, so that the width does not change
        again = [rows[order[0]]] * len(beside)
        for attempt in range(_TRIES):
            seen = []
            for chosen in (beside, again):
                self._seed(_TRYING, attempt)
                try:
                    batch = self.collate(_copies(chosen))
                except Exception as error:
                    raise CannotJoin(f"it fails on chosen rows: {error}") from error
                found = count_rows_per_sequence(batch, len(chosen), name=self.main_input)
                if found is None or found != (per or 1) or not _adds_up(parts[0], batch, chosen):
                    raise CannotJoin("the rows of its batches cannot be told apart")
                seen.append(slice_rows(batch, [0], rows_per_sequence=found))
            if not same_values(*seen):
                raise CannotJoin("a row comes out otherwise beside other rows")

    def _seed(self, *entropy: int) -> None:
        assert self._sources is not None
        self._sources.seed(*entropy)


class ReadsByRow:
    """Reads the rows of a map dataset so that what is drawn for each is its own (augmentation).

    Args:
        dataset: The dataset. One that draws nothing is read as ever.
        seed: The run's seed.
    """

    def __init__(self, dataset: Any, *, seed: int = 0) -> None:
        self.dataset = dataset
        self.seed = seed
        self.is_drawing = False
        self.by_row: bool | None = None
        self._sources: RandomSources | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sources": None}

    def __call__(
        self,
        indices: Sequence[int],
        *,
        epoch: int,
        salt: int = 0,
        read_all: Callable[[Sequence[int]], list[Any]],
        read_one: Callable[[int], Any],
    ) -> list[Any]:
        """Read rows.

        Args:
            indices: Their places.
            epoch: The pass they are of.
            salt: See `DrawsByRow`.
            read_all: Reads rows at once.
            read_one: Reads one.
        """
        if self._sources is None:
            self._sources = RandomSources(self.dataset)
        sources = self._sources
        if not self.is_drawing:
            before = sources.state()
            rows = read_all(indices)
            if not sources.has_drawn(before):
                return rows
            sources.restore(before)
            self.is_drawing = True
        entropy = (_READING, self.seed, epoch, salt)
        with sources.put_back():
            if self.by_row is None and len(indices) > 1:
                self.by_row = self._treats_rows_alone(indices, read_all)
                if not self.by_row:
                    _tell(
                        f"what the training dataset ({type(self.dataset).__name__}) draws",
                        "a row comes out otherwise beside other rows",
                    )
            if self.by_row is False:
                sources.seed(*entropy, *indices)
                return read_all(indices)
            rows = []
            for index in indices:
                sources.seed(*entropy, index)
                rows.append(read_one(index))
            return rows

    def _treats_rows_alone(
        self, indices: Sequence[int], read_all: Callable[[Sequence[int]], list[Any]]
    ) -> bool:
        """Return whether a row comes out the same beside other rows; see `DrawsByRow`."""
        if not hasattr(self.dataset, "__getitems__"):
            return True  # rows are read one by one anyway
        assert self._sources is not None
        beside = list(indices[:4])
        for attempt in range(_TRIES):
            seen = []
            for chosen in (beside, beside[:1] * len(beside)):
                self._sources.seed(_TRYING, attempt)
                seen.append(read_all(chosen)[0])
            if not same_values(*seen):
                return False
        return True


def _adds_up(part: Mapping[str, Any], batch: Mapping[str, Any], rows: Sequence[Any]) -> bool:
    """Return whether a batch holds, feature by feature, so many rows as its rows do alone."""
    return part.keys() == batch.keys() and all(
        len(batch[key]) == len(rows) * len(value)
        for key, value in part.items()
        if isinstance(value, list) or (isinstance(value, Tensor) and value.ndim)
    )


def _copies(rows: Sequence[Any]) -> list[Any]:
    """Copy rows, as far as they are dicts: a collator may take columns out of them."""
    return [row.copy() if type(row) is dict else row for row in rows]


def _tell(what: str, why: object) -> None:
    """Say once, on one rank and in one worker, that what is drawn depends on the cut."""
    worker = torch.utils.data.get_worker_info()
    if os.environ.get("RANK", "0") == "0" and (worker is None or worker.id == 0):
        logger.warning_once(
            f"{what} at random cannot be drawn row by row ({why}). As in the stock Trainer it "
            f"depends on which rows share a micro-batch, and so on how an update is cut."
        )
