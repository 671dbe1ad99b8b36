"""Cut a corpus into blocks without losing a token.

Documents, each closed by EOS, are laid end to end and cut every `block_size - 1` tokens; every
block begins with the last token of the one before, as context. So each token of the corpus but
the very first is a target exactly once. The last block is as short as it comes out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

__all__ = ["pack_blocks"]


def pack_blocks(documents: Iterable[list[int]], *, block_size: int) -> Iterator[list[int]]:
    """Yield blocks of at most `block_size` tokens.

    >>> list(pack_blocks([[1, 2, 3], [4, 5], [6]], block_size=3))
    [[1, 2, 3], [3, 4, 5], [5, 6]]
    """
    block: list[int] = []
    for document in documents:
        start = 0
        while start < len(document):
            taken = document[start : start + block_size - len(block)]
            block += taken
            start += len(taken)
            if len(block) == block_size:
                yield block
                block = block[-1:]
    if len(block) > 1:
        yield block
