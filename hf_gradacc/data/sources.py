"""Load rows from the hub or from local files, whole or as a stream."""

from __future__ import annotations

import contextlib
import copy
import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets

from hf_gradacc.data.faults import explain_failure
from hf_gradacc.data.files import (
    ending_of,
    is_saved,
    loader_of,
    local_files,
    open_bytes,
    saved_folder,
    split_name,
)
from hf_gradacc.data.report import StreamReport
from hf_gradacc.data.section import DocumentUnit, SourceSection
from hf_gradacc.errors import DataError

__all__ = ["ExplainedStream", "load_source"]

_SAMPLE_BY = {"file": "document", "paragraph": "paragraph", "line": "line"}


def load_source(
    source: SourceSection, *, streaming: bool = False, document: DocumentUnit = "file"
) -> Any:
    """Load one source.

    Args:
        source: The source.
        streaming: Read rows when they are asked for.
        document: What one row of a text file is.

    Returns:
        A `datasets.Dataset`, or an `IterableDataset` where streaming.

    Raises:
        DataError: If there is no such source, a file cannot be read (naming file and line), or
            there are no rows.
    """
    files = local_files(source)
    with _without_complaints():
        try:
            loaded = _load(source, files, streaming=streaming, document=document)
        except DataError:
            raise
        except Exception as error:  # datasets wraps whatever its readers raise
            explain_failure([source], error)
    if not streaming and len(loaded) == 0:
        raise DataError(f"{source.path} has no rows: name a file that has some.")
    return loaded


def _load(
    source: SourceSection, files: list[Path], *, streaming: bool, document: DocumentUnit
) -> Any:
    if not files:
        return datasets.load_dataset(
            source.path,
            source.name,
            split=source.split,
            revision=source.revision,
            streaming=streaming,
        )
    if is_saved(source):
        # `set_format` is saved as well: cells would be arrays or tensors, and columns missing.
        saved = datasets.load_from_disk(saved_folder(source)).with_format(None)
        rows = _slice(saved, source.split)
        return rows.to_iterable_dataset() if streaming else rows
    loader = loader_of(source, files)
    options: dict[str, Any] = {}
    if loader == "csv":
        options = _text_cells(files)
    elif loader == "json":
        _refuse_crashing(files)
    elif loader == "text":
        # A mark of the byte order at the beginning is no text.
        options = {"sample_by": _SAMPLE_BY[document], "encoding": "utf-8-sig"}
    return datasets.load_dataset(
        loader,
        data_files={split_name(source): [str(file) for file in files]},
        split=source.split,
        streaming=streaming,
        **options,
    )


_DEEPEST = 1000
_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]')


def _refuse_crashing(files: list[Path]) -> None:
    """Refuse JSON on which readers of datasets crash the process: `null`, thousands of brackets."""
    for file in files:
        with open_bytes(file) as handle:
            head = handle.read(2**20)
        if head.lstrip().startswith((b"null", b"true", b"false")):
            raise DataError(
                f"{file}:1: a row is a JSON object, not {head.split()[0][:5].decode()}."
            )
        opened = head.count(b"[") + head.count(b"{") - head.count(b"]") - head.count(b"}")
        depth = 0
        for mark in _BRACKETS.finditer(head) if opened > _DEEPEST else ():
            depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(mark[0], 0)
            if depth > _DEEPEST:
                raise DataError(f"{file} is nested too deeply to be rows.")


def _text_cells(files: list[Path]) -> dict[str, Any]:
    """Options by which csv files give their cells as they are written: `007` stays, as does `NA`.

    By default pandas guesses numbers, booleans and nulls. Here only an empty cell is null.
    """
    separator = "\t" if ending_of(files[0]) == ".tsv" else ","
    header = _header(files[0], separator)
    for file in files[1:]:
        other = _header(file, separator)
        if other != header:
            raise DataError(
                f"{file}:1: has the columns {', '.join(other)}, and {files[0].name} has "
                f"{', '.join(header)}: make them the same, or list the files as several sources."
            )
    # pandas names a column without a name by its place.
    names = [name or f"Unnamed: {index}" for index, name in enumerate(header)]
    features = datasets.Features(dict.fromkeys(names, datasets.Value("string")))
    return {
        "sep": separator,
        "features": features if names else None,
        "keep_default_na": False,
        "na_values": [""],
    }


def _header(file: Path, separator: str) -> list[str]:
    with open_bytes(file) as handle:
        text = io.TextIOWrapper(handle, newline="", encoding="utf-8-sig")
        rows = (row for row in csv.reader(text, delimiter=separator) if row)
        header, first = next(rows, []), next(rows, [])
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{file}:1: column {twice!r} appears twice: rename one of them.")
    if len(first) > len(header):  # pandas would take the first cell for a row's name
        raise DataError(
            f"{file}:2: has {len(first)} cells, and the header {len(header)} columns: quote cells "
            f"that hold {separator!r}, or name every column."
        )
    return header


def _slice(rows: Any, split: str) -> Any:
    """The part of a saved set that `train[:10%]` asks for."""
    name = split.partition("[")[0]
    parts = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(rows)})
    kept = [index for part in parts for index in range(len(rows))[part.from_ : part.to]]
    return rows if len(kept) == len(rows) else rows.select(kept)


class ExplainedStream(datasets.IterableDataset):
    """A stream that says in one sentence which file and line it could not read."""

    sources: Sequence[SourceSection] = ()
    reports: Sequence[StreamReport] = ()

    @classmethod
    def over(
        cls,
        stream: Any,
        sources: Sequence[SourceSection],
        *,
        reports: Sequence[StreamReport] = (),
    ) -> ExplainedStream:
        """The same stream, with everything else it can do, seeking for a resume included.

        Args:
            stream: The stream.
            sources: Those that may be at fault if it fails.
            reports: What counts the rows that are left out of it; told at the end of a pass.
        """
        explained = copy.copy(stream)
        explained.__class__ = cls  # datasets has no way to make one of its streams another class
        explained.sources, explained.reports = list(sources), list(reports)
        return explained

    def __iter__(self) -> Iterator[Any]:
        with _without_complaints():
            try:
                yield from super().__iter__()
                for report in self.reports:
                    report.close()
            except DataError:
                raise
            except Exception as error:
                if _is_ours(error):
                    raise
                explain_failure(self.sources, error)


def _is_ours(error: Exception) -> bool:
    """Whether an error is raised by this package, so that no file is at fault."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    package = str(Path(__file__).parents[1])
    return trace is not None and trace.tb_frame.f_code.co_filename.startswith(package)


@contextlib.contextmanager
def _without_complaints() -> Iterator[None]:
    """Silence readers that log what they then raise, so that it is said once."""
    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before)
