"""Read an offline W&B run back from disk, since wandb ships no reader of its own file.

A ``.wandb`` file is 7 bytes of header, then LevelDB log blocks of 32 KiB. A block holds chunks:
crc32 (4 bytes), length (2), type (1), payload. A record that does not fit a block is spread over
chunks of type FIRST, MIDDLE... and LAST; one that fits is FULL. Each record is a protobuf
``wandb.proto.wandb_internal_pb2.Record``.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK_SIZE = 32 * 1024
CHUNK_HEADER = struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class WandbRun:
    """What one ``.wandb`` file says about its run."""

    run_id: str = ""
    name: str = ""
    project: str = ""
    entity: str = ""
    notes: str = ""
    tags: list[str] = field(default_factory=list)
    sweep_id: str = ""
    group: str = ""
    resume: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    alerts: list[dict[str, str]] = field(default_factory=list)
    metrics: dict[str, str] = field(default_factory=dict)
    artifacts: dict[str, list[str]] = field(default_factory=dict)

    def rows_with(self, key: str) -> list[dict[str, Any]]:
        """Only those history rows that hold ``key``."""
        return [row for row in self.history if key in row]


def find_wandb_files(directory: Path) -> list[Path]:
    """All ``.wandb`` files under ``directory``, oldest first."""
    return sorted(directory.rglob("*.wandb"), key=lambda path: path.stat().st_mtime_ns)


def read_wandb_file(path: Path) -> WandbRun:
    """Fold the records of one file into a run, in the order they were written."""
    run = WandbRun()
    for payload in _payloads(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(payload)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.run_id, run.project = record.run.run_id, record.run.project
            run.group, run.name = record.run.run_group, record.run.display_name
            run.entity, run.notes = record.run.entity, record.run.notes
            run.tags, run.sweep_id = list(record.run.tags), record.run.sweep_id
            run.config.update(_items(record.run.config.update))
        elif kind == "config":
            run.config.update(_items(record.config.update))
        elif kind == "history":
            run.history.append(_items(record.history.item))
        elif kind == "summary":
            run.summary.update(_items(record.summary.update))
        elif kind == "alert":
            alert = record.alert
            run.alerts.append({"title": alert.title, "text": alert.text, "level": alert.level})
        elif kind == "metric":
            metric = record.metric
            run.metrics[metric.name or metric.glob_name] = metric.step_metric
        elif kind == "artifact":
            files = [entry.path for entry in record.artifact.manifest.contents]
            run.artifacts[record.artifact.name] = sorted(files)
    return run


def _payloads(data: bytes) -> Iterator[bytes]:
    """Join chunks to records, checking each chunk's checksum."""
    position, parts = 7, []
    while position + CHUNK_HEADER.size <= len(data):
        left_in_block = BLOCK_SIZE - position % BLOCK_SIZE
        if left_in_block < CHUNK_HEADER.size:  # too short for a header: padded with zeros
            position += left_in_block
            continue
        checksum, length, kind = CHUNK_HEADER.unpack_from(data, position)
        start = position + CHUNK_HEADER.size
        chunk = data[start : start + length]
        if zlib.crc32(bytes([kind]) + chunk) != checksum:
            raise ValueError(f"chunk at byte {position} of a .wandb file has a wrong checksum")
        position = start + length
        if kind in (FULL, FIRST):
            parts = []
        parts.append(chunk)
        if kind in (FULL, LAST):
            yield b"".join(parts)


def _items(items: Any) -> dict[str, Any]:
    """Items name their key flat (``key``) or as a path (``nested_key``), joined here by /."""
    return {
        item.key or "/".join(item.nested_key): json.loads(item.value_json, parse_constant=float)
        for item in items
    }
