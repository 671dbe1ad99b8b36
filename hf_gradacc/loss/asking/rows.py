"""The rows the model is asked with, and how to collate some of them by themselves.

Most collators make one row of tensors from each dataset row, so rows can be sliced out of the
batch. TRL's preference collators make two: all chosen answers, then all rejected ones. Padding-free
ones lay all rows end to end, and the images of a batch may be one tensor of patches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_gradacc.errors import ConfigError, DataError
from hf_gradacc.updates.batch import (
    count_rows,
    count_rows_per_sequence,
    find_main_input,
    labels_of,
    slice_rows,
    trim_padding,
)
from hf_gradacc.updates.collator import LEAST_SAVING, UpdateCollator
from hf_gradacc.updates.lengths import measure_length, sequences_of_rows
from hf_gradacc.updates.loader import UpdateLoader, count_targets_of, read_row, read_rows
from hf_gradacc.updates.stream import Rows, UpdateStream, is_arrow_table, is_stream
from hf_gradacc.updates.targets import IGNORE_INDEX, can_have_target, count_row_targets
from hf_gradacc.updates.trees.cost import padded_cost
from hf_gradacc.updates.trees.pairs import plan_shared_sequences

__all__ = [
    "ProbeRows",
    "choose_probe_rows",
    "choose_rows_to_ask",
    "describe",
    "find_padding_targets",
    "foresees_sharing",
    "rows_per_sequence_in",
]


@dataclass(frozen=True)
class ProbeRows:
    """Dataset rows with what the data collator makes of them.

    Attributes:
        rows: As the dataset gives them.
        inputs: All of them, collated together.
        collate: The data collator.
        rows_per_sequence: Collated rows of each, in blocks as `slice_rows` wants them; None if
            collated rows cannot be told apart.
    """

    rows: Sequence[Any]
    inputs: Mapping[str, Any]
    collate: Callable[[list[Any]], Any]
    rows_per_sequence: int | None

    @classmethod
    def of(
        cls, rows: Sequence[Any], inputs: Mapping[str, Any], collate: Callable[[list[Any]], Any]
    ) -> ProbeRows:
        """See how collated rows belong to dataset rows."""
        rows_per_sequence = count_rows_per_sequence(inputs, len(rows))
        if rows_per_sequence is not None and rows_per_sequence > 1:
            per = rows_per_sequence
            sliced = (slice_rows(inputs, [i], rows_per_sequence=per) for i in range(len(rows)))
            if not all(
                _hold_same_sequences(part, collate([row]))
                for part, row in zip(sliced, rows, strict=True)
            ):
                rows_per_sequence = None
        if rows_per_sequence == 1 and not _is_plain(inputs, len(rows)):
            with torch.random.fork_rng(devices=[]):
                alone = [collate([row]) for row in rows]
            if not all(_same_shares(slice_rows(inputs, [i]), a) for i, a in enumerate(alone)):
                rows_per_sequence = None
        return cls(rows, inputs, collate, rows_per_sequence)

    def take(self, indices: Sequence[int]) -> dict[str, Any]:
        """Return some of the rows, collated together."""
        if self.rows_per_sequence is not None:
            return slice_rows(self.inputs, indices, rows_per_sequence=self.rows_per_sequence)
        return dict(self.collate([self.rows[i] for i in indices]))


def find_padding_targets(known: ProbeRows | None) -> list[str]:
    """Warn if the collator pads labels with a value that the loss takes for a target.

    The width of a micro-batch then decides what is learned, so all micro-batches of an update need
    one width. FSMT does that to the labels it is given, and so does a collator that pads them with
    the tokenizer's padding token.
    """
    if known is None or known.rows_per_sequence != 1:
        return []
    labels = labels_of(known.inputs)[1]
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


def rows_per_sequence_in(loader: Any) -> int:
    """Count the collated rows that one row of a DataLoader's dataset becomes, at least 1."""
    dataset = getattr(loader, "dataset", None)
    if dataset is None or is_stream(dataset) or not len(dataset):
        return 1
    with torch.random.fork_rng(devices=[]):  # the collator may mask at random
        inputs = loader.collate_fn([dataset[0]])
    return count_rows_per_sequence(inputs, 1) or 1


def _is_plain(inputs: Mapping[str, Any], num_rows: int) -> bool:
    """Return whether a batch holds only tokens, masks and labels, which surely belong to rows."""
    return all(
        value.ndim == 0 or (value.ndim <= 2 and len(value) == num_rows)
        for value in inputs.values()
        if isinstance(value, torch.Tensor)
    )


def _same_shares(sliced: Mapping[str, Any], alone: Mapping[str, Any]) -> bool:
    """Return whether a row has the same shapes sliced out of a batch as collated alone.

    With images it may not: rows hold none or several, or the patches of all rows are one tensor.
    """

    def shares(part: Mapping[str, Any]) -> dict[str, int]:
        return {k: len(v) for k, v in part.items() if isinstance(v, torch.Tensor) and v.ndim}

    return shares(sliced) == shares(alone)


def _hold_same_sequences(sliced: Mapping[str, Any], alone: Mapping[str, Any]) -> bool:
    """Return whether two batches hold the same sequences, whatever they are padded with."""
    a, b = (find_main_input(trim_padding(part)) for part in (sliced, alone))
    return a is not None and b is not None and a.shape == b.shape and bool(a.eq(b).all())


def choose_probe_rows(
    loader: UpdateLoader,
    collator: UpdateCollator,
    *,
    tokens_per_update: int | None = None,
    count: int = 3,
) -> Rows:
    """Choose a few short rows to ask the model with, as different from each other as possible.

    A wrong weight shows only between rows of different length, label or number of targets. A
    dataset may be sorted by any of these, so candidates are taken from all over it.

    Raises:
        DataError: If no row of a map dataset has a target.
        ConfigError: If tokens are to be counted that show only once rows are collated.
    """
    dataset: Any = loader.dataset
    taken: list[int] = []
    if isinstance(dataset, UpdateStream):
        numbered = [(i, row) for i, row in enumerate(dataset.peek(16)) if can_have_target(row)]
    else:
        dataset, n = dataset.dataset, len(dataset)
        taken = [*dict.fromkeys([*range(min(n, 8)), *(n * k // 8 for k in range(1, 8)), n - 1])]
        read = ((i, read_row(dataset, i)) for i in taken)
        numbered = [(i, row) for i, row in read if can_have_target(row)]
        others = ((i, row) for i, row in enumerate(read_rows(dataset)) if can_have_target(row))
        numbered = numbered or list(itertools.islice(others, count))
        if not numbered:
            raise DataError(
                f"none of the {n} training rows has a target: every label is -100, so there is "
                f"nothing to learn. Check how the prompt is masked and how rows are cut."
            )
    candidates = [row for _, row in numbered]
    unknown = {"max_tokens_per_micro_batch": collator.max_tokens}
    if not any(count_targets_of(row, collator) for row in candidates):
        unknown["tokens_per_update"] = tokens_per_update
    if candidates and not any(collator.measure(candidates)) and any(unknown.values()):
        asked = " and ".join(f"{name} = {value}" for name, value in unknown.items() if value)
        raise ConfigError(
            f"{asked}: how many tokens a row has is unknown until the data collator has run "
            f"({describe(candidates[0])}). Tokenize the dataset first, or count sequences: "
            f"per_device_train_batch_size and effective_batch_size."
        )
    has_families = bool(getattr(loader.batch_sampler, "families", None))
    collator.foresees_sharing = has_families or foresees_sharing(candidates, collator)
    traits = [_traits(row, collator.main_input) for row in candidates]
    chosen = _choose_unlike(traits, min(count, len(candidates)))
    chosen = sorted(chosen, key=lambda i: traits[i][0])
    rows = [candidates[i] for i in chosen]
    indices = [numbered[i][0] for i in chosen]
    classes = [_class_of(row) for row in rows]
    if len(rows) > 2 and None not in classes and len(set(classes)) == len(classes):
        # A loss that pulls rows of one class together does nothing to rows of different ones.
        rest = [numbered[i] for i in range(len(candidates)) if i not in chosen]
        more = () if isinstance(dataset, UpdateStream) else _rows_of(classes[:2], dataset, taken)
        alike = (pair for pair in (*rest, *more) if _class_of(pair[1]) in classes[:2])
        indices[2], rows[2] = next(alike, (indices[2], rows[2]))
    return Rows(rows, indices=indices, epoch=0, update=0)


def foresees_sharing(rows: Sequence[Any], collator: UpdateCollator) -> bool:
    """Return whether trees would save anything worth it if these rows were an update."""
    # Pairs have not been collated yet; what their rows hold tells how many they become.
    sequences = next(
        (
            found
            for per_sequence in (3, 2, 1)
            if (
                found := sequences_of_rows(
                    rows, main_input=collator.main_input, rows_per_sequence=per_sequence
                )
            )
        ),
        None,
    )
    if sequences is None or len(sequences) * len(sequences[0]) < 2:
        return False
    lengths = [len(each) * max(map(len, each)) for each in sequences]
    shared = plan_shared_sequences(sequences, collator.tree_cost)
    each = [[i] for i in range(len(lengths))]
    plain = padded_cost(lengths, each, collator.tree_cost, rows_each=len(sequences[0]))
    return shared.pays(plain, least_saving=LEAST_SAVING)


def _choose_unlike(traits: Sequence[tuple[Any, ...]], count: int) -> list[int]:
    """Choose rows that differ in as many traits as possible, the shorter first."""
    chosen: list[int] = []
    while len(chosen) < count:
        rest = [i for i in range(len(traits)) if i not in chosen]
        unlike = {i: _unlike(traits[i], [traits[j] for j in chosen]) for i in rest}
        chosen.append(max(rest, key=lambda i: (unlike[i], -traits[i][0])))
    return chosen


def _rows_of(
    classes: Sequence[str | None], dataset: Any, leave_out: Sequence[int]
) -> Iterator[tuple[int, Any]]:
    """Yield rows of some classes and their places, by the labels of many or from few rows."""
    name = "labels"
    if is_arrow_table(dataset):
        name = next((key for key in ("labels", "label") if key in dataset.column_names), name)
    if is_arrow_table(dataset) and name in dataset.column_names:
        labels = dataset.with_format(None)[:4096][name]
        places = [i for i, label in enumerate(labels) if _class_of({name: label}) in classes]
    else:
        places = list(range(min(len(dataset), 64)))
    return ((i, read_row(dataset, i)) for i in places if i not in leave_out)


def _class_of(row: Any) -> str | None:
    """Return the class of a row that has one; None if it has none, or other labels."""
    label: Any = row.get("labels", row.get("label")) if isinstance(row, Mapping) else None
    if hasattr(label, "item") and getattr(label, "ndim", 0) == 0:
        label = label.item()
    return str(label) if isinstance(label, int | str) else None


def _traits(row: Any, main_input: str) -> tuple[int, int | None, str]:
    """Return length, number of targets and, of a row that has one label, that label."""
    labels = row.get("labels", row.get("label")) if isinstance(row, Mapping) else None
    is_many = hasattr(labels, "__len__") and getattr(labels, "ndim", 1) > 0
    is_many = is_many and not isinstance(labels, str)
    targets = count_row_targets(row, shifted=True) if is_many else None
    return measure_length(row, main_input=main_input), targets, "" if is_many else str(labels)


def _unlike(one: tuple[Any, ...], others: list[tuple[Any, ...]]) -> int:
    """Count in how many traits a row differs from all others."""
    return sum(all(one[k] != other[k] for other in others) for k in range(len(one)))


def describe(row: Any) -> str:
    """Return what a dataset row is, for an error."""
    return f"the keys {sorted(row)}" if isinstance(row, Mapping) else f"type {type(row).__name__}"


def choose_rows_to_ask(inputs: Mapping[str, Any], *, count: int = 3) -> list[int]:
    """Choose a few rows of a collated batch that have targets, in the batch's order.

    >>> choose_rows_to_ask({"labels": torch.tensor([[1, -100], [1, 2], [-100, -100]])}, count=1)
    [1]
    """
    n = count_rows(inputs)
    labels = labels_of(inputs)[1]
    if labels is None or labels.is_floating_point() or labels.ndim != 2:
        return list(range(min(n, count)))
    # Rows that have a target whether or not the loss shifts come first, then any with a target.
    after_first = labels[:, 1:].ne(IGNORE_INDEX).any(1).tolist()
    at_all = labels.ne(IGNORE_INDEX).any(1).tolist()
    ranked = sorted(range(n), key=lambda i: (not after_first[i], not at_all[i], i))
    return sorted(ranked[:count])
