"""Classification: which classes there are, read from the data."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_gradacc.data.section import DataSection
from hf_gradacc.errors import DataError

__all__ = ["NAMED_CLASSES", "Labels", "find_classes"]


NAMED_CLASSES = 20


@dataclass(frozen=True)
class Labels:
    """The classes of a classification.

    Attributes:
        names: Class names in order of their ids; empty where labels are numbers to regress on.
        ids: Name, or number as text, to id; None if labels are taken as they are.
        remarks: Lines that say what the labels were taken for, and what looks wrong with them.
    """

    names: list[str]
    ids: dict[str, int] | None
    remarks: list[str] = field(default_factory=list)


def find_classes(section: DataSection, raw: list[Any]) -> Labels:
    """Read the classes off the label column of the training rows.

    A `ClassLabel` column names its classes; text and whole numbers are classes in sorted order;
    decimal numbers are regression, `1.0` included. A csv holds text only, so text that is a number
    counts as one.

    Raises:
        DataError: If there is one class only, a label is a list, or a stream hides its classes.
    """
    formats = [source.format or section.format for source in section.train]
    if "classification" not in formats:
        return Labels([], None)
    counts: Counter[Any] = Counter()
    for source, rows in zip(section.train, raw, strict=True):
        columns = section.columns if source.columns is None else source.columns
        column = columns.get("label", "label")
        feature = (rows.features or {}).get(column)
        names = getattr(feature, "names", None)
        if names is not None:
            ids = {str(i): i for i in range(len(names))}
            remarks = [] if section.streaming else [_count_named(names, rows[column])]
            return Labels(list(names), ids, [*remarks, *_alike(names)])
        if section.streaming:
            raise DataError(
                f"{source.path} is streamed, so its classes cannot be read beforehand: "
                "set data.streaming to false."
            )
        if column in rows.column_names:
            counts.update(_values(rows[column], column, source.path))
    numbers = {value: number for value in counts if (number := _number(value)) is not None}
    whole = bool(counts) and len(numbers) == len(counts)
    if whole and not all(_is_whole(value) for value in counts):
        return Labels([], None, [_describe_regression(numbers)])
    ordered = sorted(counts, key=numbers.__getitem__ if whole else str)
    if len(ordered) < 2:
        raise DataError(
            f"data.train has {len(ordered)} class{'es' if not ordered else ''} in its label "
            "column: classification needs two or more; check data.columns.label."
        )
    names = [str(value) for value in ordered]
    line = _list_counts(names, [counts[value] for value in ordered])
    hint = " (whole numbers are classes; for a regression write decimal ones)" if whole else ""
    ids = {name: index for index, name in enumerate(names)}
    return Labels(names, ids, [line + hint, *_alike(names)])


def _values(labels: Any, column: str, path: str) -> Counter[Any]:
    try:
        return Counter(value for value in labels if value is not None)
    except TypeError:
        raise DataError(
            f"{path}: column {column!r} holds lists or objects: a label is one word or number, so "
            "name the column that has it in data.columns.label."
        ) from None


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _is_whole(value: Any) -> bool:
    """Whether a number is written without a decimal point."""
    if isinstance(value, float):
        return False
    try:
        int(value)
    except (TypeError, ValueError):
        return False
    return True


def _describe_regression(numbers: dict[Any, float]) -> str:
    finite = [number for number in numbers.values() if math.isfinite(number)]
    span = f" from {min(finite):g} to {max(finite):g}" if finite else ""
    line = f"labels: decimal numbers{span}, so the model learns a regression"
    if all(number.is_integer() for number in finite):
        line += "; if they are classes, write them as whole numbers (1, not 1.0) or as words"
    return line


def _count_named(names: Sequence[str], labels: Iterable[Any]) -> str:
    """Count the rows of each class of a `ClassLabel` column, which holds their ids."""
    counts = Counter(labels)
    return _list_counts(names, [counts[index] for index in range(len(names))])


def _list_counts(names: Sequence[str], counts: Sequence[int]) -> str:
    shown = [f"{_shown(name)} {count:,}" for name, count in zip(names, counts, strict=True)]
    rest = len(shown) - NAMED_CLASSES
    more = f", and {rest:,} more classes" if rest > 0 else ""
    return f"classes, with their rows: {', '.join(shown[:NAMED_CLASSES])}{more}"


def _alike(names: Iterable[str]) -> Iterator[str]:
    """Yield a line for each group of names that differ in case or blanks only."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault("".join(name.split()).casefold(), []).append(name)
    for group in groups.values():
        if len(group) > 1:
            yield (
                f"classes {' and '.join(map(repr, group))} differ in case or blanks only, and are "
                "learned as different ones: if they are the same, write them alike"
            )


def _shown(name: str) -> str:
    return name if name.isprintable() and name == name.strip() and name else repr(name)
