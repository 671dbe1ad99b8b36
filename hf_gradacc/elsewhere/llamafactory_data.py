"""LLaMA-Factory's data sets: names that its `dataset_info.json` explains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_gradacc.elsewhere.draft import Draft
from hf_gradacc.elsewhere.reading import read_file
from hf_gradacc.elsewhere.shared import IN_TURNS, Places, note_names_of_turns, to_list
from hf_gradacc.errors import ConfigError

__all__ = ["put_sources"]

_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "system": "system",
            "history": "history"}  # fmt: skip
_USUAL = {"user_tag": "human", "assistant_tag": "gpt", "system_tag": "system",
          "observation_tag": "observation", "function_tag": "function_call"}  # fmt: skip


def put_sources(draft: Draft, places: Places, stage: str) -> None:
    """Take the data sets, their formats and lengths.

    Raises:
        ConfigError: If the file names none.
    """
    names = to_list(draft.get("dataset", []))
    if not names:
        raise ConfigError("dataset is missing: a recipe needs rows.")
    folder = str(draft.get("dataset_dir", "data"))
    info = read_file(places, f"{folder}/dataset_info.json")
    if info is None:
        text = f"{folder}/dataset_info.json is not here: write where the rows lie and their format"
        draft.note("dataset", text)
    sources = [_source(draft, places, name, info, folder, stage) for name in names]
    data = draft.values.setdefault("data", {})
    formats = {source["format"] for source in sources}
    if len(formats) == 1:
        data["format"] = formats.pop()
        for source in sources:
            source.pop("format")
    _mix(draft, sources)
    data["train"] = sources if len(sources) > 1 else sources[0]
    held = [
        _source(draft, places, name, info, folder, stage)
        for name in to_list(draft.get("eval_dataset", []))
    ]
    if held:
        data["eval"] = held
    elif draft.get("val_size", 0):
        size = draft.number("val_size", 0)
        draft.put("data.holdout", int(size) if size > 1 else float(size))
    draft.put("data.max_length", draft.get("cutoff_len", 2048))
    if draft.get("train_on_prompt", False):
        draft.put("data.roles_to_train", ["system", "user", "assistant"])
        text = "all turns are learned; without a chat template only answers are"
        draft.note("train_on_prompt", text, carried=True)
    if draft.get("mask_history", False):
        draft.put("data.assistant_turns", "last")


def _mix(draft: Draft, sources: list[dict[str, Any]]) -> None:
    if len(sources) < 2:
        return
    strategy = draft.get("mix_strategy", "concat")
    if strategy == "concat":
        draft.note("dataset", IN_TURNS, carried=True)
    draft.put("data.mix", "first_exhausted" if strategy == "interleave_under" else "all_exhausted")
    shares = to_list(draft.get("interleave_probs", []))
    for source, share in zip(sources, shares, strict=False):
        source["weight"] = float(share)


def _source(
    draft: Draft,
    places: Places,
    name: str,
    info: dict[str, Any] | None,
    folder: str,
    stage: str,
) -> dict[str, Any]:
    entry = (info or {}).get(name)
    if not isinstance(entry, dict):
        if info is not None:
            draft.note("dataset", f"{name} is not in dataset_info.json: write where its rows lie")
        format = "text" if stage == "pt" else "preference" if stage in ("dpo", "rm") else "chat"
        return {"path": name, "format": format}
    path = entry.get("hf_hub_url") or entry.get("file_name")
    if path is None:
        draft.note("dataset", f"{name} is neither on the hub nor a file: write where its rows lie")
        path = name
    elif "hf_hub_url" not in entry:
        path = places.written(str(Path(folder) / path))
    source: dict[str, Any] = {"path": path}
    if entry.get("subset"):
        source["name"] = entry["subset"]
    split = entry.get("split", "train")
    limits = [n for n in (draft.get("max_samples"), entry.get("num_samples")) if n is not None]
    if limits and not draft.get("streaming", False):
        source["split"] = f"{split}[:{min(limits)}]"
    elif split != "train":
        source["split"] = split
    return {**source, **_format(draft, name, entry, stage)}


def _format(draft: Draft, name: str, entry: dict[str, Any], stage: str) -> dict[str, Any]:
    columns, tags = dict(entry.get("columns") or {}), dict(entry.get("tags") or {})
    for kind in ("images", "videos", "audios"):
        if columns.pop(kind, None):
            draft.note("dataset", f"{name} has {kind}, which are not read: only text is")
    if stage in ("dpo", "rm") or entry.get("ranking"):
        names = {"prompt": columns.get("prompt", "instruction")}
        names |= {part: columns.get(part, part) for part in ("chosen", "rejected")}
        draft.note("dataset", f"the pairs of {name} are in the columns {', '.join(names.values())}",
                   carried=True)  # fmt: skip
        return {"format": "preference", **_renamed(names)}
    if stage == "pt":
        return {"format": "text", **_renamed({"text": columns.get("prompt", "text")})}
    if entry.get("formatting") == "sharegpt":
        note_names_of_turns(draft, "dataset", tags, role="role_tag", content="content_tag")
        strange = [k for k, usual in _USUAL.items() if tags.get(k, usual) not in _roles(usual)]
        if strange:
            text = f"{name} has roles of its own ({strange[0]}): rename them in the rows"
            draft.note("dataset", text)
        column = columns.get("messages", "conversations")
        kept = {key: columns[key] for key in ("system", "tools") if columns.get(key)}
        return {"format": "chat", **_renamed({"messages": column, **kept})}
    return {
        "format": "instruction",
        **_renamed({ours: columns[key] for key, ours in _COLUMNS.items() if columns.get(key)}),
    }


def _roles(usual: str) -> tuple[str, ...]:
    return (usual, {"human": "user", "gpt": "assistant"}.get(usual, usual))


def _renamed(columns: dict[str, str]) -> dict[str, Any]:
    """The columns that have another name than the format's."""
    renamed = {ours: theirs for ours, theirs in columns.items() if ours != theirs}
    return {"columns": renamed} if renamed else {}
