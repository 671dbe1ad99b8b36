"""Read a stream alike in every process, and know whether it can go back to a place in it."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator
from typing import Any

import torch

from hf_gradacc.errors import DataError

__all__ = ["as_only_reader", "read", "state_of"]


def read(rows: Iterator[Any], *, first: int, epoch: int) -> Iterator[Any]:
    """Give a stream's rows, each read as `as_only_reader`.

    Args:
        rows: The stream.
        first: How many rows of this pass were read before.
        epoch: The number of this pass.

    Raises:
        DataError: If the stream fails; says how far it was read.
    """
    for done in itertools.count(first):
        with as_only_reader():
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:
                what = f"the training stream failed after {done} rows of epoch {epoch}"
                raise DataError(f"{what}: {type(error).__name__}: {error}") from error
        yield row


@contextlib.contextmanager
def as_only_reader() -> Iterator[None]:
    """Let a stream not see that it is read in a loader worker: there is one, and it reads all.

    ``datasets`` draws a worker's shuffle buffer from other random numbers than it draws without
    workers, even if there is but one: the rows of an update would depend on it.
    """
    worker: Any = torch.utils.data._utils.worker
    info, worker._worker_info = worker._worker_info, None
    try:
        yield
    finally:
        worker._worker_info = info


def state_of(dataset: Any) -> dict[str, Any] | None:
    """Give where a ``datasets.IterableDataset`` stands, None if going back there is not exact."""
    if not _can_seek(dataset):
        return None
    try:
        state: dict[str, Any] = json.loads(json.dumps(dataset.state_dict()))
    except (TypeError, ValueError):
        return None
    return state


def _can_seek(dataset: Any) -> bool:
    """Say whether a stream gives the same rows after seeking as without.

    A shuffle buffer does not: it is refilled with other rows, so such a stream is read again.
    """
    parts = [getattr(dataset, "_ex_iterable", None)]
    if parts[0] is None or not hasattr(dataset, "load_state_dict"):
        return False
    while parts:
        part = parts.pop()
        if "BufferShuffled" in type(part).__name__:
            return False
        for value in vars(part).values():
            nested = value if isinstance(value, list) else [value]
            parts += [v for v in nested if hasattr(v, "_init_state_dict")]
    return True
