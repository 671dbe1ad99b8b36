"""What happens to rows that are too long, and a report of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

from hf_gradacc.data.formats import Encoded
from hf_gradacc.recipe_data import Format
from hf_gradacc.targets import IGNORE_INDEX

__all__ = ["Fate", "LengthReport", "fit_length"]

TooLong = Literal["truncate", "drop", "error"]


class Fate(IntEnum):
    """What became of a row."""

    KEPT = 0
    TRUNCATED = 1
    TOO_LONG = 2
    NO_TARGET = 3


def fit_length(
    encoded: Encoded,
    *,
    format: Format,
    max_length: int | None,
    max_target_length: int | None,
    too_long: TooLong,
) -> tuple[Encoded, Fate]:
    """Apply the length policy to one row.

    `truncate` keeps the first tokens. An answer cut so has no EOS: the model does not learn to
    stop in mid-sentence. An encoder's input keeps its closing token, which belongs to the format.
    """
    input_ids, labels = encoded["input_ids"], encoded["labels"]
    if not input_ids:  # an empty document
        return encoded, Fate.NO_TARGET
    fate = Fate.KEPT
    if format != "text" and max_length is not None and len(input_ids) > max_length:
        if too_long != "truncate":
            return encoded, Fate.TOO_LONG
        fate = Fate.TRUNCATED
        if format in ("classification", "seq2seq"):
            input_ids = [*input_ids[: max_length - 1], input_ids[-1]]
        else:
            input_ids, labels = input_ids[:max_length], labels[:max_length]
    if format == "seq2seq":
        limit = max_target_length or max_length
        if limit is not None and len(labels) > limit:
            if too_long != "truncate":
                return encoded, Fate.TOO_LONG
            fate, labels = Fate.TRUNCATED, labels[:limit]
    if format not in ("classification", "seq2seq", "text") and _no_target(labels):
        return encoded, Fate.NO_TARGET
    return {"input_ids": input_ids, "labels": labels}, fate


def _no_target(labels: list[int]) -> bool:
    # Nothing predicts the first token of a row, so its label is no target.
    return all(label == IGNORE_INDEX for label in labels[1:])


@dataclass(frozen=True)
class LengthReport:
    """What preparing one set of rows did.

    Attributes:
        name: Which set, such as `data.train`.
        num_rows: Rows (documents, for plain text) read.
        num_truncated: Rows cut to `max_length`, and kept.
        num_too_long: Rows left out for their length.
        num_without_target: Rows left out because no token of them would be learned.
        num_sequences: Rows, or blocks of text, that training sees.
        num_tokens: Input tokens in them.
        longest: Tokens in the longest of them.
    """

    name: str
    num_rows: int
    num_truncated: int
    num_too_long: int
    num_without_target: int
    num_sequences: int
    num_tokens: int
    longest: int

    def __str__(self) -> str:
        parts = [f"{self.name}: {self.num_rows:,} rows -> {self.num_sequences:,} sequences"]
        mean = self.num_tokens / max(1, self.num_sequences)
        parts.append(f"{self.num_tokens:,} tokens (mean {mean:.0f}, longest {self.longest:,})")
        for number, what in (
            (self.num_truncated, "truncated to max_length"),
            (self.num_too_long, "dropped as longer than max_length"),
            (self.num_without_target, "dropped as having no target"),
        ):
            if number:
                parts.append(f"{number:,} {what}")
        return ", ".join(parts)
