"""One function per data format: a row of text becomes token ids and labels.

| format | columns | targets |
|---|---|---|
| chat | messages; tools, system, chat_template_kwargs | assistant turns, with their end token |
| prompt_completion | prompt, completion | the completion and EOS |
| instruction | instruction, output; input, system, history | the output and EOS |
| question_answer | question, answer; system, history | the answer and EOS |
| text | text | every token, EOS after each document |
| classification | text, label | the label |
| seq2seq | source, target | the target and EOS |
| preference | chosen, rejected; prompt, tools, system, chat_template_kwargs, margin | the pair |
| tokens | input_ids; labels, masks | the labels that are not -100; every token without labels |

Question/answer and instruction rows become chats if the tokenizer has a chat template, so that
training sees what a chat application will send. Otherwise they are written as plain text. Prompt
and target are then tokenized as one text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from hf_gradacc.data.chat import split_chat
from hf_gradacc.data.joined import join_and_encode, with_eos
from hf_gradacc.data.messages import (
    Dialogue,
    past_turns,
    read_dialogue,
    read_turns,
    system_of,
)
from hf_gradacc.data.plain import gap_behind, plain_instruction, plain_prompt, plain_question
from hf_gradacc.data.preference import Pair, join_sides, read_pair
from hf_gradacc.data.reader import Encoded, RowError, RowReader, kind_of, read_json
from hf_gradacc.data.rendering import ChatError
from hf_gradacc.data.section import Format
from hf_gradacc.updates.targets import IGNORE_INDEX

__all__ = ["RowError", "RowReader", "encode_row", "encode_rows"]


def encode_row(reader: RowReader, row: Mapping[str, Any], *, format: Format) -> Encoded:
    """Read one row as one sequence; all turns of a conversation share it.

    Returns:
        `input_ids`, and `labels`: one per token for language models (-100 is no target), the
        target sequence for seq2seq, the class for classification.

    Raises:
        RowError: If the row cannot be read; it names the column.
    """
    return encode_rows(replace(reader, assistant_turns="together"), row, format=format)[0]


def encode_rows(reader: RowReader, row: Mapping[str, Any], *, format: Format) -> list[Encoded]:
    """Read one row as the sequences that it is trained in; what happens to it is noted.

    Returns:
        As `encode_row`, a list of them: several for a conversation whose turns cannot share one,
        see `data.chat`.

    Raises:
        RowError: If the row cannot be read; it names the column.
    """
    encoded = _FORMATS[format](reader, row)
    return encoded if isinstance(encoded, list) else [encoded]


def _chat(reader: RowReader, row: Mapping[str, Any]) -> list[Encoded]:
    return _conversation(reader, row, read_dialogue(reader, row), reader.column("messages"))


def _conversation(
    reader: RowReader,
    row: Mapping[str, Any],
    dialogue: Dialogue,
    column: str,
    *,
    context: int = 0,
) -> list[Encoded]:
    """The sequences of a dialogue, whose first turns may be context that is not learned."""
    if reader.tokenizer.chat_template is None:
        raise RowError(
            column, "needs a chat template and the tokenizer has none; set tokenizer.chat_template"
        )
    options = {**reader.template_options, **_template_values(reader, row)}
    if dialogue.tools:
        options["tools"] = dialogue.tools
    learned = []
    for place, (message, mark) in enumerate(zip(dialogue.messages, dialogue.marks, strict=True)):
        is_trained = place >= context and message["role"] in reader.roles_to_train
        reader.notes["marked_off"] += is_trained and mark is False
        reader.notes["mark_ignored"] += bool(mark) and not is_trained
        learned.append(is_trained and mark is not False)
    if not any(m["role"] in reader.roles_to_train for m in dialogue.messages[context:]):
        roles = " or ".join(reader.roles_to_train)
        raise RowError(column, f"cannot be used: no {roles} turn, so there is nothing to learn")
    try:
        rows = split_chat(
            reader.tokenizer,
            dialogue.messages,
            turns=reader.assistant_turns,
            learned=learned,
            options=options,
        )
    except ChatError as error:
        raise RowError(column, f"cannot be used: {error}") from error
    for made in rows:
        reader.notes.update(made.notes)
    note = "split_as_asked" if reader.assistant_turns == "each" else "split"
    reader.notes[note] += len(rows) - 1
    return [{"input_ids": made.input_ids, "labels": made.labels} for made in rows]


def _template_values(reader: RowReader, row: Mapping[str, Any]) -> dict[str, Any]:
    """Values for the template that a row brings along."""
    column = reader.column("chat_template_kwargs")
    value = read_json(column, row.get(column), empty="{}")
    if not isinstance(value, Mapping | None):
        raise RowError(column, f"is {kind_of(value)}, not an object")
    return {name: inner for name, inner in (value or {}).items() if inner is not None}


def _question_answer(reader: RowReader, row: Mapping[str, Any]) -> Encoded | list[Encoded]:
    question, answer = reader.text(row, "question"), reader.text(row, "answer")
    return _ask(reader, row, question, answer, plain_question, "answer")


def _instruction(reader: RowReader, row: Mapping[str, Any]) -> Encoded | list[Encoded]:
    instruction, output = reader.text(row, "instruction"), reader.text(row, "output")
    context = reader.text(row, "input", optional=True)
    question = f"{instruction}\n\n{context}" if context else instruction

    def plain(asked: str) -> str:
        own = asked == question
        return plain_instruction(instruction, context) if own else plain_instruction(asked)

    return _ask(reader, row, question, output, plain, "output")


def _ask(
    reader: RowReader,
    row: Mapping[str, Any],
    question: str,
    answer: str,
    plain: Callable[[str], str],
    name: str,
) -> Encoded | list[Encoded]:
    """A question and its answer, behind those that the row has had before."""
    system, past = system_of(reader, row), past_turns(reader, row)
    if reader.tokenizer.chat_template is None:
        asked = plain(question)
        earlier = [(plain(text), said) for text, said in past]
        prompt = plain_prompt(asked, past=earlier, system=system)
        return _continue(reader, prompt, gap_behind(asked) + answer)
    turns = [] if system is None else [("system", system)]
    for asked, said in [*past, (question, answer)]:
        turns += [("user", asked), ("assistant", said)]
    messages = [{"role": role, "content": text} for role, text in turns]
    return _conversation(
        reader, row, Dialogue(messages, [None] * len(messages), []), reader.column(name)
    )


def _prompt_completion(reader: RowReader, row: Mapping[str, Any]) -> Encoded | list[Encoded]:
    cells = (row.get(reader.column(name)) for name in ("prompt", "completion"))
    prompt, completion = map(read_turns, cells)
    if isinstance(prompt, list) and isinstance(completion, list):  # turns, as TRL takes them
        column = reader.column("completion")
        turns = {column: [*prompt, *completion]}
        inner = replace(reader, columns={**reader.columns, "messages": column})
        dialogue = read_dialogue(inner, {**row, **turns})
        num_context = len(dialogue.messages) - len(completion)
        return _conversation(reader, row, dialogue, column, context=num_context)
    if reader.system is not None:
        column = reader.column("prompt")
        raise RowError(column, "is plain text, before which data.system has no place; leave it out")
    return _continue(reader, reader.text(row, "prompt"), reader.text(row, "completion"))


def _continue(reader: RowReader, prompt: str, completion: str) -> Encoded:
    input_ids, labels, straddles = join_and_encode(reader.tokenizer, prompt, completion)
    reader.notes["straddling"] += straddles
    return {"input_ids": input_ids, "labels": labels}


def _text(reader: RowReader, row: Mapping[str, Any]) -> Encoded:
    text = reader.text(row, "text")
    if not text:  # an EOS alone would teach to end before anything is said
        return {"input_ids": [], "labels": []}
    ids = with_eos(reader.tokenizer, reader.tokenizer(text)["input_ids"])
    return {"input_ids": ids, "labels": list(ids)}


def _seq2seq(reader: RowReader, row: Mapping[str, Any]) -> Encoded:
    tokenizer = reader.tokenizer
    source = reader.source_prefix + reader.text(row, "source")
    target = reader.text(row, "target")
    labels = tokenizer(text_target=target)["input_ids"]
    input_ids = with_eos(tokenizer, tokenizer(source)["input_ids"])
    return {"input_ids": input_ids, "labels": with_eos(tokenizer, labels)}


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


def _tokens(reader: RowReader, row: Mapping[str, Any]) -> Encoded:
    ids = _numbers(reader, row, "input_ids")
    size = len(reader.tokenizer) if reader.vocab_size is None else reader.vocab_size
    column = reader.column("input_ids")
    outside = next((token for token in ids if not 0 <= token < size), None)
    if outside is not None:
        raise RowError(column, f"has token {outside}, and the vocabulary ends at {size - 1}")
    labels = _labels(reader, row, ids, size)
    for name in ("completion_mask", "assistant_masks"):  # TRL's; what both keep is learned
        mask = _mask(reader, row, name, len(ids))
        labels = [n if kept else IGNORE_INDEX for n, kept in zip(labels, mask, strict=True)]
    # Padding is for the collator to add: tokens that a mask leaves out would be computed.
    seen = _mask(reader, row, "attention_mask", len(ids))
    return {
        "input_ids": [n for n, kept in zip(ids, seen, strict=True) if kept],
        "labels": [n for n, kept in zip(labels, seen, strict=True) if kept],
    }


def _labels(reader: RowReader, row: Mapping[str, Any], ids: list[int], size: int) -> list[int]:
    name = reader.column("labels")
    if row.get(name) is None:
        return list(ids)
    labels = _numbers(reader, row, "labels")
    if len(labels) != len(ids):
        raise RowError(name, f"has {len(labels)} labels for {len(ids)} tokens")
    outside = next((n for n in labels if n != IGNORE_INDEX and not 0 <= n < size), None)
    if outside is not None:
        raise RowError(name, f"has {outside}, which is no token and not {IGNORE_INDEX}")
    return labels


def _mask(reader: RowReader, row: Mapping[str, Any], name: str, size: int) -> list[bool]:
    """One truth value for each token; all of them true without a mask."""
    column = reader.column(name)
    value = row.get(column)
    if value is None:
        return [True] * size
    if not isinstance(value, list) or any(number not in (0, 1) for number in value):
        raise RowError(column, f"is {kind_of(value)}, not a list of 0 and 1")
    if len(value) != size:
        raise RowError(column, f"has {len(value)} entries for {size} tokens")
    return [bool(number) for number in value]


def _preference(reader: RowReader, row: Mapping[str, Any]) -> Encoded:
    pair = read_pair(reader, row)
    sides = (_answer(reader, row, pair, name) for name in ("chosen", "rejected"))
    return join_sides(reader, row, pair, *sides)


def _answer(reader: RowReader, row: Mapping[str, Any], pair: Pair, name: str) -> Encoded:
    """One answer of a pair behind its prompt, as a row of its own."""
    answer = getattr(pair, name)
    if isinstance(answer, str):
        input_ids, labels, _ = join_and_encode(reader.tokenizer, pair.prompt, answer)
        return {"input_ids": input_ids, "labels": labels}
    turns = [message["role"] for message in answer.messages[pair.num_context :]]
    # An answer of one turn is learned behind what generation will be prompted with. A score is
    # given to the conversation as the template writes it.
    alone = turns == ["assistant"] and reader.task != "reward"
    one = replace(reader, assistant_turns="last" if alone else "together")
    column = reader.column(name)
    return _conversation(one, row, answer, column, context=pair.num_context)[0]


def _numbers(reader: RowReader, row: Mapping[str, Any], name: str) -> list[int]:
    column = reader.column(name)
    value = row.get(column)
    if not isinstance(value, list) or any(type(number) is not int for number in value):
        raise RowError(column, f"is {kind_of(value)}, not a list of whole numbers")
    return value


_FORMATS: dict[str, Callable[[RowReader, Mapping[str, Any]], Encoded | list[Encoded]]] = {
    "chat": _chat,
    "prompt_completion": _prompt_completion,
    "instruction": _instruction,
    "question_answer": _question_answer,
    "text": _text,
    "classification": _classification,
    "seq2seq": _seq2seq,
    "preference": _preference,
    "tokens": _tokens,
}
