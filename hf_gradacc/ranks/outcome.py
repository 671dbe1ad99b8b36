"""What became of an update, and of a rank, told to the other ranks.

An attempt's outcome is agreed on before anything is reduced. A rank that stops leaves a reason:
under FSDP2 a rank that fails inside a forward leaves the others in a collective that nobody will
complete. They come out of it when its process ends ("Connection closed by peer"), or are ended by
the launcher. A line in the store that brought the ranks together says why.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_gradacc.errors import GradAccError, RankFailedError

__all__ = ["RankFailure", "UpdateOutcome"]


@dataclass(frozen=True)
class UpdateOutcome:
    """How one rank's attempt at an update ended; with `agree`, the worst over all ranks.

    Attributes:
        out_of_memory: An allocator gave up.
        broken: Some other error; its rank raises it, the others say which rank it was.
        cap: Tokens to allow from now on, 0 for no opinion. The smallest wins.
        cost: Tokens of the micro-batch that failed.
        row_length: Tokens of a row that failed alone, 0 if none did.
        row: That row's place in the dataset, -1 if unknown.
        stop: Number of the signal that asked to stop, 0 if none.
        bad_loss: The loss is NaN or infinite.
    """

    out_of_memory: int = 0
    broken: int = 0
    cap: int = 0
    cost: int = 0
    row_length: int = 0
    row: int = -1
    stop: int = 0
    bad_loss: int = 0

    @property
    def failed(self) -> bool:
        """Whether any rank has to do the update again, or cannot."""
        return bool(self.out_of_memory or self.broken)

    def agree(
        self,
        *,
        device: torch.device,
        loss: Tensor | None = None,
        has_grad: Sequence[bool] = (),
    ) -> tuple[UpdateOutcome, list[bool]]:
        """Tell all ranks, in one collective that every rank reaches whatever happened to it.

        Args:
            device: Where collectives run.
            loss: This rank's loss. Whether it is finite goes along without a wait of its own.
            has_grad: Which parameters have a gradient here, in an order that is the same on all
                ranks. Goes along too: it would be a collective of its own, right after.

        Returns:
            The worst of all outcomes, and which parameters have a gradient on any rank.
        """
        values = [getattr(self, field.name) for field in fields(self)]
        largest = torch.iinfo(torch.int64).max
        # The smallest cap is the largest of its negatives, and no opinion the least of all.
        values[2] = -self.cap if self.cap else -largest
        n = len(values)
        vector = torch.tensor([*values, *map(int, has_grad)], dtype=torch.int64).to(device)
        if loss is not None:
            vector[n - 1] = (~torch.isfinite(loss)).to(torch.int64)
        dist.all_reduce(vector, op=dist.ReduceOp.MAX)
        worst = vector.tolist()
        worst[2] = -worst[2] if worst[2] > -largest else 0
        return UpdateOutcome(*worst[:n]), list(map(bool, worst[n:]))


# What a collective says when another rank is gone: gloo, NCCL, and the store itself.
_BROKEN = ("Connection closed", "Connection reset", "Broken pipe", "NCCL", "Socket", "recvValue")


class RankFailure:
    """The reason a rank stops, for one call of ``train()``.

    Args:
        run: How many calls of ``train()`` came before in this process, the same on all ranks.
    """

    def __init__(self, run: int) -> None:
        self._key = f"hf_gradacc/failure/{run}"

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
                reason = store.get(self._key).decode()
                return RankFailedError(
                    f"{reason}\n  Its own log says more. This rank stops with it."
                )
        return error


def _is_broken_connection(error: Exception) -> bool:
    if isinstance(error, GradAccError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or any(text in str(error) for text in _BROKEN)


def _store() -> Any:
    """Give the store that the ranks met in, None where there is one rank."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return dist.distributed_c10d._get_default_store()
