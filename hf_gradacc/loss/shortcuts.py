"""Find out which cheaper ways to the same loss a model allows, by trying them on it.

Four shortcuts, each used only where a check on the actual model passes:

* **target-only logits**: the LM head sees only positions whose prediction enters the loss;
* **chunked loss**: of these, only some logits are there at once;
* **no mask**: right-padded rows of a causal model need none;
* **packed**: the rows of a micro-batch as one row without padding.

A loss is too blunt to see a leak between sequences: in bfloat16 a small one drowns in rounding. So
where no information may flow, the checks change the tokens it could come from and compare hidden
states. The shapes stay as they were, hence rounding does too, and what moves is a leak.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_gradacc.loss.chunked import why_not_chunked, without_logits
from hf_gradacc.loss.facts import Compared, rounding_of
from hf_gradacc.loss.layouts import (
    is_right_padded,
    keep_targets,
    kept_rows,
    pack_rows,
    seen_rows,
    without_mask,
)
from hf_gradacc.updates.batch import count_rows, slice_rows
from hf_gradacc.updates.targets import IGNORE_INDEX, TargetRule, count_targets

__all__ = ["Shortcuts", "Trial", "can_try"]


@dataclass(frozen=True)
class Shortcuts:
    """Which shortcuts are taken, and why the others are not.

    Attributes:
        target_only_logits: Only target positions go through the LM head.
        chunked_loss: Their loss is taken a chunk of logits at a time.
        drop_mask: Right-padded micro-batches are given no mask.
        packed: Micro-batches are one row.
        varlen: Packed rows name their boundaries, for flash attention.
        refused: Reason by shortcut, in plain words.
    """

    target_only_logits: bool = False
    chunked_loss: bool = False
    drop_mask: bool = False
    packed: bool = False
    varlen: bool = False
    refused: tuple[tuple[str, str], ...] = ()

    def shape(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
        """Lay out collated inputs on the CPU.

        Returns:
            What the model's forward takes, and the positions whose logits are wanted (None: all).
        """
        shaped = dict(inputs)
        if self.packed:
            shaped = pack_rows(shaped, varlen=self.varlen)
        elif self.drop_mask:
            shaped = without_mask(shaped)
        return keep_targets(shaped) if self.target_only_logits else (shaped, None)

    def reason(self, name: str) -> str:
        """Say why a shortcut is not taken, empty if it is."""
        return dict(self.refused).get(name, "")


@dataclass(frozen=True)
class Trial:
    """Tries shortcuts on a model in evaluation mode, with a few of its own rows.

    Attributes:
        inputs: Collated rows, on the CPU; at least two, with targets.
        loss_of: Gives the loss of inputs; the second argument is what to pass as their count.
        head: The model's output embeddings.
        owner: The model whose forward calls the head and the loss.
        dtype: What the model computes in.
        wants_own_count: The loss has to be told its own count.
    """

    inputs: Mapping[str, Any]
    loss_of: Callable[[Mapping[str, Any], int | None], float]
    head: nn.Module
    owner: PreTrainedModel | None = None
    dtype: torch.dtype = torch.float32
    wants_own_count: bool = False

    def try_target_only_logits(self) -> str:
        """Compare the loss over chosen logits with the loss over all. Empty if they agree."""
        loss, hidden = self._run(self.inputs)
        if hidden.shape[0] != self.inputs["input_ids"].numel():
            return "its LM head is not fed one row per input token (virtual tokens in front?)"
        all_targets = self._run(*keep_targets(self.inputs))[0]
        if self._differs(all_targets, loss):
            return f"its loss does not go by shift_labels: {all_targets:.7g} instead of {loss:.7g}"
        # One target alone. A loss that shifts what it is given would find none.
        labels = self.inputs["labels"]
        one = torch.full_like(labels, IGNORE_INDEX)
        row, column = labels[:, 1:].ne(IGNORE_INDEX).nonzero()[-1].tolist()
        one[row, column + 1] = labels[row, column + 1]
        alone = {**self.inputs, "labels": one}
        expected, actual = self._run(alone)[0], self._run(*keep_targets(alone))[0]
        if self._differs(actual, expected):
            return f"its loss does not go by shift_labels: {actual:.7g} instead of {expected:.7g}"
        return ""

    def try_chunked_loss(self) -> str:
        """Compare the loss taken from hidden states with the one over logits. Empty if they agree.

        What reaches the loss is compared with what the head was given on every call, so a model
        that does something to its logits in between fails here whatever its loss says.
        """
        if why := why_not_chunked(self.owner, self.head):
            return why
        expected = self._run(*keep_targets(self.inputs))[0]
        with without_logits(self.owner, self.head):
            actual = self._run(*keep_targets(self.inputs))[0]
        if self._differs(actual, expected):
            return f"its loss over chunks is {actual:.7g} instead of {expected:.7g}"
        return ""

    def try_without_mask(self) -> str:
        """See whether right padding reaches a real token once the mask is gone."""
        padded = _with_padding(self.inputs)
        if padded is None:
            return "its rows are not padded on the right"
        real = padded["attention_mask"].reshape(-1).ne(0)
        loss, hidden = self._run(padded)
        bare = without_mask(padded)
        bare_loss, bare_hidden = self._run(bare)
        if self._differs(bare_loss, loss) or self._moved(bare_hidden, hidden, real):
            return f"its loss moves without the mask: {bare_loss:.7g} instead of {loss:.7g}"
        other = torch.where(padded["attention_mask"].ne(0), bare["input_ids"], _others(bare))
        _, other_hidden = self._run({**bare, "input_ids": other})
        if self._moved(other_hidden, bare_hidden, real, kind="isolation"):
            return "padding reaches real tokens in it once there is no mask"
        return ""

    def try_packed(self, *, varlen: bool = False) -> str:
        """See whether sequences laid end to end keep to themselves."""
        try:
            packed = pack_rows(self.inputs, varlen=varlen)
        except ValueError as error:
            return str(error)
        mask = self.inputs.get("attention_mask")
        real = None if mask is None else mask.reshape(-1).ne(0)
        loss, hidden = self._run(self.inputs)
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
        ids[0, :first] = _others(packed)[0, :first]
        _, moved = self._run({**packed, "input_ids": ids})
        rest = torch.arange(ids.shape[1]) >= first
        if self._moved(moved, packed_hidden, rest, kind="isolation"):
            return "the first sequence of a packed row reaches those behind it"
        return ""

    def _run(self, inputs: Mapping[str, Any], rows: Tensor | None = None) -> tuple[float, Tensor]:
        """Give the loss, and what the model feeds its head: ``[batch * seq, hidden]``."""
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
        """Say whether any row of hidden states moved by more than rounding explains."""
        if actual.shape != expected.shape:
            return True
        if rows is not None:
            actual, expected = actual[rows.to(actual.device)], expected[rows.to(actual.device)]
        wide = torch.float64 if actual.device.type != "mps" else torch.float32
        size = expected.to(wide).norm(dim=-1).clamp_min(1e-30)
        moved = (actual.to(wide) - expected.to(wide)).norm(dim=-1) / size
        # Row by row, since a leak reaches some rows only. Rounding of a hidden state is allowed
        # four times that of a loss, which is a mean over many.
        return not float(moved.max()) <= 4 * rounding_of(self.dtype, kind)


def can_try(inputs: Any) -> bool:
    """Say whether rows are fit for a `Trial`: two or more of a causal LM, one with a target."""
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


def _others(inputs: Mapping[str, Any]) -> Tensor:
    """Give other tokens in every place, from the same range of the vocabulary."""
    ids = inputs["input_ids"]
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
    padded = slice_rows(inputs, range(count_rows(inputs)))
    width = mask.shape[1]
    longest = int(mask.ne(0).sum(1).argmax())
    for key, value in (("attention_mask", 0), ("labels", IGNORE_INDEX)):
        padded[key][longest, width - width // 3 :] = value
    return padded if count_targets(padded, TargetRule.NEXT_TOKEN) else None
