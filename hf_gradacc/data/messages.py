"""Read the turns of a conversation from a row, in whatever words the row has for them.

OpenAI's `messages`, ShareGPT's `from` and `value`, Alpaca's `history`; marks by which a row says
that a turn is not to be learned; tools and their calls.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_gradacc.data.reader import RowError, RowReader, kind_of, read_json
from hf_gradacc.text import nearest

__all__ = ["Dialogue", "past_turns", "read_dialogue", "read_turns", "role_of", "system_of"]

_ROLES = {
    *("system", "developer", "user", "assistant"),
    *("tool", "function", "ipython", "environment", "observation"),
    *("context", "document", "documents"),
}
_OTHER_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
_OTHER_ROLES |= {"model": "assistant", "function_call": "assistant"}
_OTHER_ROLES |= {"ai": "assistant", "chatbot": "assistant"}

MARKS = ("weight", "train", "training", "trainable", "loss", "loss_mask")
"""What rows call the mark of a turn: OpenAI's `weight`, Axolotl's `train` and `training`, `loss` of
ms-swift, `loss_mask` of others. 0 and false mean that the turn is not learned."""


@dataclass(frozen=True)
class Dialogue:
    """The turns of a row.

    Attributes:
        messages: Turns `{"role": ..., "content": ...}` without their marks.
        marks: What each turn says of itself: to be learned or not, or None.
        tools: The tools it may call.
    """

    messages: list[dict[str, Any]]
    marks: list[bool | None]
    tools: list[Any]


def read_dialogue(reader: RowReader, row: Mapping[str, Any]) -> Dialogue:
    """Read a row of format `chat`.

    Raises:
        RowError: If a turn is malformed; it names the turn.
    """
    column = reader.column("messages")
    turns = read_turns(row.get(column))
    if turns is None:
        raise RowError(column, "is null" if column in row else "is missing")
    if not isinstance(turns, list):
        raise RowError(column, f"is {kind_of(turns)}, not a list of turns")
    if not turns:
        raise RowError(column, "is an empty list, not a list of turns")
    tools = _tools(reader.column("tools"), row)
    required = _required_arguments(tools)
    messages, marks = [], []
    for number, turn in enumerate(turns, start=1):
        message = _turn(column, number, turn, required)
        marks.append(_mark(column, number, message))
        messages.append(message)
    system = system_of(reader, row)
    own = messages[0]["content"] if messages[0]["role"] in ("system", "developer") else None
    if own is None and system is not None:
        messages.insert(0, {"role": "system", "content": system})
        marks.insert(0, None)
    elif own is not None and _own_system(reader, row) not in (None, own):
        raise RowError(
            reader.column("system"),
            f"says another system turn than the first turn of {column!r}; leave out one of them",
        )
    return Dialogue(messages, marks, tools)


def read_turns(value: Any) -> Any:
    """The turns in a cell that may hold them in another form than a list.

    As JSON text, which a csv has no other way to write; as one turn alone, as LLaMA-Factory's
    answers of a pair; as an object of lists, which older releases of `datasets` made of a list of
    objects.

    Returns:
        A list of turns; any other value as it is.

    >>> read_turns({"role": ["user"], "content": ["2+2?"]})
    [{'role': 'user', 'content': '2+2?'}]
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            written = read_turns(json.loads(value))
        except ValueError:  # a text that begins with a bracket
            return value
        is_turns = isinstance(written, list) and bool(written) and all(map(_says, written))
        return written if is_turns else value
    if not isinstance(value, Mapping):
        return value
    if role_of(value):
        return [value]
    names = [name for name, cells in value.items() if isinstance(cells, list)]
    if not {"role", "from"} & set(names) or len({len(value[name]) for name in names}) > 1:
        return value
    return [
        dict(zip(names, cells, strict=True)) for cells in zip(*map(value.get, names), strict=True)
    ]


def _says(turn: Any) -> bool:
    """Whether JSON is a turn, and not an answer in JSON: `{"from": "Rome", "to": "Bern"}`."""
    if not role_of(turn):
        return False
    written = [turn[name] for name in ("content", "value") if name in turn]
    return "tool_calls" in turn or any(isinstance(it, str | list | None) for it in written)


def role_of(turn: Any) -> str:
    """Who speaks in a turn, in the words of chat templates; empty if it does not say."""
    written = turn.get("role", turn.get("from")) if isinstance(turn, Mapping) else None
    if not isinstance(written, str):
        return ""
    role = written.strip().lower()
    return _OTHER_ROLES.get(role, role)


def system_of(reader: RowReader, row: Mapping[str, Any]) -> str | None:
    """The system turn of a row: its own column's, or the recipe's; None without."""
    return _own_system(reader, row) or reader.system


def _own_system(reader: RowReader, row: Mapping[str, Any]) -> str | None:
    return reader.text(row, "system", optional=True) or None


def past_turns(reader: RowReader, row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The questions and answers in Alpaca's `history`, oldest first.

    Raises:
        RowError: If it is not a list of pairs of texts.
    """
    column = reader.column("history")
    history = read_json(column, row.get(column), empty="[]")
    pairs = []
    for number, pair in enumerate(history or [], start=1):
        whole = isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2
        if not whole or not all(isinstance(text, str) for text in pair):
            raise RowError(column, f"has no question and answer as pair {number}")
        pairs.append((pair[0], pair[1]))
    return pairs


def _turn(column: str, number: int, turn: Any, required: Mapping[str, set[str]]) -> dict[str, Any]:
    """Check one turn; `from` and `value` of ShareGPT files are read as `role` and `content`."""
    if not isinstance(turn, Mapping):
        raise RowError(column, f"has {kind_of(turn)} as turn {number}, not a role and its content")
    written, role = turn.get("role", turn.get("from")), role_of(turn)
    content = turn.get("content", turn.get("value"))
    if not role:
        raise RowError(column, f"has no role in turn {number}")
    if role not in _ROLES:  # `assistent` would be rendered, and never learned
        guess = nearest(role, [*_ROLES, *_OTHER_ROLES])
        hint = f"did you mean {guess}?" if guess else f"use one of {', '.join(sorted(_ROLES))}"
        raise RowError(column, f"has the unknown role {written!r} in turn {number}; {hint}")
    rest = {k: v for k, v in turn.items() if k not in ("role", "content", "from", "value")}
    calls = rest.pop("tool_calls", None)
    rest = _without_nulls(rest)
    older = rest.pop("function_call", None)  # OpenAI's name for a single call
    calls = calls or ([{"type": "function", "function": older}] if older else None)
    if calls:
        rest["tool_calls"] = [_call(column, number, call, required) for call in calls]
    if written == "function_call":  # ShareGPT writes a call as the text of a turn of its own
        rest["tool_calls"], content = [_written_call(column, number, content)], ""
    content = _text_of(column, number, content)
    if content is None and not rest.get("tool_calls"):
        raise RowError(column, f"has null as content of turn {number}, not text")
    return {"role": role, "content": content or "", **rest}


def _text_of(column: str, number: int, content: Any) -> str | None:
    """The text of a turn, which may be a list of pieces of text."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowError(column, f"has {kind_of(content)} as content of turn {number}, not text")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else kind_of(part)
            raise RowError(
                column, f"has a part of type {kind!r} in turn {number}; only text can be learned"
            )
        texts.append(text)
    return "".join(texts)


def _mark(column: str, number: int, message: dict[str, Any]) -> bool | None:
    """Take out of a turn what says whether it is learned.

    Raises:
        RowError: If two marks differ, or one is neither yes nor no.
    """
    found: dict[str, bool] = {}
    for name in MARKS:
        if name not in message:
            continue
        value = message.pop(name)
        number_like = isinstance(value, int | float) and value in (0, 1)
        word = str(value).strip().lower()
        if not number_like and word not in ("0", "1", "true", "false"):
            raise RowError(
                column,
                f"has {name} = {value!r} in turn {number}; a turn is learned (1, true) or not (0, "
                "false)",
            )
        found[name] = bool(value) if number_like else word in ("1", "true")
    if "train_detail" in message:
        raise RowError(
            column,
            f"has train_detail in turn {number}, which marks parts of a turn: mark whole turns "
            "with train: true or false",
        )
    if len(set(found.values())) > 1:
        marks = ", ".join(f"{name} = {value}" for name, value in found.items())
        raise RowError(column, f"contradicts itself in turn {number} ({marks})")
    return next(iter(found.values()), None)


def _tools(column: str, row: Mapping[str, Any]) -> list[Any]:
    """The tools a conversation may call: a list, or JSON text of one, as on the hub."""
    tools = read_json(column, row.get(column), empty="[]")
    if not isinstance(tools, list | None):
        raise RowError(column, f"is {kind_of(tools)}, not a list of tools")
    return [_without_nulls(tool) for tool in tools or []]


def _required_arguments(tools: Sequence[Any]) -> dict[str, set[str]]:
    """The arguments that a call of each tool must name."""
    found = {}
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else {}
        parameters = function.get("parameters")
        required = parameters.get("required") if isinstance(parameters, Mapping) else None
        found[str(function.get("name"))] = set(required or [])
    return found


def _call(column: str, number: int, call: Any, required: Mapping[str, set[str]]) -> dict[str, Any]:
    """A tool call, with the nulls that its tool asks for and without those that Arrow fills in."""
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise RowError(column, f"has a tool call without a name in turn {number}")
    arguments = inner.get("arguments")
    kept = _without_nulls(call)
    if isinstance(arguments, Mapping):
        asked = required.get(inner["name"], set())
        nulls = {k: None for k, v in arguments.items() if v is None and k in asked}
        target = kept.get("function", kept)
        ordered = {**_without_nulls(arguments), **nulls}
        target["arguments"] = {k: ordered[k] for k in arguments if k in ordered}
    return dict(kept)


def _written_call(column: str, number: int, text: Any) -> dict[str, Any]:
    try:
        call = json.loads(text)
        return {"type": "function", "function": {"name": call["name"], **call}}
    except (TypeError, ValueError, KeyError):
        raise RowError(
            column, f"has no JSON of a name and arguments in turn {number}, a function_call"
        ) from None


def _without_nulls(value: Any) -> Any:
    """Drop the nulls that Arrow fills in: it gives all rows the keys of any, at every depth."""
    if isinstance(value, Mapping):
        return {k: _without_nulls(inner) for k, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
