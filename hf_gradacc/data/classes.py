"""Classification: which classes there are, read from the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_gradacc.data.section import DataSection
from hf_gradacc.errors import DataError

__all__ = ["Labels", "find_classes"]


@dataclass(frozen=True)
class Labels:
    """The classes of a classification.

    Attributes:
        names: Class names in order of their ids; empty where labels are numbers to regress on.
        ids: Name, or number as text, to id; None if labels are taken as they are.
    """

    names: list[str]
    ids: dict[str, int] | None


def find_classes(section: DataSection, raw: list[Any]) -> Labels:
    """Read the classes off the label column of the training rows.

    A `ClassLabel` column names its classes; text and whole numbers are classes in sorted order;
    decimal numbers are regression. A csv holds text only, so text that is a number counts as one.

    Raises:
        DataError: If there is one class only, a label is a list, or a stream hides its classes.
    """
    formats = [source.format or section.format for source in section.train]
    if "classification" not in formats:
        return Labels([], None)
    seen: set[Any] = set()
    for source, rows in zip(section.train, raw, strict=True):
        columns = section.columns if source.columns is None else source.columns
        column = columns.get("label", "label")
        feature = (rows.features or {}).get(column)
        names = getattr(feature, "names", None)
        if names is not None:
            return Labels(list(names), {str(i): i for i in range(len(names))})
        if section.streaming:
            raise DataError(
                f"{source.path} is streamed, so its classes cannot be read beforehand: "
                "set data.streaming to false."
            )
        if column in rows.column_names:
            seen |= _values(rows[column], column, source.path)
    numbers = {value: number for value in seen if (number := _number(value)) is not None}
    if seen and len(numbers) == len(seen):
        if any(not number.is_integer() for number in numbers.values()):
            return Labels([], None)
        ordered = sorted(seen, key=numbers.__getitem__)
    else:
        ordered = sorted(seen, key=str)
    if len(ordered) < 2:
        raise DataError(
            f"data.train has {len(ordered)} class{'es' if not ordered else ''} in its label "
            "column: classification needs two or more; check data.columns.label."
        )
    names = [str(value) for value in ordered]
    return Labels(names, {name: index for index, name in enumerate(names)})


def _values(labels: Any, column: str, path: str) -> set[Any]:
    try:
        return {value for value in labels if value is not None}
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
