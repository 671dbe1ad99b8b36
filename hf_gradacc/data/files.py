"""Which local files a source stands for: one file, a pattern, a folder, a set saved by `datasets`.

A folder whose file names tell splits apart (`train.jsonl`, `test.jsonl`) is read as `datasets`
reads it: only the files of the split that is asked for. Anything else is one split, `train`.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from hf_gradacc.data.section import SourceSection
from hf_gradacc.errors import DataError

__all__ = [
    "LOADERS",
    "ending_of",
    "is_saved",
    "loader_of",
    "local_files",
    "open_bytes",
    "saved_folder",
    "split_name",
]

LOADERS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
"""Endings of data files, and what `datasets` reads them with."""

_COMPRESSED: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
}
"""Endings behind which a file of text may stand; `datasets` takes it apart by itself."""


def local_files(source: SourceSection) -> list[Path]:
    """The data files of a source, in the order their rows are read; none for a hub name.

    Raises:
        DataError: If a folder has no file of the split that is asked for.
    """
    place = Path(source.path)
    if is_saved(source):
        folder = saved_folder(source)
        listed = json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]
        return [folder / file["filename"] for file in listed]
    if place.is_dir():
        return _files_of_split(place, split_name(source))
    if not place.is_file() and not any(letter in source.path for letter in "*?["):
        return []
    if split_name(source) != "train":
        raise DataError(
            f"{source.path} has one split, called train, and no {split_name(source)!r}: leave "
            "split out, or take a slice such as train[:10%]."
        )
    if place.is_file():
        return [place]
    anchor = Path(place.anchor or ".")
    pattern = str(place.relative_to(anchor)) if place.anchor else source.path
    return sorted(file for file in anchor.glob(pattern) if file.is_file())


def is_saved(source: SourceSection) -> bool:
    """Whether the source is a folder that `save_to_disk` of `datasets` has written."""
    place = Path(source.path)
    return (place / "state.json").is_file() or (place / "dataset_dict.json").is_file()


def saved_folder(source: SourceSection) -> Path:
    """Where the split of a saved set lies.

    Raises:
        DataError: If it was saved without that split.
    """
    place = Path(source.path)
    if not (place / "dataset_dict.json").is_file():
        return place
    text = (place / "dataset_dict.json").read_text(encoding="utf-8")
    splits = json.loads(text)["splits"]
    if split_name(source) not in splits:
        raise DataError(_no_split(source.path, split_name(source), splits))
    return place / split_name(source)


def split_name(source: SourceSection) -> str:
    """The split without its slice."""
    return source.split.partition("[")[0]


def loader_of(source: SourceSection, files: list[Path]) -> str:
    """What `datasets` reads the files with.

    Raises:
        DataError: If they are of several types, or of one that is not read.
    """
    endings = {ending_of(file) for file in files}
    kinds = {LOADERS.get(ending, "") for ending in endings}
    if len(kinds) != 1 or "" in kinds:
        found = ", ".join(sorted(ending or "no ending" for ending in endings))
        raise DataError(
            f"{source.path} holds files of type {found}: use one of {', '.join(LOADERS)} per "
            f"source (files of text as {', '.join(_COMPRESSED)}, too), and list several sources "
            "to mix them."
        )
    return kinds.pop()


def ending_of(file: Path) -> str:
    """The ending that tells the type of a file, in small letters and without its compression.

    >>> ending_of(Path("rows.JSONL.gz"))
    '.jsonl'
    """
    ending = file.suffix.lower()
    if ending not in _COMPRESSED:
        return ending
    inner = Path(file.stem).suffix.lower()
    is_text = LOADERS.get(inner) in ("json", "csv", "text")
    return inner if is_text else f"{inner}{ending}"


@contextlib.contextmanager
def open_bytes(file: Path) -> Iterator[IO[bytes]]:
    """Open a file to read what it holds behind its compression, if it has one.

    Raises:
        DataError: If it is not compressed as its name says, or cut off.
    """
    opener = _COMPRESSED.get(file.suffix.lower())
    if opener is None:
        with file.open("rb") as handle:
            yield handle
        return
    try:
        with opener(file, "rb") as handle:
            yield handle
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault
        raise DataError(f"{file}: is not a whole {file.suffix} file ({error}).") from None


def _files_of_split(folder: Path, split: str) -> list[Path]:
    from datasets.data_files import DataFilesList, EmptyDatasetError, get_data_patterns

    nothing = DataError(f"{folder} holds no data files: name one with {', '.join(LOADERS)} files.")
    try:
        patterns = get_data_patterns(str(folder))
    except EmptyDatasetError:
        raise nothing from None
    if split not in patterns:
        raise DataError(_no_split(str(folder), split, [str(name) for name in patterns]))
    # Without hidden files, and without the cards and descriptions a clone from the hub brings.
    found = DataFilesList.from_patterns(patterns[split], base_path=str(folder))
    files = [Path(file) for file in found if ending_of(Path(file)) in LOADERS]
    if not files:
        raise nothing
    return files


def _no_split(path: str, wanted: str, present: list[str]) -> str:
    return (
        f"{path} has no split {wanted!r}, as its files are named; it has {', '.join(present)}: set "
        "split to one of them, or name the files themselves."
    )
