"""What reading a row needs beside the row, and the error for one that cannot be read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from hf_gradacc.data.section import AssistantTurns, Task

__all__ = ["Encoded", "RowError", "RowReader", "kind_of", "read_json"]

Encoded = dict[str, Any]
"""`input_ids`, and `labels`: one per token (-100 is no target), a target sequence, or a class. Of a
pair `chosen_ids` and `rejected_ids`, and `prompt_ids` before both for `dpo`, as TRL names them."""


class RowError(ValueError):
    """A row that cannot be read; the caller adds the file and the line.

    Attributes:
        column: The column of the data that is at fault.
    """

    def __init__(self, column: str, why: str) -> None:
        self.column, self.why = column, why
        super().__init__(f"column {column!r} {why}")


@dataclass(frozen=True)
class RowReader:
    """Everything a format function needs beside the row.

    Attributes:
        tokenizer: A transformers tokenizer with an EOS token.
        columns: The format's column names to the data's, where they differ.
        system: A system turn for rows without one.
        label_ids: Classification: label name to id.
        source_prefix: Seq2seq: put before every source.
        template_options: Values that the chat template reads beside the turns.
        assistant_turns: Which turns of a conversation share a row.
        roles_to_train: The roles whose turns are learned.
        vocab_size: Token ids from here on do not exist; by default those of the tokenizer.
        task: What the rows are for; a pair is another one for `reward` than for `dpo`.
        notes: What happened to the rows read so far, see `data.report`.
    """

    tokenizer: Any
    columns: Mapping[str, str] = field(default_factory=dict)
    system: str | None = None
    label_ids: Mapping[str, int] | None = None
    source_prefix: str = ""
    template_options: Mapping[str, Any] = field(default_factory=dict)
    assistant_turns: AssistantTurns = "auto"
    roles_to_train: Sequence[str] = ("assistant",)
    vocab_size: int | None = None
    task: Task = "causal_lm"
    notes: Counter[str] = field(default_factory=Counter, compare=False)

    def column(self, name: str) -> str:
        """What the data calls a column of the format."""
        return self.columns.get(name, name)

    def text(self, row: Mapping[str, Any], name: str, *, optional: bool = False) -> str:
        """The text in a column.

        Raises:
            RowError: If it is missing, null, or no text.
        """
        column = self.column(name)
        value = row.get(column)
        if value is None:
            if optional:
                return ""
            raise RowError(column, "is null" if column in row else "is missing")
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)  # an answer of 42 in JSON
        if not isinstance(value, str):
            # Arrow makes one type of a column: 1 and 2.5 become 1.0 and 2.5, and a text that looks
            # like a date a point in time. What was written there is not known any more.
            written = isinstance(value, float | datetime)
            hint = "; write it in quotes" if isinstance(value, float) else "; use csv or parquet"
            raise RowError(column, f"is {kind_of(value)}, not text{hint if written else ''}")
        return value


def read_json(column: str, value: Any, *, empty: str) -> Any:
    """Read a value that may be written as JSON text, as lists and objects often are on the hub.

    Args:
        column: The column it stands in.
        value: The value; one that is no text is given back.
        empty: What an empty text stands for.

    Raises:
        RowError: If the text is no JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value or empty)
    except json.JSONDecodeError as error:
        raise RowError(column, f"is not JSON: {error.msg} at {error.pos + 1}") from None


def kind_of(value: Any) -> str:
    """What a value is, in words: "a list", "null"."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", bytes: "bytes"}
    names |= {float: "a decimal number", int: "a number", datetime: "a date"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")
