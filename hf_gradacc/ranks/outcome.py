"""Tell the other ranks how an update ended, and why a rank stopped.

Ranks agree on an attempt's outcome before anything is reduced. A rank that stops leaves a reason:
under FSDP2, a rank that fails inside a forward leaves the others in a collective that never ends.
They leave it when the failed rank's process ends ("Connection closed by peer"), or the launcher
ends them. The reason is a line in the store through which the ranks found each other.
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
from hf_gradacc.updates.update import start_copy

__all__ = ["RankFailure", "UpdateOutcome"]


@dataclass(frozen=True)
class UpdateOutcome:
    """How one rank's attempt at an update ended; with `agree`, the worst over all ranks.

    Attributes:
        out_of_memory: An allocation failed.
        broken: Another error; its rank raises it, and the others say that a rank failed.
        cap: Tokens to allow from now on; 0 for no proposal. The smallest one is taken.
        cost: Tokens of the micro-batch that failed.
        row_length: Tokens of a row that failed alone, 0 if none did.
        row: That row's place in the dataset, -1 if unknown.
        stop: Number of the signal that asked to stop, 0 if none.
        stale: A gradient changed after it was sent to the other ranks, see `ranks.reduction`.
        bad_loss: The loss is NaN or infinite.
    """

    out_of_memory: int = 0
    broken: int = 0
    cap: int = 0
    cost: int = 0
    row_length: int = 0
    row: int = -1
    stop: int = 0
    stale: int = 0
    bad_loss: int = 0

    @property
    def failed(self) -> bool:
        """Whether any rank must run the update again, or cannot run it."""
        return bool(self.out_of_memory or self.broken or self.stale)

    def agree(
        self,
        *,
        device: torch.device,
        loss: Tensor | None = None,
        places: Sequence[int] = (),
    ) -> tuple[UpdateOutcome, list[int]]:
        """Exchange outcomes with all ranks, in one collective that every rank calls, failed or not.

        Args:
            device: Where collectives run.
            loss: This rank's loss. The same collective exchanges whether it is finite.
            places: In which place each parameter's gradient came here, 0 if it has none; see
                `Reduction.finish`. Exchanged along, to save a second collective.

        Returns:
            The worst of all outcomes, and the largest places of all ranks.
        """
        values = [getattr(self, field.name) for field in fields(self)]
        largest = torch.iinfo(torch.int64).max
        # The smallest cap has the largest negative. No proposal is the smallest number of all.
        values[2] = -self.cap if self.cap else -largest
        n = len(values)
        vector = torch.tensor([*values, *places], dtype=torch.int64)
        vector = start_copy(vector, device)
        if loss is not None:
            vector[n - 1] = (~torch.isfinite(loss)).to(torch.int64)
        dist.all_reduce(vector, op=dist.ReduceOp.MAX)
        worst = vector.tolist()
        worst[2] = -worst[2] if worst[2] > -largest else 0
        return UpdateOutcome(*worst[:n]), worst[n:]


# Parts of the errors that a collective raises if another rank is gone: gloo, NCCL, the store.
_BROKEN = ("Connection closed", "Connection reset", "Broken pipe", "NCCL", "Socket", "recvValue")


class RankFailure:
    """The reason a rank stops, for one call of ``train()``.

    Args:
        run: Number of earlier calls of ``train()`` in this process, the same on all ranks.
    """

    def __init__(self, run: int) -> None:
        self._key = f"hf_gradacc/failure/{run}"

    def explain(self, error: Exception) -> Exception:
        """Store the reason for the other ranks; or find that this rank stops because of another.

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
                return RankFailedError(f"{reason}\n  Its log says more. This rank stops, too.")
        return error


def _is_broken_connection(error: Exception) -> bool:
    if isinstance(error, GradAccError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or any(text in str(error) for text in _BROKEN)


def _store() -> Any:
    """Return the store that connects the ranks; None if there is only one."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return dist.distributed_c10d._get_default_store()
