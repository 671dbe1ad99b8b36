"""Load rows from the hub or from local files, and say where a bad row stands."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from hf_gradacc.errors import DataError
from hf_gradacc.recipe_data import SourceSection

__all__ = ["explain_failure", "load_source", "local_files", "locate_row"]

_LOADERS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}

# Local files are one split, which datasets calls train; a slice of it may be asked for.
_SLICE = re.compile(r"train\[.*\]")


def load_source(source: SourceSection, *, streaming: bool = False) -> Any:
    """Load one source.

    Returns:
        A `datasets.Dataset`, or an `IterableDataset` where streaming.

    Raises:
        DataError: If there is no such source, a file cannot be read (naming file and line), or
            there are no rows.
    """
    import datasets

    files = local_files(source.path)
    if not files and Path(source.path).is_dir() and Path(source.path).is_absolute():
        raise DataError(
            f"{source.path} holds no data files: name a folder with {', '.join(_LOADERS)} files."
        )
    try:
        if files and Path(source.path).is_dir() and (Path(source.path) / "state.json").is_file():
            loaded = datasets.load_from_disk(source.path)
            return loaded.to_iterable_dataset() if streaming else loaded
        if files:
            loader = _loader(source, files)
            options: dict[str, Any] = {"sep": "\t"} if files[0].suffix == ".tsv" else {}
            loaded = datasets.load_dataset(
                loader,
                data_files={"train": [str(file) for file in files]},
                split=source.split if _SLICE.fullmatch(source.split) else "train",
                streaming=streaming,
                **options,
            )
        else:
            loaded = datasets.load_dataset(
                source.path,
                source.name,
                split=source.split,
                revision=source.revision,
                streaming=streaming,
            )
    except DataError:
        raise
    except Exception as error:  # datasets wraps whatever its readers raise
        explain_failure(source, error)
    if not streaming and len(loaded) == 0:
        raise DataError(f"{source.path} has no rows: name a file that has some.")
    return loaded


def local_files(path: str) -> list[Path]:
    """The data files a local path stands for, sorted; none for a hub name."""
    place = Path(path)
    if place.is_dir():
        return sorted(f for f in place.rglob("*") if f.suffix in _LOADERS and f.is_file())
    if place.is_file():
        return [place]
    anchor = Path(place.anchor or ".")
    pattern = str(place.relative_to(anchor)) if place.anchor else path
    return sorted(anchor.glob(pattern)) if any(letter in path for letter in "*?[") else []


def _loader(source: SourceSection, files: list[Path]) -> str:
    suffixes = {file.suffix for file in files}
    kinds = {_LOADERS.get(suffix, "") for suffix in suffixes}
    if len(kinds) != 1 or "" in kinds:
        raise DataError(
            f"{source.path} holds files of type {', '.join(sorted(suffixes))}: "
            f"use one of {', '.join(_LOADERS)} per source, and list several sources to mix them."
        )
    return kinds.pop()


def explain_failure(source: SourceSection, error: Exception) -> NoReturn:
    """Turn a reader's failure into one sentence with file and line.

    Raises:
        DataError: Always.
    """
    files = local_files(source.path)
    for file in files:
        for place, why in _faults(file):
            raise DataError(f"{place}: {why}") from None
    if "corresponds to no data" in str(error):
        raise DataError(f"{source.path} has no rows: name a file that has some.") from None
    root = error
    while root.__cause__ is not None and isinstance(root.__cause__, Exception):
        root = root.__cause__
    why = str(root).strip().splitlines()[0] if str(root).strip() else type(root).__name__
    fix = (
        "check the file"
        if files
        else (
            "check the name and split, that you are online or have it cached "
            "(HF_HUB_OFFLINE), and `hf auth login` for gated sets"
        )
    )
    raise DataError(f"{source.path} cannot be read ({why}): {fix}.") from error


def _faults(file: Path) -> Iterator[tuple[str, str]]:
    """Read a text file slowly, and yield what is wrong with it."""
    if file.stat().st_size == 0:
        yield str(file), "the file is empty"
        return
    if file.suffix not in (".json", ".jsonl", ".csv", ".tsv", ".txt", ".text", ".md"):
        return
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = file.read_bytes()[: error.start].count(b"\n") + 1
        yield f"{file}:{line}", f"byte {error.start} is not UTF-8; save the file as UTF-8"
        return
    if not text.strip():
        yield str(file), "the file is empty"
    if file.suffix not in (".json", ".jsonl"):
        return
    if text.lstrip().startswith("["):
        yield from _array_faults(file, text)
        return
    first: dict[str, tuple[str, int]] = {}
    for number, content in enumerate(text.splitlines(), start=1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except json.JSONDecodeError as error:
            yield f"{file}:{number}:{error.colno}", f"not a JSON object: {error.msg}"
            return
        if not isinstance(row, dict):
            yield f"{file}:{number}", f"a row is a JSON object, not {_kind(row)}"
            return
        for column, value in row.items():
            if value is None:
                continue
            kind, seen = first.setdefault(column, (_kind(value), number))
            if kind != _kind(value):
                where = f"{file}:{number}: column {column!r}"
                yield where, f"is {_kind(value)}, but {kind} in line {seen}; use one type"
                return


def _array_faults(file: Path, text: str) -> Iterator[tuple[str, str]]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        yield f"{file}:{error.lineno}:{error.colno}", f"not JSON: {error.msg}"
        return
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            yield f"{file}: row {number}", f"a row is a JSON object, not {_kind(row)}"
            return


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def locate_row(source: SourceSection, index: int) -> str:
    """Where row `index` of a source stands: `file:line` for text formats, else its number.

    Reads the files again, so it is for error messages.
    """
    if not _SLICE.fullmatch(source.split) and not (Path(source.path) / "state.json").is_file():
        for file in local_files(source.path):
            lines = _row_lines(file)
            if lines is None:
                break
            if index < len(lines):
                return f"{file}:{lines[index]}"
            index -= len(lines)
    split = "" if local_files(source.path) else f" ({source.split})"
    return f"{source.path}{split}: row {index + 1}"


def _row_lines(file: Path) -> list[int] | None:
    """The line each row of a file starts on; None where rows do not stand on lines."""
    if file.suffix in (".csv", ".tsv"):
        with file.open(newline="", encoding="utf-8") as handle:
            reader = csv.reader(handle, delimiter="\t" if file.suffix == ".tsv" else ",")
            next(reader, None)
            starts, line = [], reader.line_num + 1
            for row in reader:
                if row:
                    starts.append(line)
                line = reader.line_num + 1
            return starts
    if file.suffix in (".txt", ".text", ".md"):
        return list(range(1, file.read_text(encoding="utf-8").count("\n") + 2))
    if file.suffix in (".json", ".jsonl"):
        text = file.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            return None
        return [n for n, line in enumerate(text.splitlines(), start=1) if line.strip()]
    return None
