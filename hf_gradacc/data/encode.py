"""Rows of one source as token ids and labels, cached and in parallel."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace
from typing import Any

from hf_gradacc.data.faults import explain_failure, find_nested_rows, locate_row
from hf_gradacc.data.files import is_saved, local_files
from hf_gradacc.data.formats import encode_rows
from hf_gradacc.data.lengths import fit_length, measure_pairs
from hf_gradacc.data.reader import Encoded, RowError, RowReader
from hf_gradacc.data.report import NOTES, Fate, StreamReport
from hf_gradacc.data.section import (
    FORMAT_COLUMNS,
    OPTIONAL_COLUMNS,
    DataSection,
    Format,
    SourceSection,
    Task,
)
from hf_gradacc.data.sources import ExplainedStream
from hf_gradacc.errors import DataError
from hf_gradacc.text import nearest, printable

__all__ = [
    "CACHE_VERSION",
    "check_columns",
    "count_notes",
    "encode_source",
    "find_unused_columns",
    "source_columns",
    "source_format",
]

CACHE_VERSION = 5  # raise it whenever encoded rows would differ

_NOTE_NAMES = list(NOTES)


def source_format(section: DataSection, source: SourceSection) -> Format:
    """The format of a source: its own, or the section's."""
    return source.format or section.format


def source_columns(section: DataSection, source: SourceSection) -> dict[str, str]:
    """The column names of a source: its own, or the section's."""
    return section.columns if source.columns is None else source.columns


def encode_source(
    section: DataSection,
    tokenizer: Any,
    label_ids: dict[str, int] | None,
    source: SourceSection,
    raw: Any,
    *,
    vocab_size: int | None = None,
    task: Task = "causal_lm",
    report: StreamReport | None = None,
) -> Any:
    """Read every row of a source.

    Args:
        section: The recipe's `data`.
        tokenizer: Turns text into tokens.
        label_ids: Classification: label name to id.
        source: The source.
        raw: Its rows, loaded.
        vocab_size: Entries of the model's vocabulary; by default those of the tokenizer.
        task: What the rows are for.
        report: Counts what a stream leaves out.

    Returns:
        Sequences `{input_ids, labels}`, or pairs, see `reader.Encoded`. Those of a set that is read
        whole also have `row`, the number of the row they are made of, `fate`, what was decided
        about them, `notes`, numbers of what happened to the row, and `why` it cannot be used. A
        stream drops rows as it goes.

    Raises:
        DataError: If a column is missing or a row malformed, naming file, line and column.
    """
    format, columns = source_format(section, source), source_columns(section, source)
    reader = RowReader(
        tokenizer,
        columns,
        section.system,
        label_ids,
        section.source_prefix,
        section.template_options,
        section.assistant_turns,
        section.roles_to_train,
        vocab_size,
        task,
    )
    present = _columns_of(source, raw)
    check_columns(section, source, present)
    options: dict[str, Any] = {
        "batched": True,
        "with_indices": True,
        "remove_columns": present,
        "fn_kwargs": {"section": section, "source": source, "reader": reader, "format": format},
    }
    if report is not None:
        options["fn_kwargs"]["report"] = report
    else:
        options |= {
            "num_proc": section.num_proc,
            "new_fingerprint": _fingerprint(section, source, reader, raw),
            "desc": printable(f"tokenizing {source.path.rsplit('/', 1)[-1]}"),
        }
    try:
        return raw.map(_encode_batch, **options)
    except UnicodeDecodeError as error:  # Arrow reads bytes and decodes them only when asked
        explain_failure([source], error)


def _columns_of(source: SourceSection, raw: Any) -> list[str]:
    """The columns of a source; a stream knows them, and whether it has rows, once it is read."""
    present = raw.column_names
    if hasattr(raw, "__len__"):
        return list(present)
    first = next(iter(ExplainedStream.over(raw, [source])), None)
    return [] if first is None else list(present or first)


def _encode_batch(
    batch: dict[str, list[Any]],
    indices: list[int],
    *,
    section: DataSection,
    source: SourceSection,
    reader: RowReader,
    format: Format,
    report: StreamReport | None = None,
) -> dict[str, list[Any]]:
    """A module-level function, so that worker processes can be sent it."""
    empty = _empty_row(reader, format, list(batch))
    result: dict[str, list[Any]] = {name: [] for name in empty}
    if report is None:
        result |= {"row": [], "fate": [], "notes": [], "why": []}
    names = list(batch)
    for position, index in enumerate(indices):
        notes: Counter[str] = Counter()
        row = {name: batch[name][position] for name in names}
        made, why = _sequences_of(
            row, index, replace(reader, notes=notes), section=section, source=source, format=format
        )
        if report is not None:
            report.add(1, [fate for _, fate in made], notes, why)
            made = [(encoded, fate) for encoded, fate in made if not fate.is_left_out]
        for place, (encoded, fate) in enumerate(made):
            for name, value in empty.items():
                result[name].append(encoded.get(name, value))
            if report is None:
                happened = [_NOTE_NAMES.index(name) for name in notes.elements() if name in NOTES]
                result["row"].append(index)
                result["fate"].append(int(fate))
                result["notes"].append(happened if place == 0 else [])
                result["why"].append(why)
    return result


def _empty_row(reader: RowReader, format: Format, columns: list[str]) -> Encoded:
    """What every encoded row of a source has, as it stands in a row that is left out."""
    if format != "preference":
        return {"input_ids": [], "labels": 0 if format == "classification" else []}
    pair: Encoded = {"chosen_ids": [], "rejected_ids": []}
    if reader.task != "reward":
        return {"prompt_ids": [], **pair}
    return {**pair, "margin": 0.0} if reader.column("margin") in columns else pair


def _sequences_of(
    row: dict[str, Any],
    index: int,
    reader: RowReader,
    *,
    section: DataSection,
    source: SourceSection,
    format: Format,
) -> tuple[list[tuple[Encoded, Fate]], str]:
    """The sequences of one row, what was decided about each, and why the row cannot be used.

    Raises:
        DataError: If a row is unusable or too long, and the recipe does not drop such rows.
    """
    found = []
    try:
        for encoded in encode_rows(reader, row, format=format):
            found.append(
                fit_length(
                    encoded,
                    format=format,
                    max_length=section.max_length,
                    max_target_length=section.max_target_length,
                    too_long=section.too_long,
                )
            )
    except RowError as error:
        where = f"{locate_row(source, index)}: {error}"
        if section.unusable == "drop":
            reader.notes.clear()
            return [({}, Fate.UNUSABLE)], where
        raise DataError(
            f"{where}: correct the row, leave it out, or set data.unusable to drop."
        ) from None
    for encoded, fate in found:
        if fate is Fate.TOO_LONG and section.too_long == "error":
            raise DataError(
                f"{locate_row(source, index)}: {_longest(encoded)} tokens exceed "
                f"data.max_length = {section.max_length}: raise it, or set data.too_long to "
                '"truncate" or "drop".'
            )
    return found, ""


def _longest(encoded: Encoded) -> int:
    pairs = measure_pairs([encoded])
    return len(encoded["input_ids"]) if pairs is None else int(pairs.max())


def count_notes(rows: Any) -> Counter[str]:
    """Count what happened to the rows of an encoded source, by the names of `NOTES`."""
    numbers = Counter(itertools.chain.from_iterable(rows["notes"]))
    return Counter({_NOTE_NAMES[number]: count for number, count in numbers.items()})


def find_unused_columns(
    section: DataSection, source: SourceSection, raw: Any, *, task: Task = "causal_lm"
) -> list[str]:
    """The columns of a source that its format does not read for a task, in their order."""
    format, columns = source_format(section, source), source_columns(section, source)
    names = [*FORMAT_COLUMNS[format], *OPTIONAL_COLUMNS.get(format, ())]
    of_another_task = {"margin"} if task != "reward" else set()
    used = {columns.get(name, name) for name in names if name not in of_another_task}
    return [name for name in raw.column_names or [] if name not in used]


_OFTEN_CALLED: dict[str, tuple[str, ...]] = {
    "messages": ("conversations", "conversation", "dialogue", "dialog", "chat", "turns"),
    "prompt": ("instruction", "question", "query", "input"),
    "completion": ("response", "answer", "output", "solution"),
    "instruction": ("prompt", "question", "query", "problem"),
    "output": ("response", "answer", "completion", "solution"),
    "question": ("problem", "query", "instruction", "prompt", "input"),
    "answer": ("solution", "response", "output", "completion"),
    "text": ("content", "sentence", "document", "review"),
    "label": ("labels", "class", "category", "target"),
    "source": ("article", "document", "input", "text"),
    "target": ("summary", "highlights", "output"),
    "input_ids": ("tokens", "ids"),
}
"""What published sets call the columns of a format; only for the hint of an error."""


def check_columns(section: DataSection, source: SourceSection, present: list[str]) -> None:
    """Report what a format needs and the data has, before the first row is read.

    Raises:
        DataError: If a column is missing; it names all of them, and what they may be called.
    """
    if not present:
        raise DataError(f"{source.path} has no rows: name a file that has some.")
    format, columns = source_format(section, source), source_columns(section, source)
    for name, column in columns.items():
        if name in OPTIONAL_COLUMNS.get(format, ()) and column not in present:
            guess = nearest(column, present)
            hint = f"did you mean {guess}?" if guess else f"it has {', '.join(sorted(present))}."
            raise DataError(
                f"{source.path} has no column {column!r}, which data.columns.{name} names: {hint}"
            )
    needed = {name: columns.get(name, name) for name in FORMAT_COLUMNS[format]}
    missing = {name: column for name, column in needed.items() if column not in present}
    if not missing:
        return
    if len(present) == 1 and any(mark in present[0] for mark in ";|\t"):
        raise DataError(
            f"{source.path} has one column, {present[0]!r}: its cells must be separated by "
            "commas in a .csv and by tabs in a .tsv."
        )
    has_none = len(missing) == len(needed) and not is_saved(source)
    for file in local_files(source) if has_none else []:
        if nested := find_nested_rows(file):
            raise DataError(nested)
    free = [name for name in present if name not in needed.values()]
    hints = {name: _guess_column(name, column, free) for name, column in missing.items()}
    raise DataError(
        f"{source.path} has no column {' and no '.join(map(repr, missing.values()))}, which format "
        f"{format!r} reads; it has {', '.join(sorted(present))}: set data.columns to "
        f"{{{', '.join(f'{name}: {guess}' for name, guess in hints.items())}}}, "
        "or another data.format."
    )


def _guess_column(name: str, column: str, free: list[str]) -> str:
    """What the data may call a column: as it is often called, or nearly the same."""
    called = next((often for often in _OFTEN_CALLED.get(name, ()) if often in free), None)
    return called or nearest(column, free) or "<your column>"


_DECIDING = {"max_length", "max_target_length", "too_long", "unusable"}
_DECIDING |= {"assistant_turns", "roles_to_train"}
"""What of the section decides about an encoded row, beside what the reader holds."""


def _fingerprint(section: DataSection, source: SourceSection, reader: RowReader, raw: Any) -> str:
    from datasets.fingerprint import Hasher

    tokenizer = reader.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return str(
        Hasher.hash(
            [
                CACHE_VERSION,
                raw._fingerprint,
                backend.to_str() if backend is not None else repr(tokenizer),
                [str(tokenizer.chat_template), str(tokenizer.special_tokens_map)],
                section.model_dump_json(include=_DECIDING),
                json.dumps([source_format(section, source), dict(reader.columns)]),
                json.dumps([reader.system, reader.source_prefix, dict(reader.template_options)]),
                json.dumps([reader.label_ids, reader.vocab_size, reader.task]),
            ]
        )
    )
