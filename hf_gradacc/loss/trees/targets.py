"""Targets of rows that begin alike: read straight from trees, those that rows share once.

Behind the body every row has its hidden states, see `hf_gradacc.loss.trees.hooks`. The head reads
only those in front of targets. Nothing was done to them in between, as a rule, so it may read them
where they were computed. And if a loss takes weights, a token that several rows have in front of
the same target is one row of the head, weighted by how many there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_gradacc.loss.trees.held import Held, repeat, repeat_behind
from hf_gradacc.loss.trees.layout import Trees
from hf_gradacc.updates.update import start_copy

__all__ = ["Merged", "TreeTargets", "merge_targets"]

_VIEWS = ("AliasBackward0", "SliceBackward0", "ViewBackward0")


@dataclass(frozen=True)
class Merged:
    """Targets of which those that are alike stand once, ordered by token and label.

    Attributes:
        first: The first target of each kind ``[distinct]``, as an index of all targets.
        kinds: Of which kind each target is ``[targets]``.
        weights: How many targets are of each kind ``[distinct]``, in float32.
    """

    first: Tensor
    kinds: Tensor
    weights: Tensor

    def to(self, device: torch.device) -> Merged:
        """Copy to a device, without waiting for it."""
        return Merged(*(start_copy(x, device) for x in (self.first, self.kinds, self.weights)))


def merge_targets(nodes: Tensor, labels: Tensor) -> Merged | None:
    """Find targets that are alike: the same label behind the same token of a tree.

    Args:
        nodes: The token that predicts each target ``[targets]``, by its place in the trees.
        labels: What it is to predict ``[targets]``.

    Returns:
        The kinds of targets; None if each is of its own.

    >>> merged = merge_targets(torch.tensor([0, 1, 0, 1]), torch.tensor([5, 7, 5, 6]))
    >>> merged.first.tolist(), merged.kinds.tolist(), merged.weights.tolist()
    ([0, 3, 1], [0, 2, 0, 1], [2.0, 1.0, 1.0])
    """
    of_token, label = nodes.numpy(), labels.numpy()
    if not len(of_token) or np.bincount(of_token).max() == 1:
        return None
    order = np.lexsort((label, of_token))  # stable: a run that is resumed adds up alike
    differs = (np.diff(of_token[order]) != 0) | (np.diff(label[order]) != 0)
    begins = np.concatenate([[True], differs])
    starts = begins.nonzero()[0]
    if len(starts) == len(order):
        return None
    kinds = np.empty_like(order)
    kinds[order] = begins.cumsum() - 1
    counts = np.diff(starts, append=len(order))
    return Merged(
        torch.from_numpy(order[starts]),
        torch.from_numpy(kinds),
        torch.from_numpy(counts.astype(np.float32)),
    )


@dataclass(frozen=True)
class _Noted:
    """What a body has computed, see `TreeTargets.note`, and how often that was written into."""

    in_trees: Tensor
    behind: Held | None
    of_rows: Tensor
    version: int


class TreeTargets:
    """What a head reads of one micro-batch that is computed as trees.

    Its parts are called in this order, in each forward: `note` by who gives rows what a body has
    computed, `read` in front of the head, `weigh` by the loss.

    Args:
        trees: The trees, on the CPU.
        positions: Places of the targets ``[targets]`` in the flattened rows, on the CPU.
        labels: Their labels ``[1, targets]``, on the CPU.
        given: The same labels as the model is given them, on its device.
        merge: The loss will `weigh`.
    """

    def __init__(
        self, trees: Trees, positions: Tensor, labels: Tensor, *, given: Tensor, merge: bool
    ) -> None:
        nodes = trees.nodes.reshape(-1)[positions.cpu()]
        merged = merge_targets(nodes, labels.reshape(-1).cpu()) if merge else None
        nodes = nodes if merged is None else nodes[merged.first]
        self._merged = None if merged is None else merged.to(given.device)
        self._nodes = start_copy(nodes, given.device)
        self._labels, self._version = given, given._version
        self._noted: _Noted | None = None
        self._has_read = False

    def note(self, in_trees: Any, of_rows: Any, *, behind: Held | None = None) -> None:
        """Remember what a body has computed.

        Args:
            in_trees: Hidden states ``[trees, width, hidden]``; anything else is passed over.
            of_rows: The same for each row ``[rows, seq, hidden]``.
            behind: Those of a kept beginning in front of the trees.
        """
        self._noted = None
        if not (isinstance(in_trees, Tensor) and isinstance(of_rows, Tensor)):
            return
        if of_rows.ndim == 3 and not of_rows.is_inference():
            self._noted = _Noted(in_trees, behind, of_rows, of_rows._version)

    def read(self, hidden: Tensor) -> Tensor | None:
        """Return the hidden states in front of the distinct targets ``[distinct, hidden]``.

        Args:
            hidden: What the head is given.

        Returns:
            None if that may be something else than what a body has computed for its rows, or if
            somebody wants its gradient.
        """
        noted, self._noted = self._noted, None  # nothing else holds it until the backward
        self._has_read = noted is not None and _is_only_viewed(hidden, noted.of_rows, noted.version)
        if noted is None or not self._has_read:
            return None
        flat = noted.in_trees.reshape(-1, noted.in_trees.shape[-1])
        nodes = self._nodes.to(flat.device)
        if noted.behind is None:
            return repeat(flat, nodes)
        return repeat_behind(noted.behind, flat, nodes)

    def weigh(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return hidden states, labels and weights of the targets in a loss.

        Args:
            hidden: What the head passed on ``[..., hidden]``.
            labels: What the loss was given ``[1, targets]``.

        Returns:
            ``[rows, hidden]``, ``[rows]`` and ``[rows]``; without weights where every target is a
            row.
        """
        flat, right = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
        if self._merged is None or not self._has_read:
            return flat, right, None
        if self._is_known(labels):
            here = labels.device
            return flat, right[self._merged.first.to(here)], self._merged.weights
        # A step of somebody's own has other labels: they may differ where these were alike.
        return repeat(flat, self._merged.kinds.to(flat.device)), right, None

    def _is_known(self, labels: Tensor) -> bool:
        if self._labels._version != self._version:
            return False
        known = self._labels
        return labels is known or torch.equal(labels, known.to(labels.device))


def _is_only_viewed(hidden: Tensor, of_rows: Tensor, version: int) -> bool:
    """Return whether a tensor is another as it was, and its gradient goes to that one alone."""
    if hidden.shape != of_rows.shape or hidden.stride() != of_rows.stride():
        return False
    if hidden.data_ptr() != of_rows.data_ptr() or hidden._version != version:
        return False
    if any(x._backward_hooks or x.retains_grad for x in (hidden, of_rows)):
        return False
    step, last = hidden.grad_fn, of_rows.grad_fn
    while step is not None and step is not last and step.name() in _VIEWS:
        step = step.next_functions[0][0]
    return step is last
