"""Rows of one source as token ids and labels, cached and in parallel."""

from __future__ import annotations

import json
from typing import Any

from hf_gradacc.data.faults import explain_failure, locate_row
from hf_gradacc.data.formats import RowError, RowReader, encode_row
from hf_gradacc.data.lengths import Fate, fit_length
from hf_gradacc.data.section import FORMAT_COLUMNS, DataSection, Format, SourceSection
from hf_gradacc.data.sources import ExplainedStream
from hf_gradacc.errors import DataError
from hf_gradacc.text import nearest

__all__ = ["CACHE_VERSION", "encode_source", "source_columns", "source_format"]

CACHE_VERSION = 2  # raise it whenever encoded rows would differ


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
) -> Any:
    """Read every row of a source.

    Args:
        section: The recipe's `data`.
        tokenizer: Turns text into tokens.
        label_ids: Classification: label name to id.
        source: The source.
        raw: Its rows, loaded.

    Returns:
        Rows `{input_ids, labels, fate}`, `fate` saying what the length policy decided. A stream
        drops rows as it goes, and has no `fate`.

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
    )
    present = raw.column_names
    if present is None:  # a stream that knows its columns only once it is read
        present = list(next(iter(ExplainedStream.over(raw, [source])), {}))
    _check_columns(source, format, reader, present)
    options: dict[str, Any] = {
        "batched": True,
        "with_indices": True,
        "remove_columns": present,
        "fn_kwargs": {"section": section, "source": source, "reader": reader, "format": format},
    }
    if not section.streaming:
        options |= {
            "num_proc": section.num_proc,
            "new_fingerprint": _fingerprint(section, source, reader, raw),
            "desc": f"tokenizing {source.path.rsplit('/', 1)[-1]}",
        }
    try:
        return raw.map(_encode_batch, **options)
    except UnicodeDecodeError as error:  # Arrow reads bytes and decodes them only when asked
        explain_failure([source], error)


def _encode_batch(
    batch: dict[str, list[Any]],
    indices: list[int],
    *,
    section: DataSection,
    source: SourceSection,
    reader: RowReader,
    format: Format,
) -> dict[str, list[Any]]:
    """A module-level function, so that worker processes can be sent it."""
    result: dict[str, list[Any]] = {"input_ids": [], "labels": [], "fate": []}
    names = list(batch)
    for position, index in enumerate(indices):
        row = {name: batch[name][position] for name in names}
        try:
            encoded, fate = fit_length(
                encode_row(reader, row, format=format),
                format=format,
                max_length=section.max_length,
                max_target_length=section.max_target_length,
                too_long=section.too_long,
            )
        except RowError as error:
            raise DataError(
                f"{locate_row(source, index)}: {error}: correct the row, or leave it out."
            ) from None
        if fate is Fate.TOO_LONG and section.too_long == "error":
            raise DataError(
                f"{locate_row(source, index)}: {len(encoded['input_ids'])} tokens exceed "
                f"data.max_length = {section.max_length}: raise it, or set data.too_long to "
                '"truncate" or "drop".'
            )
        if section.streaming and fate > Fate.TRUNCATED:
            continue
        result["input_ids"].append(encoded["input_ids"])
        result["labels"].append(encoded["labels"])
        result["fate"].append(int(fate))
    if section.streaming:
        del result["fate"]
    return result


def _check_columns(
    source: SourceSection, format: Format, reader: RowReader, present: list[str]
) -> None:
    """Report what a format needs and the data has, before the first row is read."""
    if not present:
        raise DataError(f"{source.path} has no rows: name a file that has some.")
    for name in FORMAT_COLUMNS[format]:
        column = reader.column(name)
        if column not in present:
            if len(present) == 1 and any(mark in present[0] for mark in ";|\t"):
                raise DataError(
                    f"{source.path} has one column, {present[0]!r}: its cells must be separated by "
                    "commas in a .csv and by tabs in a .tsv."
                )
            guess = nearest(column, present)
            hint = f"{name}: {guess}" if guess else f"{name}: <your column>"
            raise DataError(
                f"{source.path} has no column {column!r}, which format {format!r} reads; "
                f"it has {', '.join(sorted(present))}: set data.columns to {{{hint}}}, "
                "or another data.format."
            )


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
                section.model_dump_json(include={"max_length", "max_target_length", "too_long"}),
                json.dumps([source_format(section, source), dict(reader.columns)]),
                json.dumps([reader.system, reader.source_prefix, dict(reader.template_options)]),
                json.dumps(reader.label_ids),
            ]
        )
    )
