"""Find where a bad row or a broken file is wrong: file, line and column.

Everything here reads files again, slowly, and only once something has gone wrong.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hf_gradacc.data.files import LOADERS, ending_of, is_saved, local_files, open_bytes
from hf_gradacc.data.section import SourceSection
from hf_gradacc.errors import DataError

__all__ = ["explain_failure", "find_nested_rows", "locate_row"]

Fault = tuple[str, str]
"""A place, such as `rows.jsonl:17`, and what is wrong there."""


def explain_failure(sources: Sequence[SourceSection], error: Exception) -> NoReturn:
    """Turn a reader's failure into one sentence with file, line and column.

    Args:
        sources: Those that may be at fault.
        error: What the reader raised.

    Raises:
        DataError: Always.
    """
    files = [file for source in sources for file in local_files(source)]
    columns: dict[str, list[str]] = {}
    for file in files:
        if nested := find_nested_rows(file, over_lines=True):  # in one line it may be a row
            raise DataError(nested) from None
        for place, why in _faults(file, columns.setdefault(ending_of(file), [])):
            raise DataError(f"{place}: {why}.") from None
    path = ", ".join(source.path for source in sources)
    if "corresponds to no data" in str(error):
        raise DataError(f"{path} has no rows: name a file that has some.") from None
    root = error
    while root.__cause__ is not None and isinstance(root.__cause__, Exception):
        root = root.__cause__
    why = " ".join(str(root).split())[:300] or type(root).__name__
    fix = (
        "check the file"
        if files
        else (
            "check the name and split, that you are online or have it cached "
            "(HF_HUB_OFFLINE), and `hf auth login` for gated sets"
        )
    )
    raise DataError(f"{path} cannot be read ({why}): {fix}.") from error


def find_nested_rows(file: Path, *, over_lines: bool = False) -> str | None:
    """Say that the rows of a JSON file lie under a key of one object; None if they do not.

    Turns of a conversation are no rows: an object of them is a row itself.

    Args:
        file: Any data file.
        over_lines: Only of an object that goes over several lines.
    """
    if _loader(file) != "json":
        return None
    try:
        text = _content(file).decode("utf-8-sig")
        whole = json.loads(text) if not over_lines or "\n" in text.strip() else None
    except (DataError, OSError, ValueError, RecursionError):
        return None  # several rows, or a fault that others find
    if not isinstance(whole, dict):
        return None
    lists = {key: value for key, value in whole.items() if value and isinstance(value, list)}
    names = [
        key
        for key, value in lists.items()
        if all(isinstance(row, dict) and not _OF_TURNS & set(row) for row in value)
    ]
    if not names:
        return None
    keys = " and ".join(map(repr, names))
    command = f"jq -c '.[{json.dumps(names[0])}][]' {file.name} > rows.jsonl"
    return (
        f"{file}: is one JSON object, and rows lie in it under {keys}: write those rows alone into "
        f"a file, as a list or one a line (`{command}`)."
    )


_OF_TURNS = {"role", "from", "content"}


def _faults(file: Path, columns: list[str]) -> Iterator[Fault]:
    """What is wrong with a file; `columns` are those of the files before, and are filled in."""
    if file.stat().st_size == 0:
        yield str(file), "the file is empty"
    elif _loader(file) == "parquet":
        yield from _parquet_faults(file, columns)
    elif _loader(file) in ("text", "json", "csv"):
        yield from _text_faults(file, columns)


def _text_faults(file: Path, columns: list[str]) -> Iterator[Fault]:
    content = _content(file)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        yield f"{file}:{line}", f"byte {error.start} is not UTF-8; save the file as UTF-8"
        return
    if not text.strip():
        yield str(file), "the file is empty"
    elif _loader(file) == "csv":
        yield from _csv_faults(file)
    elif _loader(file) == "json":
        yield from _json_faults(file, text, columns)


def _loader(file: Path) -> str:
    return LOADERS.get(ending_of(file), "")


def _content(file: Path) -> bytes:
    with open_bytes(file) as handle:
        return handle.read()


def _json_faults(file: Path, text: str, columns: list[str]) -> Iterator[Fault]:
    is_array = text.lstrip().startswith("[")
    first: dict[str, tuple[str, int]] = {}
    try:
        for line, row in _array_rows(text) if is_array else _line_rows(text):
            if not isinstance(row, _Pairs):
                yield f"{file}:{line}", f"a row is a JSON object, not {_kind(row)}"
                return
            for column, value in row:
                why = _value_fault(column, value, row, columns)
                kind, seen = first.setdefault(column, (_kind(value), line))
                if kind == "null":
                    first[column] = (_kind(value), line)
                elif value is not None and kind != _kind(value):
                    why = why or f"is {_kind(value)}, but {kind} in line {seen}; use one type"
                if why:
                    yield f"{file}:{line}", f"column {column!r} {why}"
                    return
        columns[:] = columns or first
    except json.JSONDecodeError as error:
        yield f"{file}:{error.lineno}:{error.colno}", f"not a JSON object: {error.msg}"
    except RecursionError:
        yield str(file), "is nested too deeply to be rows"
    except ValueError as error:  # a number of thousands of digits
        yield str(file), " ".join(str(error).split())


def _value_fault(column: str, value: Any, row: list[tuple[str, Any]], known: list[str]) -> str:
    if sum(name == column for name, _ in row) > 1:
        return "appears twice; rename one of them"
    if _holds_surrogate(value):
        return "has half a surrogate pair, which is no character; remove it"
    return (
        f"is not in the file before ({', '.join(known)})" if known and column not in known else ""
    )


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as it is written, with keys that stand in it twice."""


_DECODER = json.JSONDecoder(object_pairs_hook=_Pairs)


def _line_rows(text: str) -> Iterator[tuple[int, Any]]:
    # Not `splitlines`: text in JSON may hold other line separators, such as U+2028.
    for line, content in enumerate(text.split("\n"), start=1):
        if content.strip():
            try:
                row = _DECODER.decode(content)
            except json.JSONDecodeError as error:
                error.lineno = line
                raise
            yield line, row


def _array_rows(text: str) -> Iterator[tuple[int, Any]]:
    """The rows of a JSON array, and the line each begins on."""
    place, line, seen = text.index("[") + 1, 1, 0
    while True:
        while place < len(text) and text[place] in " \t\r\n,":
            place += 1
        if text[place : place + 1] == "]":
            return
        line, seen = line + text.count("\n", seen, place), place
        row, place = _DECODER.raw_decode(text, place)
        yield line, row


def _holds_surrogate(value: Any) -> bool:
    if isinstance(value, str):
        return any("\ud800" <= letter <= "\udfff" for letter in value)
    parts = [part for pair in value for part in pair] if isinstance(value, _Pairs) else value
    return isinstance(parts, list) and any(_holds_surrogate(part) for part in parts)


def _kind(value: Any) -> str:
    names = {_Pairs: "an object", list: "a list", str: "text", bool: "a boolean"}
    return names.get(type(value), "null" if value is None else "a number")


def _csv_faults(file: Path) -> Iterator[Fault]:
    rows = _csv_rows(file, strict=True)
    _, header = next(rows, (1, []))
    for line, row in rows:
        if isinstance(row, str):
            yield f"{file}:{line}", f"is not a row of a csv ({row}); close its quotes"
        elif len(row) > len(header):
            many = f"has {len(row)} cells, and the header {len(header)} columns"
            yield f"{file}:{line}", f"{many}; quote cells that hold the separator"


def _csv_rows(file: Path, *, strict: bool = False) -> Iterator[tuple[int, list[str] | str]]:
    """The rows of a csv that are not blank, and the line each begins on; or what is wrong."""
    csv.field_size_limit(sys.maxsize)
    with open_bytes(file) as handle:
        separator = "\t" if ending_of(file) == ".tsv" else ","
        text = io.TextIOWrapper(handle, newline="", encoding="utf-8-sig")
        reader = csv.reader(text, delimiter=separator, strict=strict)
        line = 1
        try:
            for row in reader:
                if row:
                    yield line, row
                line = reader.line_num + 1
        except csv.Error as error:
            yield line, str(error)


def _parquet_faults(file: Path, columns: list[str]) -> Iterator[Fault]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file).read()
    except (pa.ArrowException, OSError, ValueError) as error:
        yield (
            str(file),
            f"is not a whole parquet file ({str(error).splitlines()[0].rstrip('.')})",
        )
        return
    names = table.column_names
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        yield str(file), f"column {twice!r} appears twice; rename one of them"
    if columns and set(names) != set(columns):
        yield str(file), f"its columns are {names}, but {columns} in the file before; use the same"
    columns[:] = names
    if table.num_rows == 0:
        yield str(file), "has no rows; leave the file out"
    for name in names:
        if pa.types.is_string(table.schema.field(name).type):
            for number, value in enumerate(table[name].cast(pa.binary()).to_pylist(), start=1):
                if value is not None and not _is_utf8(value):
                    yield f"{file}: row {number}", f"column {name!r} is not UTF-8"
                    return


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def locate_row(source: SourceSection, index: int) -> str:
    """Where row `index` of a source is: `file:line` for text, `file: row n` for the rest."""
    whole = not source.split.endswith("]")
    files = local_files(source) if whole and not is_saved(source) else []
    for file in files:
        try:
            lines = _row_lines(file)
        except (ValueError, RecursionError):  # its reader takes what Python's takes for broken
            lines = None
        if lines is None:
            break
        if isinstance(lines, int):
            if index < lines:
                return f"{file}: row {index + 1}"
            index -= lines
        elif index < len(lines):
            return f"{file}:{lines[index]}"
        else:
            index -= len(lines)
    split = "" if source.split == "train" else f" ({source.split})"
    return f"{source.path}{split}: row {index + 1}"


def _row_lines(file: Path) -> list[int] | int | None:
    """The line each row starts on, or the number of rows if the format has no lines."""
    if _loader(file) == "csv":
        return [line for line, _ in _csv_rows(file)][1:]
    if _loader(file) == "json":
        text = _content(file).decode("utf-8-sig")
        is_array = text.lstrip().startswith("[")
        return [line for line, _ in (_array_rows(text) if is_array else _line_rows(text))]
    import pyarrow as pa
    import pyarrow.parquet as pq

    if _loader(file) == "parquet":
        return int(pq.read_metadata(file).num_rows)
    if _loader(file) == "arrow":
        with pa.memory_map(str(file)) as handle:
            try:
                reader = pa.ipc.open_file(handle)
            except pa.ArrowInvalid:
                return sum(batch.num_rows for batch in pa.ipc.open_stream(handle))
            return sum(
                reader.get_batch(number).num_rows for number in range(reader.num_record_batches)
            )
    return None  # what a row of a text file is, the recipe says
