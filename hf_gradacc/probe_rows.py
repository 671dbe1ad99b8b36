"""The rows the model is asked with, and how to collate some of them by themselves.

Most collators make one row of tensors of each dataset row, and a row is had by slicing. TRL's
preference collators make two, all chosen answers and then all rejected ones; padding-free ones
lay all rows end to end, and the images of a batch may be one tensor of patches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_gradacc.batching import (
    count_copies,
    find_labels,
    find_main_input,
    slice_rows,
    trim_padding,
)
from hf_gradacc.loading import is_stream
from hf_gradacc.targets import IGNORE_INDEX, count_row_targets

__all__ = ["ProbeRows", "copies_in", "find_padding_targets"]


@dataclass(frozen=True)
class ProbeRows:
    """Dataset rows with what the data collator makes of them.

    Attributes:
        rows: As the dataset gives them.
        inputs: All of them, collated together.
        collate: The data collator.
        copies: Collated rows of each, in blocks as `slice_rows` wants them; 0 if collated rows
            cannot be told apart.
    """

    rows: Sequence[Any]
    inputs: Mapping[str, Any]
    collate: Callable[[list[Any]], Any]
    copies: int

    @classmethod
    def of(
        cls, rows: Sequence[Any], inputs: Mapping[str, Any], collate: Callable[[list[Any]], Any]
    ) -> ProbeRows:
        """See how collated rows belong to dataset rows."""
        copies = count_copies(inputs, len(rows))
        if copies > 1 and not all(
            _alike(slice_rows(inputs, [i], copies=copies), collate([row]))
            for i, row in enumerate(rows)
        ):
            copies = 0
        if copies == 1 and not _is_plain(inputs, len(rows)):
            with torch.random.fork_rng(devices=[]):
                alone = [collate([row]) for row in rows]
            if not all(_same_shares(slice_rows(inputs, [i]), a) for i, a in enumerate(alone)):
                copies = 0
        return cls(rows, inputs, collate, copies)

    def take(self, indices: Sequence[int]) -> dict[str, Any]:
        """Give some of the rows, collated together."""
        if self.copies:
            return slice_rows(self.inputs, indices, copies=self.copies)
        return dict(self.collate([self.rows[i] for i in indices]))


def find_padding_targets(known: ProbeRows | None) -> list[str]:
    """Say so if the collator pads labels with something that the loss takes for a target.

    Then how wide a micro-batch is decides what is learned, so all of an update need one width.
    FSMT does that to the labels it is given, and so does a collator that pads them with the
    tokenizer's padding token.
    """
    if known is None or known.copies != 1:
        return []
    labels = find_labels(known.inputs)[1]
    if labels is None or labels.ndim != 2 or labels.is_floating_point():
        return []
    own = [
        count_row_targets(row, shifted=False) if isinstance(row, Mapping) else None
        for row in known.rows
    ]
    extra = int(labels.ne(IGNORE_INDEX).sum()) - sum(n or 0 for n in own)
    if None in own or extra <= 0:
        return []
    return [
        f"the data collator fills {extra} padding positions of {len(own)} rows' labels with tokens "
        f"instead of {IGNORE_INDEX}, so the model learns to predict padding. If that is not meant, "
        f"pad labels with {IGNORE_INDEX}; as it is, all micro-batches of an update get one width."
    ]


def copies_in(loader: Any) -> int:
    """Count the collated rows that one row of a DataLoader's dataset becomes, at least 1."""
    dataset = getattr(loader, "dataset", None)
    if dataset is None or is_stream(dataset) or not len(dataset):
        return 1
    with torch.random.fork_rng(devices=[]):  # the collator may mask at random
        inputs = loader.collate_fn([dataset[0]])
    return max(1, count_copies(inputs, 1)) if isinstance(inputs, Mapping) else 1


def _is_plain(inputs: Mapping[str, Any], num_rows: int) -> bool:
    """Say whether a batch is tokens, masks and labels alone, which belong to rows for sure."""
    return all(
        value.ndim == 0 or (value.ndim <= 2 and len(value) == num_rows)
        for value in inputs.values()
        if isinstance(value, torch.Tensor)
    )


def _same_shares(sliced: Mapping[str, Any], alone: Mapping[str, Any]) -> bool:
    """Say whether a row has as much of each tensor, be it sliced out or collated alone.

    Of images it may not: rows hold none or several, or patches of all rows lie in one tensor.
    """

    def shares(part: Mapping[str, Any]) -> dict[str, int]:
        return {k: len(v) for k, v in part.items() if isinstance(v, torch.Tensor) and v.ndim}

    return shares(sliced) == shares(alone)


def _alike(sliced: Mapping[str, Any], alone: Mapping[str, Any]) -> bool:
    """Say whether two batches hold the same sequences, whatever they are padded with."""
    a, b = (find_main_input(trim_padding(part)) for part in (sliced, alone))
    return a is not None and b is not None and a.shape == b.shape and bool(a.eq(b).all())
