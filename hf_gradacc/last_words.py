"""What a rank that stops tells the others, which would see no more than a broken connection.

Under FSDP2 a rank that fails inside a forward leaves the others in a collective that nobody will
complete. They come out of it when its process ends ("Connection closed by peer"), or are ended by
the launcher. A line left in the store that brought the ranks together says why.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch.distributed as dist

from hf_gradacc.errors import GradAccError, RankFailedError

__all__ = ["LastWords"]

# What a collective says when another rank is gone: gloo, NCCL, and the store itself.
_BROKEN = ("Connection closed", "Connection reset", "Broken pipe", "NCCL", "Socket", "recvValue")


class LastWords:
    """The reason a rank stops, for one call of ``train()``.

    Args:
        run: How many calls of ``train()`` came before in this process, the same on all ranks.
    """

    def __init__(self, run: int) -> None:
        self._key = f"hf_gradacc/last_words/{run}"

    def explain(self, error: Exception) -> Exception:
        """Leave the reason for the others; or learn that this rank stops because of another.

        Args:
            error: What ends the run on this rank.

        Returns:
            What to raise: the error itself, or one that says which rank failed and of what.
        """
        store = _store()
        if store is None or isinstance(error, RankFailedError):
            return error
        rank, breaks = dist.get_rank(), _is_broken_connection(error)
        with contextlib.suppress(RuntimeError):  # the rank that kept the store may be gone
            if not breaks:
                reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                store.set(self._key, f"rank {rank} failed with {reason}")
            elif store.check([self._key]):
                told = store.get(self._key).decode()
                return RankFailedError(f"{told}\n  Its own log says more. This rank stops with it.")
        return error


def _is_broken_connection(error: Exception) -> bool:
    if isinstance(error, GradAccError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or any(words in str(error) for words in _BROKEN)


def _store() -> Any:
    """Give the store that the ranks met in, None where there is one rank."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return dist.distributed_c10d._get_default_store()
