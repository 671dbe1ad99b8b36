"""One function per data format: a row of text becomes token ids and labels.

| format | columns | targets |
|---|---|---|
| chat | messages | assistant turns, with their end token |
| prompt_completion | prompt, completion | the completion and EOS |
| instruction | instruction, input (optional), output | the output and EOS |
| question_answer | question, answer | the answer and EOS |
| text | text | every token, EOS after each document |
| classification | text, label | the label |
| seq2seq | source, target | the target and EOS |

Question/answer and instruction rows become chats where the tokenizer has a chat template, so that
what was trained is what a chat application will send; else they are written out plainly. Prompt
and target are then tokenized apart, exactly as they are when the model generates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_gradacc.data.chat import ChatError, encode_chat
from hf_gradacc.recipe_data import Format
from hf_gradacc.targets import IGNORE_INDEX

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
    """

    tokenizer: Any
    columns: Mapping[str, str] = field(default_factory=dict)
    system: str | None = None
    label_ids: Mapping[str, int] | None = None
    source_prefix: str = ""

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
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)  # csv readers turn an answer of 42 into a number
        if not isinstance(value, str):
            raise RowError(column, f"is {_kind(value)}, not text")
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
    return _conversation(reader, messages, column)


def _turn(column: str, number: int, turn: Any) -> dict[str, Any]:
    """Check one turn; `from` and `value` of ShareGPT files are read as `role` and `content`."""
    if not isinstance(turn, Mapping):
        raise RowError(column, f"has {_kind(turn)} as turn {number}, not a role and its content")
    role = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    if not isinstance(role, str):
        raise RowError(column, f"has no role in turn {number}")
    rest = {k: v for k, v in turn.items() if k not in ("role", "content", "from", "value")}
    rest = {name: value for name, value in rest.items() if value is not None}
    if not isinstance(content, str) and not rest.get("tool_calls"):
        raise RowError(column, f"has {_kind(content)} as content of turn {number}, not text")
    role = {"human": "user", "gpt": "assistant"}.get(role, role)
    return {"role": role, "content": content or "", **rest}


def _conversation(reader: RowReader, messages: list[dict[str, Any]], column: str) -> Encoded:
    if reader.tokenizer.chat_template is None:
        raise RowError(
            column, "needs a chat template and the tokenizer has none; set tokenizer.chat_template"
        )
    if reader.system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": reader.system}, *messages]
    try:
        input_ids, labels = encode_chat(reader.tokenizer, messages)
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
    ids = _with_eos(reader.tokenizer, reader.tokenizer(reader.text(row, "text"))["input_ids"])
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
        return {"input_ids": input_ids, "labels": value}
    if str(value) not in reader.label_ids:
        raise RowError(column, f"is {value!r}, none of {', '.join(sorted(reader.label_ids))}")
    return {"input_ids": input_ids, "labels": reader.label_ids[str(value)]}


def _without_eos(tokenizer: Any, ids: list[int]) -> list[int]:
    """A prompt that its tokenizer closed with EOS, open again."""
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _with_eos(tokenizer: Any, ids: list[int]) -> list[int]:
    return ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", bytes: "bytes"}
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
