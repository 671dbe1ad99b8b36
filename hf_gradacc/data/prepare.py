"""From the `data` section of a recipe to rows a trainer takes: {input_ids, labels}.

    load -> read rows -> fit lengths -> hold out -> pack (text) -> mix

Each step is cached by `datasets` under a fingerprint of what it depends on: the rows, the
tokenizer and the options. A run that changes only the learning rate prepares nothing again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from hf_gradacc.data.classes import find_classes
from hf_gradacc.data.encode import CACHE_VERSION, encode_source, source_columns, source_format
from hf_gradacc.data.formats import RowReader
from hf_gradacc.data.lengths import Fate, LengthReport, measure_lengths, pack_blocks
from hf_gradacc.data.section import FORMAT_COLUMNS, DataSection, SourceSection
from hf_gradacc.data.sources import ExplainedStream, load_source
from hf_gradacc.errors import DataError

__all__ = ["PreparedData", "iter_texts", "prepare_data"]

BLOCK_SIZE = 1024
STREAMED_DOCUMENTS = 1000


@dataclass(frozen=True)
class PreparedData:
    """Rows ready for a trainer.

    Attributes:
        train: Rows `{input_ids, labels}`.
        eval: Held-out rows, or None.
        reports: What was cut or dropped, one for each set; none for streams.
        label_names: Classification: the classes in order of their ids; empty for regression.
    """

    train: Any
    eval: Any | None
    reports: list[LengthReport]
    label_names: list[str]


def prepare_data(section: DataSection, *, tokenizer: Any) -> PreparedData:
    """Load, read, fit, hold out, pack and mix.

    Args:
        section: The recipe's `data`.
        tokenizer: A transformers tokenizer with EOS and padding tokens.

    Raises:
        DataError: If a source cannot be read, lacks a column, or holds a malformed row; the
            message names file, line and column.
    """
    load = partial(load_source, streaming=section.streaming, document=section.document)
    train_raw = [load(source) for source in section.train]
    eval_raw = [load(source) for source in section.eval]
    labels = find_classes(section, train_raw)
    encode = partial(encode_source, section, tokenizer, labels.ids)
    train = [encode(source, raw) for source, raw in zip(section.train, train_raw, strict=True)]
    held = [encode(source, raw) for source, raw in zip(section.eval, eval_raw, strict=True)]
    if section.streaming:
        pack = partial(_pack_stream, section)
        streams = [pack(part, source) for part, source in zip(train, section.train, strict=True)]
        held = [pack(part, source) for part, source in zip(held, section.eval, strict=True)]
        rows = ExplainedStream.over(_mix(section, streams), section.train)
        held = [ExplainedStream.over(_concatenate(held), section.eval)] if held else []
        return PreparedData(rows, _concatenate(held), [], labels.names)
    if section.holdout is not None:
        held, train = _hold_out(section, train)
    reports = []
    finished: dict[str, list[Any]] = {"data.train": [], "data.eval": []}
    for name, parts, sources in (
        ("data.train", train, section.train),
        ("data.eval", held, section.eval or section.train),
    ):
        for part, source in zip(parts, sources, strict=False):
            rows, report = _finish(section, part, source, name)
            finished[name].append(rows)
            reports.append(report)
    return PreparedData(
        _mix(section, finished["data.train"]),
        _concatenate(finished["data.eval"]),
        reports,
        labels.names,
    )


def iter_texts(section: DataSection) -> Iterator[str]:
    """Every text in the training rows, for training a tokenizer."""
    for source in section.train:
        reader = RowReader(tokenizer=None, columns=source_columns(section, source))
        names = [reader.column(name) for name in FORMAT_COLUMNS[source_format(section, source)]]
        names.append(reader.column("input"))
        for row in load_source(source, streaming=section.streaming, document=section.document):
            for name in names:
                value = row.get(name)
                if isinstance(value, str):
                    yield value
                elif isinstance(value, list):
                    yield from (str(turn.get("content", turn.get("value", ""))) for turn in value)


def _hold_out(section: DataSection, parts: list[Any]) -> tuple[list[Any], list[Any]]:
    """Split every source alike, so that a mix and its held-out rows have the same shares."""
    assert section.holdout is not None
    total = sum(len(part) for part in parts)
    share = section.holdout / total if isinstance(section.holdout, int) else section.holdout
    held, kept = [], []
    for part in parts:
        size = round(share * len(part))
        if not 0 < size < len(part):
            raise DataError(
                f"data.holdout = {section.holdout} takes {size} of {len(part)} rows: "
                "both parts need at least one; choose another number."
            )
        both = part.train_test_split(test_size=size, seed=section.seed)
        held.append(both["test"])
        kept.append(both["train"])
    return held, kept


def _finish(
    section: DataSection, encoded: Any, source: SourceSection, name: str
) -> tuple[Any, LengthReport]:
    """Drop what the length policy drops, pack text, and count."""
    import numpy as np

    fates = np.asarray(encoded["fate"])
    rows = encoded.select(np.flatnonzero(fates <= Fate.TRUNCATED)).remove_columns("fate")
    if source_format(section, source) == "text":
        rows = _pack(rows, section.max_length or BLOCK_SIZE)
    if len(rows) == 0:
        raise DataError(
            f"{source.path} has no row left after data.too_long = {section.too_long!r} with "
            f"data.max_length = {section.max_length}: raise max_length, or truncate."
        )
    lengths = measure_lengths(rows)
    report = LengthReport(
        name=name if len(section.train) == 1 else f"{name} ({source.path.rsplit('/', 1)[-1]})",
        num_rows=len(fates),
        num_truncated=int((fates == Fate.TRUNCATED).sum()),
        num_too_long=int((fates == Fate.TOO_LONG).sum()),
        num_without_target=int((fates == Fate.NO_TARGET).sum()),
        num_sequences=len(rows),
        num_tokens=int(lengths.sum()),
        longest=int(lengths.max()),
    )
    return rows, report


def _pack(rows: Any, block_size: int) -> Any:
    from datasets import Dataset
    from datasets.fingerprint import Hasher

    def blocks(documents: Any, block_size: int) -> Iterator[dict[str, list[int]]]:
        stream = (row["input_ids"] for row in documents)
        for block in pack_blocks(stream, block_size=block_size):
            yield {"input_ids": block, "labels": block}

    # Named by what the blocks depend on: a hash of the function would be another in every process.
    fingerprint = Hasher.hash([CACHE_VERSION, rows._fingerprint, block_size])
    return Dataset.from_generator(
        blocks, gen_kwargs={"documents": rows, "block_size": block_size}, fingerprint=fingerprint
    )


def _pack_stream(section: DataSection, stream: Any, source: SourceSection) -> Any:
    """Pack a stream of text, a thousand documents at a time; other formats pass as they are."""
    if source_format(section, source) != "text":
        return stream
    size = section.max_length or BLOCK_SIZE

    def blocks(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        packed = list(pack_blocks(batch["input_ids"], block_size=size))
        return {"input_ids": packed, "labels": packed}

    return stream.map(blocks, batched=True, batch_size=STREAMED_DOCUMENTS)


def _mix(section: DataSection, parts: list[Any]) -> Any:
    if len(parts) == 1:
        return parts[0]
    from datasets import interleave_datasets

    total = sum(source.weight for source in section.train)
    return interleave_datasets(
        parts,
        probabilities=[source.weight / total for source in section.train],
        seed=section.seed,
        stopping_strategy=section.mix,
    )


def _concatenate(parts: list[Any]) -> Any | None:
    if not parts:
        return None
    from datasets import concatenate_datasets

    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)
