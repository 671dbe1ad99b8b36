"""One function per data format: a row of text becomes token ids and labels.

| format | columns | targets |
|---|---|---|
| chat | messages, tools (optional) | assistant turns, with their end token |
| prompt_completion | prompt, completion | the completion and EOS |
| instruction | instruction, input (optional), output | the output and EOS |
| question_answer | question, answer | the answer and EOS |
| text | text | every token, EOS after each document |
| classification | text, label | the label |
| seq2seq | source, target | the target and EOS |

Question/answer and instruction rows become chats if the tokenizer has a chat template, so that
training sees what a chat application will send. Otherwise they are written as plain text. Prompt
and target are then tokenized apart, exactly as they are when the model generates.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from hf_gradacc.data.chat import ChatError, encode_chat
from hf_gradacc.data.section import Format
from hf_gradacc.text import nearest
from hf_gradacc.updates.targets import IGNORE_INDEX

__all__ = ["Encoded", "RowError", "RowReader", "encode_row"]

Encoded = dict[str, Any]


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
    """

    tokenizer: Any
    columns: Mapping[str, str] = field(default_factory=dict)
    system: str | None = None
    label_ids: Mapping[str, int] | None = None
    source_prefix: str = ""
    template_options: Mapping[str, Any] = field(default_factory=dict)

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
            raise RowError(column, f"is {_kind(value)}, not text{hint if written else ''}")
        return value


def encode_row(reader: RowReader, row: Mapping[str, Any], *, format: Format) -> Encoded:
    """Read one row.

    Returns:
        `input_ids`, and `labels`: one per token for language models (-100 is no target), the
        target sequence for seq2seq, the class for classification.

    Raises:
        RowError: If the row cannot be read; it names the column.
    """
    return _FORMATS[format](reader, row)


def _chat(reader: RowReader, row: Mapping[str, Any]) -> Encoded:
    column = reader.column("messages")
    turns = row.get(column)
    if turns is None:
        raise RowError(column, "is null" if column in row else "is missing")
    if not isinstance(turns, list) or not turns:
        raise RowError(column, f"is {_kind(turns)}, not a list of turns")
    messages = [_turn(column, number, turn) for number, turn in enumerate(turns, start=1)]
    tools = _tools(reader.column("tools"), row)
    return _conversation(reader, messages, column, **({"tools": tools} if tools else {}))


_ROLES = {
    *("system", "developer", "user", "assistant"),
    *("tool", "function", "ipython", "environment", "observation"),
    *("context", "document", "documents"),
}
_OTHER_ROLES = {"human": "user", "gpt": "assistant"}


def _turn(column: str, number: int, turn: Any) -> dict[str, Any]:
    """Check one turn; `from` and `value` of ShareGPT files are read as `role` and `content`."""
    if not isinstance(turn, Mapping):
        raise RowError(column, f"has {_kind(turn)} as turn {number}, not a role and its content")
    role = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    if not isinstance(role, str):
        raise RowError(column, f"has no role in turn {number}")
    role = _OTHER_ROLES.get(role, role)
    if role not in _ROLES:  # `assistent` would be rendered, and never learned
        guess = nearest(role, [*_ROLES, *_OTHER_ROLES])
        hint = f"did you mean {guess}?" if guess else f"use one of {', '.join(sorted(_ROLES))}"
        raise RowError(column, f"has the unknown role {role!r} in turn {number}; {hint}")
    rest = {k: v for k, v in turn.items() if k not in ("role", "content", "from", "value")}
    rest = _without_nulls(rest)
    if not isinstance(content, str) and not rest.get("tool_calls"):
        raise RowError(column, f"has {_kind(content)} as content of turn {number}, not text")
    return {"role": role, "content": content or "", **rest}


def _tools(column: str, row: Mapping[str, Any]) -> list[Any]:
    """The tools a conversation may call: a list, or JSON text of one, as on the hub."""
    tools = row.get(column)
    if isinstance(tools, str):
        try:
            tools = json.loads(tools or "[]")
        except json.JSONDecodeError as error:
            raise RowError(column, f"is not JSON: {error.msg} at {error.pos + 1}") from None
    if not isinstance(tools, list | None):
        raise RowError(column, f"is {_kind(tools)}, not a list of tools")
    return [_without_nulls(tool) for tool in tools or []]


def _without_nulls(value: Any) -> Any:
    """Drop the nulls that Arrow fills in: it gives all rows the keys of any, at every depth."""
    if isinstance(value, Mapping):
        return {k: _without_nulls(inner) for k, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _conversation(
    reader: RowReader, messages: list[dict[str, Any]], column: str, **options: Any
) -> Encoded:
    if reader.tokenizer.chat_template is None:
        raise RowError(
            column, "needs a chat template and the tokenizer has none; set tokenizer.chat_template"
        )
    if reader.system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": reader.system}, *messages]
    try:
        input_ids, labels = encode_chat(
            reader.tokenizer, messages, **reader.template_options, **options
        )
    except ChatError as error:
        raise RowError(column, f"cannot be used: {error}") from error
    return {"input_ids": input_ids, "labels": labels}


def _question_answer(reader: RowReader, row: Mapping[str, Any]) -> Encoded:
    question, answer = reader.text(row, "question"), reader.text(row, "answer")
    return _ask(reader, question, answer, f"Question: {question}\nAnswer: ", "answer")


def _instruction(reader: RowReader, row: Mapping[str, Any]) -> Encoded:
    instruction, output = reader.text(row, "instruction"), reader.text(row, "output")
    context = reader.text(row, "input", optional=True)
    plain = f"### Instruction:\n{instruction}\n\n"
    plain += f"### Input:\n{context}\n\n" if context else ""
    question = f"{instruction}\n\n{context}" if context else instruction
    return _ask(reader, question, output, f"{plain}### Response:\n", "output")


def _ask(reader: RowReader, question: str, answer: str, plain: str, name: str) -> Encoded:
    if reader.tokenizer.chat_template is None:
        system = "" if reader.system is None else f"{reader.system}\n\n"
        return _continue(reader, system + plain, answer)
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return _conversation(reader, turns, reader.column(name))


def _prompt_completion(reader: RowReader, row: Mapping[str, Any]) -> Encoded:
    return _continue(reader, reader.text(row, "prompt"), reader.text(row, "completion"))


def _continue(reader: RowReader, prompt: str, completion: str) -> Encoded:
    tokenizer = reader.tokenizer
    before = _without_eos(tokenizer, tokenizer(prompt)["input_ids"])
    after = tokenizer(completion, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return {"input_ids": before + after, "labels": [IGNORE_INDEX] * len(before) + after}


def _text(reader: RowReader, row: Mapping[str, Any]) -> Encoded:
    text = reader.text(row, "text")
    if not text:  # an EOS alone would teach to end before anything is said
        return {"input_ids": [], "labels": []}
    ids = _with_eos(reader.tokenizer, reader.tokenizer(text)["input_ids"])
    return {"input_ids": ids, "labels": list(ids)}


def _seq2seq(reader: RowReader, row: Mapping[str, Any]) -> Encoded:
    tokenizer = reader.tokenizer
    source = reader.source_prefix + reader.text(row, "source")
    target = reader.text(row, "target")
    labels = tokenizer(text_target=target)["input_ids"]
    input_ids = _with_eos(tokenizer, tokenizer(source)["input_ids"])
    return {"input_ids": input_ids, "labels": _with_eos(tokenizer, labels)}


def _classification(reader: RowReader, row: Mapping[str, Any]) -> Encoded:
    input_ids = reader.tokenizer(reader.text(row, "text"))["input_ids"]
    column = reader.column("label")
    value = row.get(column)
    if value is None or (isinstance(value, float) and value != value):
        raise RowError(column, "is null" if column in row else "is missing")
    if reader.label_ids is None:
        try:
            return {"input_ids": input_ids, "labels": float(value)}
        except (TypeError, ValueError):
            raise RowError(column, f"is {value!r}, not a number like the others") from None
    if str(value) not in reader.label_ids:
        raise RowError(column, f"is {value!r}, none of {', '.join(sorted(reader.label_ids))}")
    return {"input_ids": input_ids, "labels": reader.label_ids[str(value)]}


def _without_eos(tokenizer: Any, ids: list[int]) -> list[int]:
    """Remove the EOS that the tokenizer put after a prompt."""
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _with_eos(tokenizer: Any, ids: list[int]) -> list[int]:
    return ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", bytes: "bytes"}
    names |= {float: "a decimal number", datetime: "a date"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


_FORMATS: dict[str, Callable[[RowReader, Mapping[str, Any]], Encoded]] = {
    "chat": _chat,
    "prompt_completion": _prompt_completion,
    "instruction": _instruction,
    "question_answer": _question_answer,
    "text": _text,
    "classification": _classification,
    "seq2seq": _seq2seq,
}
