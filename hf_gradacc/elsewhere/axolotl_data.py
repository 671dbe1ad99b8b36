"""Axolotl's data sets: what each `type` is here, and where its rows lie."""

from __future__ import annotations

from typing import Any

from hf_gradacc.elsewhere.draft import Draft
from hf_gradacc.elsewhere.shared import IN_TURNS, Places, note_names_of_turns, put_template, to_list
from hf_gradacc.errors import ConfigError

__all__ = ["put_sources"]

_FILES = ("json", "csv", "parquet", "arrow", "text")
_READ = {
    "path", "name", "type", "ds_type", "data_files", "split", "revision", "field", "field_messages",
    "message_field_role", "message_field_content", "message_property_mappings", "chat_template",
    "roles_to_train", "train_on_eos", "conversation", "text_column", "trust_remote_code", "roles",
    "train_on_eot", "field_chosen", "field_rejected",
}  # fmt: skip
_EVERYONE = ["system", "user", "assistant"]


def put_sources(draft: Draft, places: Places) -> None:
    """Take the data sets, their formats and lengths.

    Raises:
        ConfigError: If the file names none.
    """
    is_pretraining = bool(draft.get("pretraining_dataset"))
    key = "pretraining_dataset" if is_pretraining else "datasets"
    written = draft.get(key)
    sets = [written] if isinstance(written, str | dict) else written
    if not sets:
        raise ConfigError("datasets is missing: a recipe needs rows.")
    sources = [
        source
        for index, one in enumerate(sets)
        for source in _sources(draft, places, f"{key}[{index}]", one, is_pretraining)
    ]
    _put(draft, "train", sources)
    if len(sources) > 1:
        draft.note(key, IN_TURNS, carried=True)
    held = draft.get("test_datasets")
    if held:
        _put(draft, "eval", [
            source
            for index, one in enumerate(held)
            for source in _sources(draft, places, f"test_datasets[{index}]", one, False)
        ])  # fmt: skip
    elif draft.get("val_set_size"):
        size = draft.number("val_set_size", 0)
        draft.put("data.holdout", int(size) if size > 1 else float(size))
    if is_pretraining or draft.get("streaming", False):
        draft.put("data.streaming", True)
    draft.put("data.max_length", draft.get("sequence_len", 512))
    if draft.get("excess_length_strategy") != "truncate" and not is_pretraining:
        draft.put("data.too_long", "drop")
    if draft.get("train_on_inputs", False):
        draft.put("data.roles_to_train", _EVERYONE)
        text = "all turns are learned; without a chat template only answers are"
        draft.note("train_on_inputs", text, carried=True)


def _put(draft: Draft, part: str, sources: list[dict[str, Any]]) -> None:
    """Set format and columns once where all sets share them, and for each set where not."""
    data = draft.values.setdefault("data", {})
    for name in ("format", "columns"):
        held = [source.get(name) for source in sources]
        if part == "train" and held[0] and all(other == held[0] for other in held):
            data[name] = held[0]
        if data.get(name) and all(other == data[name] for other in held):
            for source in sources:
                source.pop(name, None)
    for source in sources:
        if not source.get("columns") and not data.get("columns"):
            source.pop("columns", None)
    data[part] = sources if len(sources) > 1 else sources[0]


def _sources(
    draft: Draft, places: Places, key: str, one: Any, is_pretraining: bool
) -> list[dict[str, Any]]:
    """One set as sources of a recipe: one, or one for each of its files."""
    entry: dict[str, Any] = {"path": one} if isinstance(one, str) else dict(one)
    kind = entry.get("type") or ("pretrain" if is_pretraining else None)
    source: dict[str, Any] = dict(
        zip(("format", "columns"), _format(draft, key, kind, entry), strict=True)
    )
    for name in ("split", "revision", "name"):
        if entry.get(name):
            source[name] = entry[name]
    for name in entry:
        if name not in _READ and entry[name] is not None:
            draft.note(f"{key}.{name}", "no counterpart is known")
    files = to_list(entry.get("data_files") or [])
    path = str(entry.get("path") or "")
    if files and path not in _FILES:
        draft.note(f"{key}.data_files", "all files of the set are read: name those in data.train")
        files = []
    if files:
        source.pop("split", None)
    return [{"path": places.written(str(place)), **source} for place in files or [path]]


def _format(draft: Draft, key: str, kind: Any, entry: dict[str, Any]) -> tuple[str, dict[str, str]]:
    if draft.get("rl") or draft.get("reward_model", False):
        return "preference", _columns_of_pairs(draft, key, kind, entry)
    if isinstance(kind, dict):
        return _own_format(draft, key, kind)
    name, _, _ = str(kind).partition(":")
    name = name.partition(".")[0]
    if name in ("chat_template", "sharegpt"):
        default = "messages" if name == "chat_template" else "conversations"
        _note_turns(draft, key, entry)
        column = entry.get("field_messages") or default
        return "chat", {} if column == "messages" else {"messages": column}
    if name in ("completion", "pretrain"):
        column = entry.get("field") or entry.get("text_column") or "text"
        return "text", {} if column == "text" else {"text": column}
    if name in ("alpaca", "alpaca_w_system", "alpaca_chat"):
        draft.note(f"{key}.type", "instructions go through the chat template, if there is one, and "
                   "without Alpaca's preamble if not", carried=True)  # fmt: skip
        return "instruction", {}
    draft.note(f"{key}.type", "read as chat with `messages`: set data.format and data.columns")
    return "chat", {}


def _columns_of_pairs(draft: Draft, key: str, kind: Any, entry: dict[str, Any]) -> dict[str, str]:
    named = kind if isinstance(kind, dict) else entry
    theirs = {"prompt": "field_prompt", "chosen": "field_chosen", "rejected": "field_rejected"}
    if named is entry:
        theirs["prompt"] = "field_messages"
    if not any(named.get(name) for name in theirs.values()):
        draft.note(f"{key}.type", "pairs are read from `prompt`, `chosen` and `rejected`: set "
                   "data.columns if they have other names", carried=True)  # fmt: skip
    return {
        ours: str(named[name])
        for ours, name in theirs.items()
        if named.get(name) and named[name] != ours
    }


def _own_format(draft: Draft, key: str, kind: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """A set that names its columns itself."""
    names = {"field_instruction": "instruction", "field_input": "input", "field_output": "output"}
    names["field_system"] = "system"
    columns = {
        ours: str(kind[theirs])
        for theirs, ours in names.items()
        if kind.get(theirs) and kind[theirs] != ours
    }
    if kind.get("system_prompt"):
        draft.put("data.system", kind["system_prompt"])
    for name in kind:
        if name not in names and name != "system_prompt":
            text = "prompts are written by the chat template, or in Alpaca's words without one"
            draft.note(f"{key}.type.{name}", text)
    return "instruction", columns


def _note_turns(draft: Draft, key: str, entry: dict[str, Any]) -> None:
    names = dict(entry.get("message_property_mappings") or {})
    for ours in ("role", "content"):
        if entry.get(f"message_field_{ours}"):
            names[ours] = entry[f"message_field_{ours}"]
    note_names_of_turns(draft, key, names, role="role", content="content")
    if entry.get("roles_to_train"):
        known = {"human": "user", "gpt": "assistant", "model": "assistant"}
        roles = [known.get(role, role) for role in to_list(entry["roles_to_train"])]
        if set(roles) != {"assistant"}:
            draft.put("data.roles_to_train", list(dict.fromkeys(roles)))
    if entry.get("train_on_eos") not in (None, "turn", "last"):
        draft.note(f"{key}.train_on_eos", "the token that ends an answer is always learned")
    if entry.get("chat_template"):
        put_template(draft, f"{key}.chat_template", str(entry["chat_template"]))
    roles_of = entry.get("roles")
    if isinstance(roles_of, dict):
        usual = {"human", "user", "gpt", "assistant", "system", "tool", "model", "chatgpt"}
        strange = sorted({str(role) for given in roles_of.values() for role in to_list(given)})
        if set(strange) - usual:
            draft.note(f"{key}.roles", "turns of other roles are errors: rename them in the rows")
