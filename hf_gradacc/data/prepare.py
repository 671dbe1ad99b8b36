"""From the `data` section of a recipe to rows a trainer takes: {input_ids, labels}.

    load -> read rows -> fit lengths -> hold out -> pack (text) -> mix

Each step is cached by `datasets` under a fingerprint of what it depends on: the rows, the
tokenizer and the options. A run that changes only the learning rate prepares nothing again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from hf_gradacc.data.chat_templates import check_template_options
from hf_gradacc.data.classes import find_classes
from hf_gradacc.data.encode import (
    CACHE_VERSION,
    check_columns,
    count_notes,
    encode_source,
    find_unused_columns,
    source_columns,
    source_format,
)
from hf_gradacc.data.lengths import measure_lengths, measure_pairs, pack_blocks
from hf_gradacc.data.messages import read_turns, role_of
from hf_gradacc.data.reader import RowReader
from hf_gradacc.data.report import Fate, LengthReport, StreamReport, explain_nothing_left
from hf_gradacc.data.section import FORMAT_COLUMNS, DataSection, SourceSection, Task
from hf_gradacc.data.sources import ExplainedStream, load_source
from hf_gradacc.errors import DataError

__all__ = ["PreparedData", "iter_texts", "prepare_data"]

BLOCK_SIZE = 1024
STREAMED_DOCUMENTS = 1000


@dataclass(frozen=True)
class PreparedData:
    """Rows ready for a trainer.

    Attributes:
        train: Rows `{input_ids, labels}`, or pairs, see `reader.Encoded`.
        eval: Held-out rows, or None.
        reports: What was cut or dropped, one for each set; none for streams.
        label_names: Classification: the classes in order of their ids; empty for regression.
        remarks: Lines about the sources, such as columns that are not used.
    """

    train: Any
    eval: Any | None
    reports: list[LengthReport]
    label_names: list[str]
    remarks: list[str] = field(default_factory=list)


def prepare_data(
    section: DataSection,
    *,
    tokenizer: Any,
    vocab_size: int | None = None,
    task: Task = "causal_lm",
) -> PreparedData:
    """Load, read, fit, hold out, pack and mix.

    Args:
        section: The recipe's `data`.
        tokenizer: A transformers tokenizer with EOS and padding tokens.
        vocab_size: Entries of the model's vocabulary, which may be more than the tokenizer has.
        task: The recipe's `model.task`, which decides what becomes of a pair.

    Raises:
        ConfigError: If an option is for a chat template, and there is none that reads it.
        DataError: If a source cannot be read, lacks a column, or holds a malformed row; the
            message names file, line and column.
    """
    check_template_options(tokenizer, section)
    load = partial(load_source, streaming=section.streaming, document=section.document)
    train_raw = [load(source) for source in section.train]
    eval_raw = [load(source) for source in section.eval]
    sources = [
        *zip(section.train, train_raw, strict=True),
        *zip(section.eval, eval_raw, strict=True),
    ]
    for source, raw in sources if not section.streaming else []:
        check_columns(section, source, raw.column_names)
    _check_turns(section, [*train_raw, *eval_raw])
    labels = find_classes(section, train_raw)
    encode = partial(
        encode_source, section, tokenizer, labels.ids, vocab_size=vocab_size, task=task
    )
    remarks = [*labels.remarks, *_unused_columns(section, sources, task)]
    if section.streaming:
        mix = partial(_mix, section)
        train_stream = _stream(section, encode, sources[: len(train_raw)], join=mix)
        held_stream = _stream(section, encode, sources[len(train_raw) :], join=_concatenate)
        return PreparedData(train_stream, held_stream, [], labels.names, remarks)
    encoded = [encode(source, raw) for source, raw in sources]
    train, held = encoded[: len(train_raw)], encoded[len(train_raw) :]
    if section.holdout is not None:
        held, train = _hold_out(section, train)
    reports = []
    finished: dict[str, list[Any]] = {"data.train": [], "data.eval": []}
    for name, parts, of in (
        ("data.train", train, section.train),
        ("data.eval", held, section.eval or section.train),
    ):
        for part, source in zip(parts, of, strict=False):
            rows, report = _finish(section, part, source, name)
            finished[name].append(rows)
            reports.append(report)
    return PreparedData(
        _mix(section, finished["data.train"]),
        _concatenate(finished["data.eval"]),
        reports,
        labels.names,
        remarks,
    )


def _check_turns(section: DataSection, raws: list[Any]) -> None:
    """Refuse a choice between the turns of rows that have one answer each."""
    if section.assistant_turns == "auto":
        return
    for source, raw in zip([*section.train, *section.eval], raws, strict=True):
        format, columns = source_format(section, source), source_columns(section, source)
        history = columns.get("history", "history")
        if format in ("chat", "prompt_completion") or history in (raw.column_names or [history]):
            return
    raise DataError(
        f"data.assistant_turns = {section.assistant_turns!r} chooses between the answers of a row, "
        f"and no row has more than one, since there is no column 'history': leave it out."
    )


def _unused_columns(
    section: DataSection, sources: list[tuple[SourceSection, Any]], task: Task
) -> Iterator[str]:
    for source, raw in sources:
        names = find_unused_columns(section, source, raw, task=task)
        if names:
            format = source_format(section, source)
            yield f"{source.path}: format {format!r} does not read the columns {', '.join(names)}"


def _stream(
    section: DataSection,
    encode: Callable[..., Any],
    sources: list[tuple[SourceSection, Any]],
    *,
    join: Callable[[list[Any]], Any],
) -> Any | None:
    """The sequences of some sources, as they are read."""
    reports = [StreamReport(source.path, section) for source, _ in sources]
    parts = [
        _pack_stream(section, encode(source, raw, report=report), source)
        for (source, raw), report in zip(sources, reports, strict=True)
    ]
    if not parts:
        return None
    of = [source for source, _ in sources]
    return ExplainedStream.over(join(parts), of, reports=reports)


def iter_texts(section: DataSection) -> Iterator[str]:
    """Every text in the training rows, for training a tokenizer."""
    for source in section.train:
        reader = RowReader(tokenizer=None, columns=source_columns(section, source))
        format = source_format(section, source)
        names = [reader.column(name) for name in FORMAT_COLUMNS[format]]
        names.append(reader.column("prompt" if format == "preference" else "input"))
        for row in load_source(source, streaming=section.streaming, document=section.document):
            for name in names:
                value = read_turns(row.get(name))
                for part in value if isinstance(value, list) else [value]:
                    text = part.get("content", part.get("value")) if role_of(part) else part
                    if isinstance(text, str):
                        yield text


def _hold_out(section: DataSection, parts: list[Any]) -> tuple[list[Any], list[Any]]:
    """Split every source alike, so that a mix and its held-out rows have the same shares.

    All sequences of a row go to one side: what was trained on is no test.
    """
    from datasets import Dataset

    assert section.holdout is not None
    numbers = [np.asarray(part["row"]) for part in parts]
    sizes = [len(np.unique(rows)) for rows in numbers]
    total = sum(sizes)
    share = section.holdout / total if isinstance(section.holdout, int) else section.holdout
    held, kept = [], []
    for part, rows, num_rows in zip(parts, numbers, sizes, strict=True):
        size = round(share * num_rows)
        if not 0 < size < num_rows:
            raise DataError(
                f"data.holdout = {section.holdout} takes {size:,} of {num_rows:,} rows: "
                "both parts need at least one; choose another number."
            )
        if num_rows == len(part):
            both = part.train_test_split(test_size=size, seed=section.seed)
            held.append(both["test"])
            kept.append(both["train"])
            continue
        of_rows = Dataset.from_dict({"row": np.unique(rows)})
        both = of_rows.train_test_split(test_size=size, seed=section.seed)
        is_held = np.isin(rows, np.asarray(both["test"]["row"]))
        held.append(part.select(np.flatnonzero(is_held)))
        kept.append(part.select(np.flatnonzero(~is_held)))
    return held, kept


_WORKING_COLUMNS = ["row", "fate", "notes", "why"]


def _finish(
    section: DataSection, encoded: Any, source: SourceSection, name: str
) -> tuple[Any, LengthReport]:
    """Drop what the policies drop, pack text, and count."""
    fates = np.asarray(encoded["fate"])
    counts = {fate: int((fates == fate).sum()) for fate in Fate}
    unusable = np.flatnonzero(fates == Fate.UNUSABLE)
    why = encoded[int(unusable[0])]["why"] if len(unusable) else ""
    rows = encoded.select(np.flatnonzero(fates <= Fate.TRUNCATED)).remove_columns(_WORKING_COLUMNS)
    if source_format(section, source) == "text":
        rows = _pack(rows, section.max_length or BLOCK_SIZE)
    if len(rows) == 0:
        is_held_out = name == "data.eval" and section.holdout is not None
        place = f"{source.path} (the rows held out)" if is_held_out else source.path
        raise explain_nothing_left(place, counts, section, why=why)
    lengths, pairs = measure_lengths(rows), measure_pairs(rows)
    report = LengthReport(
        name=name if len(section.train) == 1 else f"{name} ({source.path.rsplit('/', 1)[-1]})",
        num_rows=len(np.unique(np.asarray(encoded["row"]))),
        num_truncated=counts[Fate.TRUNCATED],
        num_too_long=counts[Fate.TOO_LONG],
        num_without_target=counts[Fate.NO_TARGET],
        num_sequences=len(rows),
        num_tokens=int(lengths.sum()),
        longest=int((lengths if pairs is None else pairs).max()),
        num_unusable=counts[Fate.UNUSABLE],
        first_unusable=why,
        notes=count_notes(encoded),
        has_pairs=pairs is not None,
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
