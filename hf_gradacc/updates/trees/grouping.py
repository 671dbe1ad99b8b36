"""Find the families of a dataset: which rows can be drawn together, and what is read for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hf_gradacc.errors import ConfigError
from hf_gradacc.updates.lengths import sequences_of_rows
from hf_gradacc.updates.stream import is_arrow_table, is_stream
from hf_gradacc.updates.trees.families import Families, find_families
from hf_gradacc.updates.trees.flat_rows import FlatRows
from hf_gradacc.updates.trees.order import MOST_TOKENS, PrefixOrder
from hf_gradacc.updates.trees.prefixes import Sorted, sort_flat_rows

__all__ = ["families_of", "refuse_grouping"]

_ROWS_AT_ONCE = 1_000


def refuse_grouping(dataset: Any, *, sampler: Any, effective_batch_size: int | None) -> None:
    """Refuse to draw rows together where nobody can, or where it would do nothing.

    Args:
        dataset: Of the run.
        sampler: The user's own, if there is one.
        effective_batch_size: Sequences in an update; None if tokens decide.

    Raises:
        ConfigError: Naming what stands against it, and the way out.
    """
    asked = "group_by_prefix = True"
    if is_stream(dataset):
        raise ConfigError(
            f"{asked}: a stream gives its rows in its own order, so none can be drawn together. "
            f"Leave it out, or load the rows without streaming."
        )
    if sampler is not None:
        raise ConfigError(
            f"{asked}: {type(sampler).__name__} says in which order rows are drawn. Leave out one "
            f"of the two."
        )
    if effective_batch_size == 1:
        raise ConfigError(
            f"{asked}: no rows meet in updates of effective_batch_size = 1. Leave it out, or use "
            f"larger updates."
        )


def families_of(
    dataset: Any,
    order: PrefixOrder,
    *,
    main_input: str,
    read: Callable[[Sequence[int]], Sequence[Any]],
    updates_per_epoch: float,
) -> Families:
    """Find the families of a map dataset's rows; those of pairs by their prompt.

    Args:
        dataset: A list, a ``datasets.Dataset``, or anything that gives rows by their index.
        order: Its rows by their tokens, if they can be read without making each of them.
        main_input: The feature that holds the tokens.
        read: Reads some rows. What a dataset draws for one has to be the same on all ranks.
        updates_per_epoch: About how many updates an epoch has.

    Raises:
        ConfigError: If rows have no token ids.
    """
    is_at_hand = isinstance(dataset, list) or is_arrow_table(dataset)
    found = order.all_rows if is_at_hand else None
    if found is None:
        order.of_answers = order.of_answers or _sort_read(dataset, main_input, read)
        found = order.of_answers
    return find_families(found, rows_per_update=len(found.order) / max(updates_per_epoch, 1))


def _sort_read(
    dataset: Any, main_input: str, read: Callable[[Sequence[int]], Sequence[Any]]
) -> Sorted:
    """Sort rows by the tokens of their first answer, each read by itself."""
    lengths: list[int] = []
    most = max(1, MOST_TOKENS // max(len(dataset), 1))

    def tokens() -> Iterator[Any]:
        for first in range(0, len(dataset), _ROWS_AT_ONCE):
            rows = read(range(first, min(first + _ROWS_AT_ONCE, len(dataset))))
            for index, row in enumerate(rows, start=first):
                answers = _answers(row, main_input)
                if not answers:
                    held = sorted(row) if isinstance(row, Mapping) else type(row).__name__
                    raise ConfigError(
                        f"group_by_prefix = True needs rows of token ids, and row {index} of the "
                        f"training dataset holds {held}. Leave it out, or tokenize the rows first."
                    )
                lengths.append(sum(map(len, answers)))
                yield answers[0]

    found = sort_flat_rows(FlatRows.of_rows(tokens(), most=most))
    return replace(found, lengths=np.asarray(lengths, dtype=np.int64)[found.order])


def _answers(row: Any, main_input: str) -> list[Any]:
    """Return the sequences of a row, those of a pair with the prompt before each."""
    for per_sequence in (3, 2, 1):
        found = sequences_of_rows([row], main_input=main_input, rows_per_sequence=per_sequence)
        if found:
            return found[0]
    return []
