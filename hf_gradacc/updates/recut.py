"""Cut the micro-batches of an update again, finer, from the tensors they already are.

The dataset rows are no longer available: they came from a loader worker, perhaps from a stream that
can be read only once. So rows are sliced out of the collated tensors and put together as the
collator would have done, with the same padding and width. The result equals, tensor for tensor,
what a loader with the smaller limit would have yielded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_gradacc.updates.batch import (
    PAD_VALUES,
    can_slice_rows,
    labels_of,
    order_blocks,
    slice_rows,
    tokens_of_batch,
    trim_padding,
    widen,
)
from hf_gradacc.updates.collator import UpdateCollator, make_micro_batch
from hf_gradacc.updates.planner import plan_micro_batches
from hf_gradacc.updates.targets import IGNORE_INDEX, TargetRule
from hf_gradacc.updates.trees.plan import GrownTrees
from hf_gradacc.updates.update import MicroBatch, Update

__all__ = ["can_slice", "cut_again", "cut_to_limit", "even_out", "join_rows", "planned_lengths"]

_DECODER = ("labels", "decoder_input_ids", "decoder_attention_mask")
CountTokens = Callable[..., MicroBatch]
"""`make_micro_batch`, told what the main input is."""
CutRows = Callable[
    [list[list[Any]] | None, list[int]], tuple[list[list[int]], Sequence[GrownTrees | None]]
]
"""`UpdateCollator.cut_rows`, told its limits."""


def planned_lengths(micro_batch: MicroBatch) -> list[int]:
    """Return the cost of each row as the planner sees it; 1 each if it is unknown."""
    n = micro_batch.num_sequences
    if len(micro_batch.lengths) == n and any(micro_batch.lengths):
        return list(micro_batch.lengths)
    mask = micro_batch.inputs.get("attention_mask") if _is_mapping(micro_batch) else None
    if not micro_batch.lengths and isinstance(mask, Tensor) and mask.ndim == 2 and len(mask) == n:
        return [int(used) for used in mask.ne(0).sum(1).tolist()]
    return [1] * n


def can_slice(micro_batch: MicroBatch) -> bool:
    """Return whether rows can be sliced out of a micro-batch, see `can_slice_rows`."""
    return can_slice_rows(
        micro_batch.inputs,
        micro_batch.num_sequences,
        rows_per_sequence=micro_batch.rows_per_sequence,
    )


def cut_again(
    update: Update,
    cut: Callable[[list[int]], list[list[int]]],
    *,
    count: CountTokens,
    cut_rows: CutRows | None = None,
    pad_token_id: int = 0,
    left: bool = False,
    multiple_of: int = 1,
    pad_to_one_width: bool = False,
    encoder_decoder: bool = False,
) -> Update:
    """Plan an update anew and slice its tensors accordingly.

    Args:
        update: As the loader gave it, whole.
        cut: Returns index lists for the lengths of all rows, in the order the share had.
        count: Makes a `MicroBatch` of collated inputs; see `make_micro_batch`.
        cut_rows: Cuts in place of `cut`, by the tokens of all rows, which may become trees; they
            are None if a batch does not hold rows of tokens.
        pad_token_id: Fills ``input_ids``.
        left: Padding goes in front.
        multiple_of: The collator pads widths to a multiple of this.
        pad_to_one_width: All micro-batches share one width on purpose: trim nothing.
        encoder_decoder: Labels have a width of their own, even where it is that of the input.

    Returns:
        An update of the same rows. Micro-batches that the new plan leaves as they were stay the
        same objects, and those whose inputs are no mapping of tensors cannot be cut at all.
    """
    whole = [mb for mb in update if not can_slice(mb)]
    parts = [mb for mb in update if can_slice(mb)]
    rows = [(mb, i) for mb in parts for i in range(mb.num_sequences)]
    if all(len(mb.places) == mb.num_sequences for mb in parts):
        rows.sort(key=lambda row: row[0].places[row[1]])
    lengths_of = {id(mb): planned_lengths(mb) for mb in parts}
    fills = _find_fills(parts, pad_token_id)
    trims = not pad_to_one_width and _trims(parts, multiple_of)
    pieces: list[MicroBatch] = []
    lengths = [lengths_of[id(mb)][i] for mb, i in rows]
    if cut_rows is None:
        plan = cut(lengths)
        trees: Sequence[GrownTrees | None] = [None] * len(plan)
    else:
        tokens = {id(mb): tokens_of_batch(mb.inputs) for mb in parts}
        sequences = None
        if all(of_rows is not None for of_rows in tokens.values()):
            sequences = [_sequence(mb, tokens[id(mb)], i) for mb, i in rows]
        plan, trees = cut_rows(sequences, lengths)
    for piece, grown in zip(plan, trees, strict=True):
        chosen = [rows[j] for j in piece]
        same = chosen[0][0]
        if (
            [i for mb, i in chosen if mb is same] == list(range(same.num_sequences))
            and len(chosen) == same.num_sequences
            and grown == same.trees
        ):
            pieces.append(same)
            continue
        inputs = _take(chosen, fills=fills, left=left)
        if trims:
            inputs = _trim(inputs, encoder_decoder=encoder_decoder, left=left)
            inputs = _round_up(inputs, multiple_of, fills=fills, left=left)
        micro_batch = count(
            inputs,
            indices=tuple(mb.rows[i] for mb, i in chosen if len(mb.rows) == mb.num_sequences),
            lengths=tuple(lengths_of[id(mb)][i] for mb, i in chosen),
            places=tuple(mb.places[i] for mb, i in chosen if len(mb.places) == mb.num_sequences),
            rows_per_sequence=same.rows_per_sequence,
        )
        pieces.append(micro_batch.as_trees(grown))
    return dataclasses.replace(update, micro_batches=pieces + whole)


def cut_to_limit(
    update: Update,
    collator: UpdateCollator | None,
    *,
    max_tokens: int,
    pad_token_id: int = 0,
    left: bool = False,
    encoder_decoder: bool = False,
) -> Update:
    """Cut an update as its collator would have done under a token limit.

    Args:
        update: As the loader gave it, whole.
        collator: What made it; None for micro-batches of somebody else's loader, which are then
            cut one by one.
        max_tokens: Most tokens in a micro-batch.
        pad_token_id: Fills ``input_ids``.
        left: Padding goes in front.
        encoder_decoder: See `cut_again`.
    """
    style: dict[str, Any] = {
        "pad_token_id": pad_token_id,
        "left": left,
        "encoder_decoder": encoder_decoder,
    }
    if collator is None:
        cut = partial(plan_micro_batches, max_tokens=max_tokens)
        count = partial(make_micro_batch, encoder_decoder=encoder_decoder)
        parts = [Update([mb]) for mb in update]
        pieces = [mb for part in parts for mb in cut_again(part, cut, count=count, **style)]
        return dataclasses.replace(update, micro_batches=pieces)

    def count_as_collated(inputs: Any, **known: Any) -> MicroBatch:
        micro_batch = make_micro_batch(
            inputs,
            **collator.counting,
            **known,
        )
        return collator.lay_out(micro_batch)

    limits: dict[str, Any] = {
        "max_tokens": max_tokens,
        "at_random": collator.measures_noise(update.index),
    }
    return cut_again(
        update,
        partial(collator.cut, **limits),
        cut_rows=partial(collator.cut_rows, **limits),
        count=count_as_collated,
        multiple_of=getattr(collator.data_collator, "pad_to_multiple_of", None) or 1,
        pad_to_one_width=collator.pad_to_one_width,
        **style,
    )


def join_rows(
    parts: Sequence[Mapping[str, Any]], *, fills: Mapping[str, Any], left: bool = False
) -> dict[str, Any]:
    """Put collated batches under one another, padding the narrower ones.

    Args:
        parts: Batches with the same features.
        fills: What each feature is padded with; 0 where it is not named.
        left: Padding goes in front.

    >>> a, b = {"labels": torch.tensor([[1, 2]])}, {"labels": torch.tensor([[3]])}
    >>> join_rows([a, b], fills={"labels": -100})["labels"].tolist()
    [[1, 2], [3, -100]]
    """
    if len(parts) == 1:
        return dict(parts[0])
    joined: dict[str, Any] = {}
    for key, first in parts[0].items():
        values = [part[key] for part in parts]
        if isinstance(first, Tensor) and first.ndim >= 1:
            shape = [max(sizes) for sizes in zip(*(v.shape[1:] for v in values), strict=True)]
            fill = fills.get(key, 0)
            joined[key] = torch.cat([widen(v, shape, fill=fill, left=left) for v in values])
        elif isinstance(first, list):
            joined[key] = [item for value in values for item in value]
        else:
            joined[key] = first
    return joined


def _take(
    rows: Sequence[tuple[MicroBatch, int]], *, fills: Mapping[str, Any], left: bool
) -> dict[str, Any]:
    """Slice rows out of the micro-batches they are in, in the order given."""
    parts: list[dict[str, Any]] = []
    start, sizes = 0, []
    rows_per_sequence = rows[0][0].rows_per_sequence
    assert rows_per_sequence is not None  # see `can_slice`
    for stop in range(1, len(rows) + 1):
        if stop == len(rows) or rows[stop][0] is not rows[start][0]:
            indices = [i for _, i in rows[start:stop]]
            parts.append(
                slice_rows(rows[start][0].inputs, indices, rows_per_sequence=rows_per_sequence)
            )
            sizes.append(stop - start)
            start = stop
    return order_blocks(
        join_rows(parts, fills=fills, left=left), sizes, rows_per_sequence=rows_per_sequence
    )


def _sequence(micro_batch: MicroBatch, tokens: Sequence[Any] | None, place: int) -> list[Any]:
    """Return the tokens of one sequence: those of each row that it became."""
    assert tokens is not None
    return list(tokens[place :: micro_batch.num_sequences])


def _is_mapping(micro_batch: MicroBatch) -> bool:
    return isinstance(micro_batch.inputs, Mapping)


def _find_fills(micro_batches: Sequence[MicroBatch], pad_token_id: int) -> dict[str, Any]:
    """Find the values the collator pads with; the usual ones if it padded nothing."""
    fills: dict[str, Any] = {
        **PAD_VALUES,
        "input_ids": pad_token_id,
        "decoder_input_ids": pad_token_id,
    }
    for micro_batch in micro_batches:
        fills[labels_of(micro_batch.inputs)[0]] = IGNORE_INDEX
        mask = micro_batch.inputs.get("attention_mask")
        if not isinstance(mask, Tensor) or bool(mask.ne(0).all()):
            continue
        for key, value in micro_batch.inputs.items():
            if isinstance(value, Tensor) and value.shape == mask.shape:
                fills[key] = value[mask == 0][0].item()
    return fills


def _trims(micro_batches: Sequence[MicroBatch], multiple_of: int) -> bool:
    """Return whether the collator pads no wider than it has to."""
    for micro_batch in micro_batches:
        mask = micro_batch.inputs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.ndim < 2:
            return False
        columns = mask.reshape(-1, mask.shape[-1]).ne(0).any(0).nonzero()
        needed = int(columns[-1] - columns[0]) + 1 if len(columns) else 0
        if mask.shape[-1] != -(-needed // multiple_of) * multiple_of:
            return False
    return True


def _trim(inputs: dict[str, Any], *, encoder_decoder: bool, left: bool) -> dict[str, Any]:
    """Drop columns that are padding in every row, of encoder and decoder each by its own."""
    if not encoder_decoder:
        return trim_padding(inputs)
    decoder = {key: inputs[key] for key in _DECODER if key in inputs}
    encoder = trim_padding({key: v for key, v in inputs.items() if key not in decoder})
    labels = decoder.get("labels")
    if isinstance(labels, Tensor) and labels.ndim == 2:
        used = labels.ne(-100).any(0).nonzero()
        if len(used):
            columns = slice(int(used[0]), None) if left else slice(0, int(used[-1]) + 1)
            decoder = {
                key: value[:, columns].contiguous() if value.shape == labels.shape else value
                for key, value in decoder.items()
            }
    trimmed = encoder | decoder
    return {key: trimmed[key] for key in inputs}


def _round_up(
    inputs: dict[str, Any], multiple_of: int, *, fills: Mapping[str, Any], left: bool
) -> dict[str, Any]:
    if multiple_of == 1:
        return inputs
    rounded = dict(inputs)
    for key, value in inputs.items():
        if isinstance(value, Tensor) and value.ndim >= 2 and not value.is_floating_point():
            shape = [*value.shape[1:-1], -(-value.shape[-1] // multiple_of) * multiple_of]
            rounded[key] = widen(value, shape, fill=fills.get(key, 0), left=left)
    return rounded


def even_out(
    update: Update,
    num_micro_batches: int,
    *,
    halve: Callable[[MicroBatch], list[MicroBatch]],
    rule: TargetRule,
    spare: Mapping[str, Any] | None,
    rows_per_sequence: int | None = 1,
) -> Update:
    """Bring a share to a number of micro-batches.

    Args:
        update: This rank's share, with at most that many micro-batches.
        num_micro_batches: The number wanted.
        halve: Cuts a micro-batch of several rows in two.
        rule: What counts as a target; both halves need some, a mean over none is NaN.
        spare: Collated rows to run with a weight of zero where this share has none.
        rows_per_sequence: Collated rows of each sequence, see `slice_rows`; None if none can be
            sliced out.

    Returns:
        The same rows in as many micro-batches, the costliest first as on every other rank; those
        added for the count alone are `weightless`.
    """
    done = list(update)
    candidates = [mb for mb in done if mb.num_sequences > 1]
    while len(done) < num_micro_batches and candidates:
        largest = max(candidates, key=lambda mb: mb.num_computed_tokens)
        candidates.remove(largest)
        halves = halve(largest)
        if len(halves) != 2 or not all(half.targets.under(rule) for half in halves):
            continue
        place = done.index(largest)
        done[place : place + 1] = halves
        candidates += [half for half in halves if half.num_sequences > 1]
    done.sort(key=lambda mb: -mb.num_computed_tokens)
    if len(done) < num_micro_batches:
        source = done[-1].inputs if done else spare
        assert isinstance(source, Mapping)
        if rows_per_sequence is not None:
            row = _row_with_target(source, rule)
            source = trim_padding(slice_rows(source, row, rows_per_sequence=rows_per_sequence))
        idle = make_micro_batch(source, rows_per_sequence=rows_per_sequence or 1)
        idle = dataclasses.replace(idle, weightless=True)
        # In front: the last micro-batch reduces, and a real one in that place is one wait less.
        done = [idle] * (num_micro_batches - len(done)) + done
    return Update(done, update.epoch, update.index, update.num_left_out)


def _row_with_target(inputs: Mapping[str, Any], rule: TargetRule) -> list[int]:
    """Choose one row whose loss is a number."""
    labels = labels_of(inputs)[1]
    if rule in (TargetRule.NEXT_TOKEN, TargetRule.SAME_TOKEN) and labels is not None:
        start = 1 if rule is TargetRule.NEXT_TOKEN else 0
        has = labels[..., start:].ne(-100).reshape(len(labels), -1).any(1).nonzero()
        if len(has):
            return [int(has[0])]
    return [0]
