"""Pairs of a chosen and a rejected answer, as TRL's trainers of preferences take them.

Prompt and answers are texts or lists of turns. Without a `prompt`, or where the lists begin with
its turns, the prompt is what both answers begin with, as in TRL. A prompt that is a text before
answers that are turns is what the user said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hf_gradacc.data.messages import Dialogue, read_dialogue, read_turns, role_of
from hf_gradacc.data.reader import Encoded, RowError, RowReader, kind_of
from hf_gradacc.text import common_length
from hf_gradacc.updates.targets import IGNORE_INDEX

__all__ = ["Pair", "join_sides", "read_pair"]


@dataclass(frozen=True)
class Pair:
    """The two answers of a row.

    Attributes:
        prompt: What both answer, where answers are texts.
        chosen: The better answer: a text, or the whole conversation that ends with it.
        rejected: The other one.
        num_context: Turns that both conversations begin with.
    """

    prompt: str
    chosen: str | Dialogue
    rejected: str | Dialogue
    num_context: int = 0


def read_pair(reader: RowReader, row: Mapping[str, Any]) -> Pair:
    """Read a row of format `preference`.

    Raises:
        RowError: If an answer is missing or malformed, or the two do not belong to one prompt.
    """
    prompt, *answers = (
        read_turns(row.get(reader.column(n))) for n in ("prompt", "chosen", "rejected")
    )
    if not any(isinstance(answer, list) for answer in answers):
        if isinstance(prompt, list):
            column = reader.column("chosen")
            raise RowError(column, f"is {kind_of(answers[0])} behind a prompt of turns")
        chosen, rejected = (reader.text(row, name) for name in ("chosen", "rejected"))
        prompt = reader.text(row, "prompt", optional=True)
        if not prompt:
            # A blank before a word is a part of its token in most vocabularies.
            prompt = chosen[: common_length(chosen, rejected)].removesuffix(" ")
            chosen, rejected = (text[len(prompt) :] for text in (chosen, rejected))
        return Pair(prompt, chosen, rejected)
    sides = [_read_side(reader, row, name, prompt) for name in ("chosen", "rejected")]
    turns = [side.messages for side in sides]
    column = reader.column("rejected")
    shared = next((n for n, (a, b) in enumerate(zip(*turns, strict=False)) if a != b), None)
    if shared is None:  # the same answer twice, or one that only goes on
        shared = min(map(len, turns)) - 1
    # The turn before an answer is never the assistant's: an answer that both begin with is theirs.
    while shared and turns[0][shared - 1]["role"] == "assistant":
        shared -= 1
    if shared == 0:
        raise RowError(column, "begins otherwise than the chosen answer, so they have no prompt")
    return Pair("", sides[0], sides[1], shared)


def _read_side(reader: RowReader, row: Mapping[str, Any], name: str, prompt: Any) -> Dialogue:
    """The conversation that ends with one of the answers."""
    column = reader.column(name)
    answer = read_turns(row.get(column))
    if not isinstance(answer, list):
        raise RowError(column, f"is {kind_of(answer)}, and the other answer a list of turns")
    if not answer:
        raise RowError(column, "is a list without a turn, so there is nothing to learn")
    before: list[Any] = []
    if isinstance(prompt, list):
        before = [] if answer[: len(prompt)] == prompt else prompt
    elif isinstance(prompt, str) and prompt and _is_answer_alone(answer):
        before = [{"role": "user", "content": prompt}]
    inner = replace(reader, columns={**reader.columns, "messages": column})
    side = read_dialogue(inner, {**row, column: [*before, *answer]})
    if isinstance(prompt, str) and name == "chosen":
        said = any(prompt.strip() in str(turn["content"]) for turn in side.messages)
        reader.notes["other_prompt"] += not said
    return side


def _is_answer_alone(turns: list[Any]) -> bool:
    """Whether a list holds no turn that the answer replies to."""
    return role_of(turns[0]) == "assistant"


def join_sides(
    reader: RowReader, row: Mapping[str, Any], pair: Pair, chosen: Encoded, rejected: Encoded
) -> Encoded:
    """Join two answers, each encoded behind its prompt, to the row of a pair.

    Returns:
        `prompt_ids`, `chosen_ids`, `rejected_ids` for `dpo`: an answer begins where the tokens of
        the two differ at the latest, and ends with its last target. For `reward` two whole
        sequences, and the `margin` by which the first is better, if the row has one. Of answers
        that are the same all ids are empty: there is nothing to learn.
    """
    sides = [chosen["input_ids"], rejected["input_ids"]]
    if sides[0] == sides[1]:
        reader.notes["same_answers"] += 1
        empty: Encoded = {"chosen_ids": [], "rejected_ids": []}
        return empty if reader.task == "reward" else {"prompt_ids": [], **empty}
    if reader.task == "reward":
        return {"chosen_ids": sides[0], "rejected_ids": sides[1], **_margin(reader, row)}
    start = min(common_length(*sides), *(_first_target(side) for side in (chosen, rejected)))
    if isinstance(pair.chosen, Dialogue) and isinstance(pair.rejected, Dialogue):
        counts = [len(side.messages) - pair.num_context for side in (pair.chosen, pair.rejected)]
        reader.notes["long_answers"] += max(counts) > 1
    ends = [_last_target(side) for side in (chosen, rejected)]
    return {
        "prompt_ids": sides[0][:start],
        "chosen_ids": sides[0][start : ends[0]],
        "rejected_ids": sides[1][start : ends[1]],
    }


def _first_target(encoded: Encoded) -> int:
    labels = encoded["labels"]
    return next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))


def _last_target(encoded: Encoded) -> int:
    """Where the answer ends; what the template writes behind its last token is no part of it."""
    labels = encoded["labels"]
    places = (i for i in range(len(labels), 0, -1) if labels[i - 1] != IGNORE_INDEX)
    return next(places, 0)


def _margin(reader: RowReader, row: Mapping[str, Any]) -> dict[str, float]:
    column = reader.column("margin")
    if column not in row:
        return {}
    value = row[column]
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise RowError(column, f"is {kind_of(value)}, not a number")
    return {"margin": float(value)}
