"""Sum an update's gradients over ranks, from inside of the last backward if that is possible.

Each rank accumulates gradients by itself. During its last micro-batch a hook on each parameter says
that its gradient is complete, and as soon as all gradients of a bucket are, the bucket is sent. The
sums then arrive while autograd still computes the layers below.

Ranks may run different numbers of micro-batches, or none, and may use different parameters. So
buckets are the same on all ranks and are sent in one order, whatever comes first; what was not
sent from a backward is sent after it; and a rank that failed sends zeros. Then all ranks agree on
how the attempt ended. If any rank failed, all gradients are dropped and the update runs again, so
it does no harm that some of them were sums already.

Which gradient comes last is a guess: a second backward, or code that changes ``.grad``, may come
after a bucket was sent. It is noticed, since ``.grad`` is then another tensor, or another version
of it. Then the update runs again too, and nothing is sent early from then on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

__all__ = ["Reduction", "all_reduce_gradients", "fill_buckets"]


class Reduction:
    """Sums gradients over ranks, attempt by attempt. All ranks make the same calls.

    The first update shows which parameters have a gradient on any rank, and in what order
    gradients come; it is reduced after its last backward. Buckets are made from that. A parameter
    whose first gradient comes later is summed apart, and then gets its place in the buckets.

    Args:
        bucket_bytes: How many bytes of gradients to send at once.
        is_early: Whether buckets may be sent from a backward.
    """

    def __init__(self, *, bucket_bytes: int, is_early: bool) -> None:
        self.bucket_bytes = bucket_bytes
        self.is_early = is_early
        self._parameters: list[Parameter] = []
        self._buckets: list[list[int]] = []
        self._bucket_of: dict[int, int] = {}
        self._hooks: list[Any] = []
        self._forget_attempt()

    def _forget_attempt(self) -> None:
        self._is_open = False
        self._sent: list[_Sent] = []
        self._places = [0] * len(self._parameters)
        self._num_arrived = 0
        self._missing = [len(bucket) for bucket in self._buckets]

    def begin(self, parameters: list[Parameter]) -> None:
        """Begin an attempt at an update, without gradients.

        Args:
            parameters: The trained ones, in the same order on every rank.
        """
        known = self._parameters
        is_same = len(known) == len(parameters) and all(map(_is_one, known, parameters))
        if not is_same:  # the first update, or a callback has frozen some
            self._parameters, self._buckets, self._bucket_of = parameters, [], {}
        self._forget_attempt()
        self._is_open = True

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Send what is complete while the last micro-batch of this rank runs inside."""
        if not self._is_open:  # the micro-batch only runs again to be looked at
            yield
            return
        self._hooks = [
            p.register_post_accumulate_grad_hook(partial(self._arrive, i))  # type: ignore[no-untyped-call]
            for i, p in enumerate(self._parameters)
        ]
        try:
            yield
        except BaseException:
            self._stop_listening()
            raise

    def _stop_listening(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _arrive(self, index: int, parameter: Tensor) -> None:
        """Note that a parameter's gradient is there; autograd calls this."""
        if self._places[index]:
            return
        self._num_arrived += 1
        self._places[index] = self._num_arrived
        bucket = self._bucket_of.get(index)
        if bucket is None or not self.is_early:
            return
        self._missing[bucket] -= 1
        while len(self._sent) < len(self._buckets) and self._missing[len(self._sent)] == 0:
            self._send()

    def end_backward(self) -> None:
        """Send the rest, once the last backward is over.

        So no collective of the user's that follows it can come between two buckets on one rank, and
        before both on another.
        """
        while self._is_open and self.is_early and len(self._sent) < len(self._buckets):
            self._send()

    def _send(self) -> None:
        bucket = [self._parameters[i] for i in self._buckets[len(self._sent)]]
        grads = [p.grad for p in bucket]
        if len(grads) == 1 and grads[0] is not None and grads[0].is_contiguous():
            flat = grads[0]  # summed in place: a large weight costs no memory
        else:
            flat = torch.cat([_zeros(p) if p.grad is None else p.grad.reshape(-1) for p in bucket])
        work = dist.all_reduce(flat, async_op=True)
        # The versions after it was sent: sending in place moves them on some backends.
        versions = [None if grad is None else grad._version for grad in grads]
        self._sent.append(_Sent(bucket, flat, work, grads, versions))

    def finish(self, *, failed: bool) -> tuple[bool, list[int]]:
        """Send what this rank still owes the others: with zeros if it failed.

        Args:
            failed: This rank's attempt failed, and its gradients were dropped to make room.

        Returns:
            Whether a gradient changed after it was sent, and for each parameter a number: 0 if it
            has no gradient here, else in which place it came in the last micro-batch.
        """
        if failed:
            self._stop_listening()
            while self.is_early and len(self._sent) < len(self._buckets):
                self._send_zeros()
            return False, [0] * len(self._parameters)
        self.end_backward()
        self._stop_listening()
        is_stale = any(sent.has_changed() for sent in self._sent)
        last = len(self._parameters) + 1  # had its gradient from an earlier micro-batch
        places = [
            0 if p.grad is None else place or last
            for p, place in zip(self._parameters, self._places, strict=True)
        ]
        return is_stale, places

    def _send_zeros(self) -> None:
        bucket = [self._parameters[i] for i in self._buckets[len(self._sent)]]
        flat = torch.cat([_zeros(p) for p in bucket])
        dist.all_reduce(flat)
        self._sent.append(_Sent([], flat.new_empty(0), None, [], []))

    def abandon(self, *, is_stale: bool) -> None:
        """Drop an attempt that failed on any rank.

        Args:
            is_stale: On some rank a gradient changed after it was sent.
        """
        for sent in self._sent:
            sent.wait()
        if is_stale:
            self.is_early = False
        self._forget_attempt()

    def complete(self, places: Sequence[int]) -> None:
        """Leave the sums over ranks in ``.grad``.

        A parameter without a gradient on this rank counts as zero. One without a gradient on any
        rank keeps None, as in one process: with zeros, an optimizer would decay its weight.

        Args:
            places: The largest number of all ranks for each parameter, see `finish`.
        """
        has_grad = {id(p): bool(n) for p, n in zip(self._parameters, places, strict=True)}
        in_buckets = {i for k in range(len(self._sent)) for i in self._buckets[k]}
        for sent in self._sent:
            sent.wait()
            sent.hand_over(has_grad)
        rest = [p for i, p in enumerate(self._parameters) if places[i] and i not in in_buckets]
        all_reduce_gradients(rest, bucket_bytes=self.bucket_bytes)
        if any(n and i not in self._bucket_of for i, n in enumerate(places)):
            self._plan(places)
        self._forget_attempt()

    def _plan(self, places: Sequence[int]) -> None:
        """Put the parameters that have ever had a gradient into buckets, first come first."""
        used = [i for i, place in enumerate(places) if place or i in self._bucket_of]
        used.sort(key=lambda i: places[i] or len(places) + 1)
        self._buckets = [
            [used[i] for i in bucket]
            for bucket in fill_buckets(
                [self._parameters[i] for i in used], bucket_bytes=self.bucket_bytes
            )
        ]
        self._bucket_of = {i: k for k, bucket in enumerate(self._buckets) for i in bucket}


class _Sent:
    """A bucket on its way.

    Args:
        bucket: The parameters in it.
        flat: What is summed over ranks: their gradients end to end, or the only one itself.
        work: The collective, None if it is over.
        grads: The gradients that were sent; None for a parameter that had none.
        versions: How often each had been changed.
    """

    def __init__(
        self,
        bucket: list[Parameter],
        flat: Tensor,
        work: Any,
        grads: list[Tensor | None],
        versions: list[int | None],
    ) -> None:
        self._bucket, self._flat, self._work = bucket, flat, work
        self._grads, self._versions = grads, versions

    def has_changed(self) -> bool:
        """Return whether a gradient is another one by now, or was changed."""
        return any(
            p.grad is not grad or (grad is not None and grad._version != version)
            for p, grad, version in zip(self._bucket, self._grads, self._versions, strict=True)
        )

    def wait(self) -> None:
        """Wait until the sums have arrived; on a device, let its stream wait."""
        if self._work is not None:
            self._work.wait()
            self._work = None

    def hand_over(self, has_grad: dict[int, bool]) -> None:
        """Put the sums into ``.grad``."""
        parts = torch.split(self._flat.view(-1), [p.numel() for p in self._bucket])
        for p, summed in zip(self._bucket, parts, strict=True):
            if not has_grad[id(p)]:
                continue
            if p.grad is None:
                p.grad = torch.zeros_like(p, dtype=p.grad_dtype)
            if p.grad is not self._flat:
                p.grad.copy_(summed.view_as(p.grad))


def all_reduce_gradients(parameters: Sequence[Parameter], *, bucket_bytes: int) -> None:
    """Sum the gradients of parameters over ranks, in place; wait for each bucket.

    Args:
        parameters: The same parameters in the same order on every rank. One without a gradient on
            this rank counts as zero.
        bucket_bytes: How many bytes to send at once.
    """
    for p in parameters:
        if p.grad is None:
            # Not the weight's dtype: gradients of bf16 weights may be float32, see `precision`.
            p.grad = torch.zeros_like(p, dtype=p.grad_dtype)
    for bucket in fill_buckets(parameters, bucket_bytes=bucket_bytes):
        grads = [p.grad for i in bucket if (p := parameters[i]).grad is not None]
        if len(grads) == 1 and grads[0].is_contiguous():
            dist.all_reduce(grads[0])
            continue
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat)
        for grad, summed in zip(grads, torch.split(flat, [g.numel() for g in grads]), strict=True):
            grad.copy_(summed.view_as(grad))


def fill_buckets(parameters: Sequence[Parameter], *, bucket_bytes: int) -> list[list[int]]:
    """Group parameters of one dtype and device, to send a few large messages.

    A group is full when the next of its kind would not fit; a larger parameter is a group of its
    own. Kinds may alternate from layer to layer (bf16 weights, float32 norms), so each fills a
    bucket of its own. Buckets are in the order in which they are complete.

    Args:
        parameters: In the order in which their gradients come.
        bucket_bytes: The size to fill up to.

    Returns:
        Places in `parameters`.

    >>> small, large = Parameter(torch.zeros(2)), Parameter(torch.zeros(9))
    >>> fill_buckets([small, large, small, small], bucket_bytes=20)
    [[1], [0, 2], [3]]
    """
    filling: dict[Any, tuple[list[int], int]] = {}
    buckets: list[list[int]] = []
    for i, p in enumerate(parameters):
        kind = (p.dtype, p.device)
        bucket, size = filling.pop(kind, ([], 0))
        added = p.numel() * max(4, p.element_size())  # gradients may be summed in float32
        if added > bucket_bytes:
            buckets.append([i])
            added = 0
        elif size + added > bucket_bytes:
            buckets.append(bucket)
            bucket, size = [i], 0
        else:
            bucket.append(i)
        if bucket:
            filling[kind] = (bucket, size + added)
    buckets += [bucket for bucket, _ in filling.values()]
    return sorted(buckets, key=max)


def _zeros(p: Parameter) -> Tensor:
    return torch.zeros(p.numel(), dtype=p.grad_dtype, device=p.device)


def _is_one(left: Any, right: Any) -> bool:
    return left is right
