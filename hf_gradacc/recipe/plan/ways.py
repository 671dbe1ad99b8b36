"""The same updates cut in several ways: as stock does, sorted, packed, and with prefixes shared."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_gradacc.loss.asking.rows import choose_probe_rows
from hf_gradacc.updates.loader import UpdateLoader
from hf_gradacc.updates.planner import plan_micro_batches
from hf_gradacc.updates.trees.kept import count_kept
from hf_gradacc.updates.trees.prefixes import sort_by_prefix

__all__ = [
    "LEAST_GROUPED",
    "LEAST_SHARED",
    "MOST_UPDATES_CUT",
    "RowsToPlan",
    "Spread",
    "WayToPlan",
    "changed",
    "plan_grouping",
    "plan_ways",
]

MOST_UPDATES_CUT = 200
"""Updates whose micro-batches are planned; the rest is alike, and a plan should take seconds."""

LEAST_GROUPED = 0.25
"""Part of an update's computed tokens that drawing rows together has to save to be proposed."""

LEAST_SHARED = 0.01
"""Part of the input tokens from which on sharing prefixes is told: a template's first tokens are
less than that."""

_UPDATES_ASKED = 8
"""Updates that tell whether rows begin alike at all."""


@dataclass(frozen=True)
class Spread:
    """Smallest, mean and largest of a number over updates."""

    least: float
    mean: float
    most: float

    @classmethod
    def of(cls, values: Any) -> Spread:
        """Take the spread of some numbers.

        >>> Spread.of([1, 2, 6])
        Spread(least=1.0, mean=3.0, most=6.0)
        """
        array = np.asarray(values, dtype=float)
        return cls(float(array.min()), float(array.mean()), float(array.max()))


@dataclass(frozen=True)
class WayToPlan:
    """One way to cut the same updates.

    Attributes:
        name: What it does.
        micro_batches: Micro-batches in an update, of one rank.
        padding_fraction: Padding tokens over computed tokens.
        computed_per_update: Tokens that all ranks compute for an update, padding included.
        shared_fraction: Input tokens that need not be computed, since a row before begins alike,
            over all input tokens.
        largest: Tokens of the largest micro-batch, padding included.
        largest_as_rows: Tokens of the rows of a micro-batch, at most, padding included: more than
            are computed where prefixes are shared.
        chosen: Whether the recipe plans this way.
        stands_in: Whether it does so if the model does not allow the way that is chosen.
    """

    name: str
    micro_batches: Spread
    padding_fraction: float
    computed_per_update: float
    shared_fraction: float
    largest: int
    largest_as_rows: int
    chosen: bool = False
    stands_in: bool = False


@dataclass(frozen=True)
class RowsToPlan:
    """The rows of a training set, as far as they decide how updates are cut.

    Attributes:
        dataset: The training set, a list or a ``datasets.Dataset``.
        costs: Tokens that each row costs, 0 without a target.
        tokens: Input tokens of each row that has a target.
        decoded: Of an encoder-decoder, how many of the costs are the decoder's: it is padded apart.
        are_pairs: Each is two answers.
        trees_by_rows: How the model would attend to trees, see `TreeCost`.
        keeps_beginnings: Whether a run like this may keep what several micro-batches begin with.
        may_share: Whether a model of this kind may share prefixes at all.
        why_not_shared: What is known before a run to speak against it, in plain words.
    """

    dataset: Any
    costs: np.ndarray
    tokens: np.ndarray
    decoded: np.ndarray | None = None
    are_pairs: bool = False
    trees_by_rows: bool = True
    keeps_beginnings: bool = False
    may_share: bool = True
    why_not_shared: str = ""

    def padded(self, indices: Sequence[int]) -> int:
        """Tokens of some rows when each is padded to the longest."""
        costs = self.costs[indices]
        if self.decoded is None:
            return len(indices) * int(costs.max())
        decoded = self.decoded[indices]
        return len(indices) * int((costs - decoded).max() + decoded.max())


def changed(arguments: Any, **changes: Any) -> Any:
    """Return arguments that differ in some options, without checking them again."""
    other = copy.copy(arguments)
    for name, value in changes.items():
        setattr(other, name, value)
    return other


def plan_ways(
    load: Callable[[Any], UpdateLoader], arguments: Any, rows: RowsToPlan
) -> tuple[WayToPlan, ...]:
    """Cut the updates as the stock Trainer does, and in each way that their rows allow.

    Args:
        load: Builds the loader of rank 0 from a run's options.
        arguments: Those of the recipe.
        rows: The training set.

    Returns:
        As drawn, sorted by rows and by tokens; packed, if rows are no pairs; with common prefixes
        computed once, if rows have any.
    """
    size = arguments.per_device_train_batch_size
    budget, packed = arguments.max_tokens_per_micro_batch, arguments.layout == "packed"
    by_size = load(changed(arguments, max_tokens_per_micro_batch=None, layout="padded"))
    ours = _cut(by_size, rows)
    max_tokens = budget or max(
        size * int(max(rows.costs[share], default=0)) for share in _shares(by_size)
    )
    by_tokens = load(changed(arguments, max_tokens_per_micro_batch=max_tokens, layout="padded"))
    # A packed recipe without a budget counts rows.
    as_asked = {} if packed else {"max_tokens_per_micro_batch": max_tokens, "layout": "packed"}
    limit = f"{by_tokens.collator.max_tokens:,} tokens"
    if budget == "auto":
        limit = f"{limit}*"  # the screen says that it is tuned
    limit_as_asked = limit if budget else f"{size} rows"
    sharing, takes_sharing = _cut_as_trees(load, arguments, rows)
    # Whoever asks for sharing by name and may not share is refused, and cut in no other way.
    padded = "chosen" if not takes_sharing else "stands_in" if arguments.layout == "auto" else ""
    mark = {padded: True} if padded and not packed else {}
    ways = [
        _way(f"{size} rows, as drawn (stock)", _cut_like_stock(by_size, rows, size=size)),
        _way(f"{size} rows, sorted", ours, **({} if budget else mark)),
        _way(f"{limit}, sorted", _cut(by_tokens, rows), **(mark if budget else {})),
    ]
    if not rows.are_pairs:
        loader = load(changed(arguments, **as_asked))
        name = f"{limit_as_asked if packed else limit}, packed"
        ways.append(_way(name, _cut(loader, rows), chosen=packed))
    if sharing is not None:
        name = f"{limit_as_asked}, shared prefixes"
        ways.append(_way(name, sharing, chosen=takes_sharing))
    return tuple(ways)


def plan_grouping(
    load: Callable[[Any], UpdateLoader], arguments: Any, rows: RowsToPlan
) -> tuple[float, float] | None:
    """Plan updates with and without `group_by_prefix`.

    Args:
        load: As for `plan_ways`.
        arguments: Likewise.
        rows: Likewise.

    Returns:
        Tokens computed in an update, padding included, of rows drawn one by one and of families;
        None if there are none, or nothing would be shared.
    """
    shares = rows.may_share and not rows.why_not_shared
    if not shares or arguments.layout not in ("auto", "shared_prefix"):
        return None
    grouped = changed(arguments, group_by_prefix=True)
    sampler: Any = load(grouped).batch_sampler
    if not sampler.families:
        return None
    alone = changed(arguments, group_by_prefix=False)
    return _computed(load, alone, rows), _computed(load, grouped, rows)


def _computed(load: Callable[[Any], UpdateLoader], arguments: Any, rows: RowsToPlan) -> float:
    """Count the tokens that training computes for an update, where the model allows trees."""
    cut, taken = _cut_as_trees(load, arguments, rows)
    way = _way("", cut if taken and cut else _cut(load(arguments), rows))
    return float(way.computed_per_update)


@dataclass(frozen=True)
class _Share:
    """One rank's share of an update, cut.

    Attributes:
        update: Which update.
        sizes: Tokens that each micro-batch computes, with what it stands behind.
        as_rows: Tokens of the rows of each, padding included.
        num_input_tokens: Tokens of its rows.
        num_shared_tokens: How many of them are not computed.
        num_kept_again: How many of all `sizes` are kept, and were computed for one before.
    """

    update: int
    sizes: list[int]
    as_rows: list[int]
    num_input_tokens: int
    num_shared_tokens: int = 0
    num_kept_again: int = 0


def _shares(loader: UpdateLoader) -> list[Any]:
    """Return the shares of all ranks in the first updates."""
    sampler: Any = loader.batch_sampler
    updates = itertools.islice(sampler.shares(0), MOST_UPDATES_CUT)
    return [share for shares in updates for share in shares]


def _cut(
    loader: UpdateLoader, rows: RowsToPlan, read: Callable[[int], Any] | None = None
) -> list[_Share]:
    """Cut the first updates of all ranks as the workers of their loaders will.

    Args:
        loader: Of one rank.
        rows: The training set.
        read: Reads a row, for a loader whose collator may share prefixes.
    """
    collator = loader.collator
    found = []
    for share in _shares(loader):
        kept = [index for index in share if rows.costs[index]]
        lengths = [int(cost) for cost in rows.costs[kept]]
        at_random = collator.measures_noise(share.update)
        trees: Sequence[Any] = []
        if read is None:
            plan = collator.cut(lengths, at_random=at_random)
        else:
            own = [read(index) for index in kept]
            plan, trees = collator.cut_rows(collator.sequences(own), lengths, at_random=at_random)
        sizes, as_rows, shared = [], [], 0
        beginnings: list[tuple[int, ...]] = []
        for piece, grown in itertools.zip_longest(plan, trees):
            widths = [lengths[i] for i in piece]
            members = [kept[i] for i in piece]
            padded = sum(widths) if collator.packed else rows.padded(members)
            as_rows.append(padded)
            beginnings.append(())
            if grown is None or grown.are_rows:
                sizes.append(padded)
            else:
                if grown.kept:
                    tokens = _sequences(own[piece[0]])[0][: grown.kept]
                    beginnings[-1] = tuple(map(int, tokens))
                sizes.append(grown.num_computed + grown.kept)
                shared += int(rows.tokens[[kept[i] for i in piece]].sum()) - grown.num_tokens
        num_kept = count_kept(beginnings)  # as training counts them
        again, shared = sum(map(len, beginnings)) - num_kept, shared - num_kept
        num_input_tokens = int(rows.tokens[kept].sum())
        found.append(_Share(share.update, sizes, as_rows, num_input_tokens, shared, again))
    return found


def _cut_as_trees(
    load: Callable[[Any], UpdateLoader], arguments: Any, rows: RowsToPlan
) -> tuple[list[_Share] | None, bool]:
    """Cut the updates so that common prefixes are computed once.

    Returns:
        The cut, None if rows share next to nothing; and whether training takes it, where the model
        allows it.
    """
    asked = arguments.layout == "shared_prefix"
    loader = load(arguments if asked else changed(arguments, layout="auto"))
    read = _reader(rows.dataset)
    if not rows.may_share or _shareable(loader, rows, read) < LEAST_SHARED:
        return None, False
    # As training does: the first rows decide whether "auto" tries it.
    choose_probe_rows(loader, loader.collator)
    foreseen = arguments.layout == "auto" and loader.collator.foresees_sharing
    taken = asked or (foreseen and not rows.why_not_shared)
    loader.collator.share_prefixes([rows], by_rows=rows.trees_by_rows, keeps=rows.keeps_beginnings)
    loader.collator.rows_per_sequence = 2 if rows.are_pairs else 1
    cut = _cut(loader, rows, read)
    shared = sum(share.num_shared_tokens for share in cut)
    if shared < LEAST_SHARED * sum(share.num_input_tokens for share in cut):
        return None, False
    return cut, taken


def _reader(dataset: Any) -> Callable[[int], Any]:
    """Return a function that reads the tokens of a row, and no more of it than those."""
    if hasattr(dataset, "select_columns"):
        names = [name for name in dataset.column_names if name.endswith("_ids")]
        dataset = dataset.select_columns(names)
    return lambda index: dataset[index]


def _shareable(loader: UpdateLoader, rows: RowsToPlan, read: Callable[[int], Any]) -> float:
    """Return which part of the tokens of an update the rows before have, in the first updates."""
    sampler: Any = loader.batch_sampler
    shared = total = 0
    for members in sampler.membership(0)[:_UPDATES_ASKED]:
        own = [read(index) for index in members if rows.costs[index]]
        found = sort_by_prefix(tokens for row in own for tokens in _sequences(row))
        shared += int(found.shared.sum())
        total += int(found.lengths.sum())
    return shared / max(total, 1)


def _sequences(row: Any) -> list[list[int]]:
    """Return the tokens of a row; of a pair, those of either answer behind the prompt."""
    if "chosen_ids" not in row:
        return [row["input_ids"]]
    prompt = row.get("prompt_ids", ())
    return [[*prompt, *row[name]] for name in ("chosen_ids", "rejected_ids")]


def _cut_like_stock(loader: UpdateLoader, rows: RowsToPlan, *, size: int) -> list[_Share]:
    """Deal rows to ranks in turn and cut them in the order drawn."""
    sampler: Any = loader.batch_sampler
    found = []
    for update, members in enumerate(sampler.membership(0)[:MOST_UPDATES_CUT]):
        for rank in range(sampler.world_size):
            share = members[rank :: sampler.world_size]
            lengths = rows.costs[share].tolist()
            plan = plan_micro_batches(lengths, max_sequences=size, keep_order=True)
            sizes = [rows.padded([share[i] for i in piece]) for piece in plan]
            found.append(_Share(update, sizes, sizes, int(rows.tokens[share].sum())))
    return found


def _way(name: str, cut: Sequence[_Share], *, chosen: bool = False, stands_in: bool = False) -> Any:
    sizes = [size for share in cut for size in share.sizes]
    computed = sum(sizes) - sum(share.num_kept_again for share in cut)
    tokens = sum(share.num_input_tokens for share in cut)
    shared = sum(share.num_shared_tokens for share in cut)
    return WayToPlan(
        name=name,
        micro_batches=Spread.of([len(share.sizes) for share in cut]),
        padding_fraction=(computed - (tokens - shared)) / max(computed, 1),
        computed_per_update=computed / len({share.update for share in cut}),
        shared_fraction=shared / max(tokens, 1),
        largest=max(sizes, default=0),
        largest_as_rows=max((size for share in cut for size in share.as_rows), default=0),
        chosen=chosen,
        stands_in=stands_in,
    )
