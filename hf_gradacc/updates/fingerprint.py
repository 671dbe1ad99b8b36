"""Tell whether a dataset is still the one a run began with.

``datasets.Dataset`` has a fingerprint of its own, but it describes how the dataset was made and is
a random number where that cannot be hashed. This one is a hash of what is in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Subset

from hf_gradacc.updates.stream import is_arrow_table, is_stream

__all__ = ["count_rows_of", "fingerprint"]

_BLOCK = 1000
_MOST_BLOCKS = 100


def fingerprint(dataset: Any, *, first_rows: Sequence[Any] | None = None) -> str | None:
    """Hash the rows of a dataset; None if that would be expensive or use them up.

    Of a ``datasets.Dataset`` or a list with more than 100,000 rows, 100 evenly spaced blocks of
    1,000 are hashed. Of a stream only rows are that were read already: it may be a queue or an open
    file, and whoever begins to read it again loses rows. A ``torch.utils.data.Subset`` is hashed by
    its indices and what it is taken from. Any other map dataset may compute its
    rows, or draw them at random, and is not asked.

    Args:
        dataset: The dataset.
        first_rows: Its first rows, if they have been read.

    >>> import datasets
    >>> rows = [{"input_ids": [1, 2]}, {"input_ids": [3]}]
    >>> fingerprint(rows) == fingerprint(datasets.Dataset.from_list(rows))
    False
    >>> fingerprint(rows) == fingerprint([*rows])
    True
    """
    digest = hashlib.blake2b(digest_size=16)
    if is_arrow_table(dataset):
        table = dataset.with_format("arrow")
        for start, stop in _blocks(len(dataset)):
            block = table[start:stop]
            for name in sorted(block.column_names):
                digest.update(name.encode())
                for piece in _bytes_of(block.column(name).combine_chunks()):
                    digest.update(piece)
    elif isinstance(dataset, (list, tuple)):
        for start, stop in _blocks(len(dataset)):
            digest.update(_json_of(dataset[start:stop]))
    elif type(dataset) is Subset:
        digest.update(_json_of([int(index) for index in dataset.indices]))
        digest.update(str(fingerprint(dataset.dataset)).encode())
    elif is_stream(dataset) and first_rows is not None:
        digest.update(_json_of(first_rows))
    else:
        return None
    return digest.hexdigest()


def count_rows_of(dataset: Any) -> int | None:
    """Count the rows of a dataset; None if it does not know its length."""
    try:
        return len(dataset)
    except TypeError:
        return None


def _blocks(num_rows: int) -> list[tuple[int, int]]:
    """Return row ranges, evenly spaced, the first and the last row among them."""
    starts = range(0, num_rows, _BLOCK)
    if len(starts) > _MOST_BLOCKS:
        last = num_rows - _BLOCK
        starts = [round(i * last / (_MOST_BLOCKS - 1)) for i in range(_MOST_BLOCKS)]  # type: ignore[assignment]
    return [(start, min(start + _BLOCK, num_rows)) for start in starts]


def _bytes_of(column: Any) -> Iterable[bytes]:
    """Return a column's values as bytes that do not depend on how Arrow happens to store them."""
    import pyarrow as pa  # where there is a column of it, it is there
    import pyarrow.compute as pc

    kind = column.type
    nested = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if nested and pa.types.is_integer(kind.value_type) and not column.null_count:
        yield pc.list_value_length(column).to_numpy(zero_copy_only=False).astype(np.int64).tobytes()
        values = pc.list_flatten(column)
        if not values.null_count:
            yield values.to_numpy(zero_copy_only=False).astype(np.int64).tobytes()
            return
    yield _json_of(column.to_pylist())


def _json_of(rows: Iterable[Any]) -> bytes:
    return json.dumps(list(rows), default=_plain, sort_keys=True).encode()


def _plain(value: Any) -> Any:
    """Turn tensors and arrays into lists; of anything else only its type is stable."""
    return value.tolist() if hasattr(value, "tolist") else type(value).__name__
