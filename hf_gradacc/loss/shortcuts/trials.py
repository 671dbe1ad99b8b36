"""Try cheaper ways to the same loss on a model, each with a few of its own rows.

A loss does not show a small leak between sequences: in bfloat16 it drowns in rounding. So the
checks change the tokens from which no information may flow, and compare hidden states. Shapes stay
the same, so rounding does too, and any difference is a leak.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_gradacc.loss.facts import Compared, gradients_differ, have_moved, rounding_of
from hf_gradacc.loss.layouts import (
    is_right_padded,
    keep_targets,
    kept_rows,
    pack_rows,
    seen_rows,
    without_mask,
)
from hf_gradacc.loss.shortcuts.chunked import why_not_chunked, without_logits
from hf_gradacc.updates.batch import count_rows, slice_rows
from hf_gradacc.updates.targets import IGNORE_INDEX, TargetRule, count_targets

__all__ = ["Trial", "can_try_shortcuts", "other_tokens"]


@dataclass(frozen=True)
class Trial:
    """Tries shortcuts on a model in the mode it was asked in, with a few of its own rows.

    Attributes:
        inputs: Collated rows, on the CPU; at least two, with targets.
        loss_of: Returns the loss of inputs; the second argument is what to pass as their count.
        head: The model's output embeddings.
        owner: The model whose forward calls the head and the loss.
        dtype: What the model computes in.
        wants_own_count: The loss has to be told its own count.
        gradients_of: Returns the gradient of that loss by parameters; nothing if there is none.
    """

    inputs: Mapping[str, Any]
    loss_of: Callable[[Mapping[str, Any], int | None], float]
    head: nn.Module
    owner: PreTrainedModel | None = None
    dtype: torch.dtype = torch.float32
    wants_own_count: bool = False
    gradients_of: Callable[[Mapping[str, Any], int | None], list[Tensor]] = lambda inputs, count: []

    def try_target_only_logits(self) -> str:
        """Compare the loss over chosen logits with the loss over all. Empty if they agree."""
        loss, hidden = self._as_it_is
        if hidden.shape[0] != self.inputs["input_ids"].numel():
            return "its LM head is not fed one row per input token (virtual tokens in front?)"
        all_targets = self._of_targets
        if self._differs(all_targets, loss):
            return f"its loss ignores shift_labels: {all_targets:.7g} instead of {loss:.7g}"
        # One target alone. A loss that shifts what it is given would find none.
        labels = self.inputs["labels"]
        one = torch.full_like(labels, IGNORE_INDEX)
        row, column = labels[:, 1:].ne(IGNORE_INDEX).nonzero()[-1].tolist()
        one[row, column + 1] = labels[row, column + 1]
        alone = {**self.inputs, "labels": one}
        expected, actual = self._run(alone)[0], self._run(*keep_targets(alone))[0]
        if self._differs(actual, expected):
            return f"its loss ignores shift_labels: {actual:.7g} instead of {expected:.7g}"
        return ""

    def try_chunked_loss(self) -> str:
        """Compare the loss taken from hidden states with the one over logits. Empty if they agree.

        What reaches the loss is compared with what the head was given on every call, so a model
        that does something to its logits in between fails here whatever its loss says.
        """
        if why := why_not_chunked(self.owner, self.head):
            return why
        expected = self._of_targets
        with without_logits(self.owner, self.head):
            actual = self._run(*keep_targets(self.inputs))[0]
        if self._differs(actual, expected):
            return f"its loss over chunks is {actual:.7g} instead of {expected:.7g}"
        return ""

    def try_without_mask(self) -> str:
        """Check that right padding does not reach a real token without the mask."""
        padded = _with_padding(self.inputs)
        if padded is None:
            return "its rows are not padded on the right"
        real = padded["attention_mask"].reshape(-1).ne(0)
        if self._hides_padding(padded, real):
            return ""
        is_padded = padded["attention_mask"].equal(self.inputs["attention_mask"])
        loss, hidden = self._as_it_is if is_padded else self._run(padded)
        bare = without_mask(padded)
        bare_loss, bare_hidden = self._run(bare)
        if self._differs(bare_loss, loss) or self._moved(bare_hidden, hidden, real):
            return f"its loss moves without the mask: {bare_loss:.7g} instead of {loss:.7g}"
        other = torch.where(
            padded["attention_mask"].ne(0), bare["input_ids"], other_tokens(bare["input_ids"])
        )
        _, other_hidden = self._run({**bare, "input_ids": other})
        if self._moved(other_hidden, bare_hidden, real, kind="isolation"):
            return "without a mask, padding changes the hidden states of real tokens"
        return ""

    def _hides_padding(self, padded: Mapping[str, Any], real: Tensor) -> bool:
        """Ask both questions of `try_without_mask` with one forward; False if it leaves doubt.

        The rows without a mask, and below them the same with other tokens in their padding.
        """
        if not padded["attention_mask"].equal(self.inputs["attention_mask"]):
            return False
        loss, hidden = self._as_it_is
        bare = without_mask(padded)
        rows = range(count_rows(bare))
        both = slice_rows(bare, [*rows, *rows])
        ids = bare["input_ids"]
        other = torch.where(real.view_as(ids), ids, other_tokens(bare["input_ids"]))
        both["input_ids"] = torch.cat([ids, other])
        both_loss, both_hidden = self._run(both)
        half = len(real)
        return (
            len(both_hidden) == 2 * half
            and not self._differs(both_loss, loss)
            and not self._moved(both_hidden[:half], hidden, real)
            and not self._moved(both_hidden[half:], both_hidden[:half], real, kind="isolation")
        )

    def try_packed(self, *, varlen: bool = False) -> str:
        """Check that sequences laid end to end do not influence each other."""
        try:
            packed = pack_rows(self.inputs, varlen=varlen)
        except ValueError as error:
            return str(error)
        mask = self.inputs.get("attention_mask")
        real = None if mask is None else mask.reshape(-1).ne(0)
        loss, hidden = self._as_it_is
        packed_loss, packed_hidden = self._run(packed)
        if real is not None:
            hidden = hidden[real.to(hidden.device)]
        if hidden.shape != packed_hidden.shape:
            return "its LM head is not fed one row per input token"
        if self._differs(packed_loss, loss):
            return f"its packed loss is {packed_loss:.7g} where its padded loss is {loss:.7g}"
        if self._moved(packed_hidden, hidden):
            return "its hidden states differ between a packed and a padded batch"
        first = int(packed["position_ids"][0].eq(0).nonzero()[1])
        ids = packed["input_ids"].clone()
        ids[0, :first] = other_tokens(packed["input_ids"])[0, :first]
        _, moved = self._run({**packed, "input_ids": ids})
        rest = torch.arange(ids.shape[1]) >= first
        if self._moved(moved, packed_hidden, rest, kind="isolation"):
            return "in a packed row the first sequence changes the hidden states of the others"
        return self._compare_gradients(packed)

    def _compare_gradients(self, packed: Mapping[str, Any]) -> str:
        """Compare gradients, too: those of a branch that a gate of zero closes, say."""
        count = count_targets(packed, TargetRule.NEXT_TOKEN) if self.wants_own_count else None
        try:
            expected = self.gradients_of(self.inputs, count)
        except RuntimeError:  # layers that are computed again by reentrant backwards
            return ""
        if not expected:
            return ""
        if gradients_differ(self.gradients_of(packed, count), expected, dtype=self.dtype):
            return "its gradient differs between a packed and a padded batch"
        return ""

    @cached_property
    def _as_it_is(self) -> tuple[float, Tensor]:
        """The loss without any shortcut, and what the head was fed."""
        return self._run(self.inputs)

    @cached_property
    def _of_targets(self) -> float:
        """The loss over the logits of targets alone."""
        return self._run(*keep_targets(self.inputs))[0]

    def _run(self, inputs: Mapping[str, Any], rows: Tensor | None = None) -> tuple[float, Tensor]:
        """Return the loss, and what the model feeds its head: ``[batch * seq, hidden]``."""
        device = next((p.device for p in self.head.parameters()), torch.device("cpu"))
        count = count_targets(inputs, TargetRule.NEXT_TOKEN) if self.wants_own_count else None
        on_device = None if rows is None else rows.to(device)
        with kept_rows(self.head, on_device), seen_rows(self.head) as seen:
            loss = self.loss_of(inputs, count)
        return loss, seen[0] if seen else torch.empty(0, 0)

    def _differs(self, actual: float, expected: float) -> bool:
        limit = rounding_of(self.dtype, "shortcut")
        return not abs(actual - expected) <= limit * max(abs(expected), 1e-12)

    def _moved(
        self,
        actual: Tensor,
        expected: Tensor,
        rows: Tensor | None = None,
        *,
        kind: Compared = "shortcut",
    ) -> bool:
        """Return whether any row of hidden states moved by more than rounding explains."""
        return have_moved(actual, expected, dtype=self.dtype, rows=rows, kind=kind)


def can_try_shortcuts(inputs: Any) -> bool:
    """Return whether rows are fit for a `Trial`: two or more of a causal LM, one with a target."""
    if not isinstance(inputs, Mapping) or count_rows(inputs) < 2:
        return False
    ids, labels = inputs.get("input_ids"), inputs.get("labels")
    return (
        isinstance(ids, Tensor)
        and isinstance(labels, Tensor)
        and ids.ndim == 2
        and ids.shape == labels.shape
        and "shift_labels" not in inputs
        and bool(labels[:, 1:].ne(IGNORE_INDEX).any())
    )


def other_tokens(ids: Tensor) -> Tensor:
    """Return other tokens in every place, from the same range of the vocabulary."""
    low, high = int(ids.min()), int(ids.max())
    if low == high:
        return torch.full_like(ids, low - 1 if low > 0 else low + 1)
    return torch.where(ids < high, ids + 1, low)


def _with_padding(inputs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Make sure some rows are padded on the right: declare the end of the longest to be padding.

    Widening instead could run past what learned positions allow.
    """
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or not is_right_padded(mask):
        return None
    if not bool(mask.all()):
        return dict(inputs)
    padded = slice_rows(inputs, range(count_rows(inputs)))
    width = mask.shape[1]
    longest = int(mask.ne(0).sum(1).argmax())
    for key, value in (("attention_mask", 0), ("labels", IGNORE_INDEX)):
        padded[key][longest, width - width // 3 :] = value
    return padded if count_targets(padded, TargetRule.NEXT_TOKEN) else None
