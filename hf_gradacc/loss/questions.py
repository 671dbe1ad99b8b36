"""Find out what a loss divides by, changing nothing but labels.

A row sliced out of a batch runs in another shape, and in bfloat16 the different rounding hides a
wrong denominator. If the labels of all other rows are masked instead, the forward is the same bit
for bit, and only the loss's own mean can differ.

Compare gradients if losses tell nothing: those of an untrained head are all alike.

Ask whether padding changes the loss of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_gradacc.loss.facts import LossFacts, LossOf, differ, rounding_of
from hf_gradacc.updates.batch import labels_of, trim_padding
from hf_gradacc.updates.targets import IGNORE_INDEX, TargetRule, count_targets

__all__ = [
    "find_rule_by_gradients",
    "find_rule_by_masks",
    "measure_padding",
    "probe_in_place",
    "vary_targets",
]

_RULES = (TargetRule.NEXT_TOKEN, TargetRule.SAME_TOKEN, TargetRule.SEQUENCE)


def vary_targets(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Make rows differ in their number of targets, if all have the same.

    If all rows have equally many targets, a mean over tokens equals a mean over rows.

    Args:
        inputs: Collated rows; integer labels ``[rows, seq]``, else they are left as they are.

    >>> labels = torch.tensor([[-100, 5, 6, 7], [-100, 8, 9, 4]])
    >>> varied = vary_targets({"input_ids": labels.clamp(min=0), "labels": labels})
    >>> varied["labels"].tolist()
    [[-100, 5, -100, -100], [-100, 8, 9, 4]]
    """
    name, labels = labels_of(inputs)
    if labels is None or labels.ndim != 2 or labels.is_floating_point() or "shift_labels" in inputs:
        return dict(inputs)
    counts = labels[:, 1:].ne(IGNORE_INDEX).sum(1).tolist()
    if len(set(counts)) > 1 or len(counts) < 2:
        return dict(inputs)
    mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
    free = labels.ne(IGNORE_INDEX)
    if isinstance(ids, Tensor) and ids.shape == labels.shape:
        free = torch.ones_like(free)
        if isinstance(mask, Tensor) and mask.shape == labels.shape:
            free = mask.ne(0)
    free[:, 0] = False
    known = labels[labels.ne(IGNORE_INDEX)]
    if len(known) == 0:
        return dict(inputs)
    varied, before = labels.clone(), 0
    for i in range(len(labels)):
        places = free[i].nonzero().squeeze(-1)
        share = len(places) * i // (len(labels) - 1)
        before = min(max(before + 1, share), len(places))
        kept = places[:before]
        fill = labels[i, kept]
        varied[i] = IGNORE_INDEX
        # Any label that some row has is one the loss can take, be it a token or a class.
        varied[i, kept] = torch.where(fill.ne(IGNORE_INDEX), fill, known[0])
    return {**inputs, name: varied}


def find_rule_by_masks(
    inputs: Mapping[str, Any],
    loss_of: LossOf,
    *,
    wants_own_count: bool,
    first: TargetRule,
    coarse: float,
    has_router_loss: bool = False,
) -> TargetRule | None:
    """Find the rule, if any, under which the losses of single rows add up to the loss of all.

    Args:
        inputs: Rows collated together, with integer labels ``[rows, seq]``.
        loss_of: Returns the loss of collated inputs.
        wants_own_count: It has to be told its count.
        first: The rule to prefer where several fit.
        coarse: How far apart two equal losses may be if the loss itself is in half precision.
        has_router_loss: A loss without any target need not be zero or NaN.

    Returns:
        The rule; None if labels do not decide what counts, or no rule fits.
    """
    name, labels = labels_of(inputs)
    if labels is None or labels.ndim != 2 or labels.is_floating_point() or "shift_labels" in inputs:
        return None
    parts = [{**inputs, name: own} for own in _split_targets(labels)]
    counts = {
        rule: [
            # Rows whose labels are all masked are no sequences here.
            count_targets(part, rule, num_sequences=int(part[name].ne(IGNORE_INDEX).any(1).sum()))
            for part in parts
        ]
        for rule in _RULES
    }
    if sum(n > 0 for n in counts[TargetRule.SAME_TOKEN]) < 2:
        return None

    def loss_under(rule: TargetRule, part: Mapping[str, Any], count: int) -> float:
        return loss_of(part, count if wants_own_count else None)

    try:
        none = {**inputs, name: torch.full_like(labels, IGNORE_INDEX)}
        of_none = loss_of(none, 1 if wants_own_count else None)
        for rule in (first, *(r for r in _RULES if r is not first)):
            own_counts = counts.get(rule)
            if own_counts is None or sum(own_counts) == 0:
                continue
            together = loss_under(rule, inputs, sum(own_counts))
            ignores = has_router_loss or not abs(of_none) > 1e-6 * abs(together)
            if not ignores or not math.isfinite(together):
                return None
            pairs = [
                (n, loss_under(rule, p, n)) for n, p in zip(own_counts, parts, strict=True) if n
            ]
            expected = sum(n * loss for n, loss in pairs) / sum(own_counts)
            values = [together, *(loss for _, loss in pairs)]
            limit = coarse if _is_coarse(values) else rounding_of(torch.float32)
            if differ(together, expected) <= limit:
                return rule
    except (RuntimeError, ValueError, IndexError, TypeError):
        return None  # this loss cannot take masked labels
    return None


def probe_in_place(
    inputs: Mapping[str, Any],
    loss_of: LossOf,
    *,
    first: TargetRule,
    coarse: float,
    encoder_decoder: bool = False,
    has_router_loss: bool = False,
) -> LossFacts:
    """Find out how a loss counts from one batch whose rows cannot be told apart.

    Images of a batch may lie in one tensor. Whether padding matters is not asked.

    Args:
        inputs: Collated rows.
        loss_of: Returns the loss of collated inputs.
        first: The rule to prefer where several fit.
        coarse: See `find_rule_by_masks`.
        encoder_decoder: Such models are not given rows without labels.
        has_router_loss: See `find_rule_by_masks`.
    """
    for own in () if encoder_decoder else (False, True):
        rule = find_rule_by_masks(
            inputs,
            loss_of,
            wants_own_count=own,
            first=first,
            coarse=coarse,
            has_router_loss=has_router_loss,
        )
        if rule is not None:
            return LossFacts(rule, wants_own_count=own)
    labels = labels_of(inputs)[1]
    is_token_level = labels is not None and labels.ndim == 2
    warning = (
        "rows cannot be separated in a batch (images in one tensor?), and masking labels did not "
        "show what the loss is a mean over: the gradient of an update may depend on how it is cut."
    )
    return LossFacts(first if is_token_level else TargetRule.SEQUENCE, warnings=(warning,))


def _split_targets(labels: Tensor) -> list[Tensor]:
    """Split the targets: one row each; if only one row has any, its last one and the others."""
    is_target = labels.ne(IGNORE_INDEX)
    index = torch.arange(len(labels), device=labels.device).unsqueeze(1)
    rows = [is_target & (index == i) for i in range(len(labels))]
    if int(is_target.any(1).sum()) == 1:
        last = torch.zeros_like(is_target)
        row, column = is_target.nonzero()[-1].tolist()
        last[row, column] = True
        rows = [is_target & ~last, last]
    return [labels.masked_fill(~kept, IGNORE_INDEX) for kept in rows]


def _is_coarse(values: list[float]) -> bool:
    """Return whether losses look as if they were computed in bfloat16 or float16."""
    return any(
        all(float(torch.tensor(v).to(dtype)) == v for v in values)
        for dtype in (torch.bfloat16, torch.float16)
    )


def find_rule_by_gradients(
    inputs: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    counts: Mapping[TargetRule, Sequence[int]],
    gradient_of: Callable[[Mapping[str, Any], int], Tensor],
    *,
    tolerance: float,
) -> tuple[TargetRule | None, float]:
    """Find the rule under which the gradients of rows add up to that of all.

    Args:
        inputs: Rows collated together.
        rows: Each of them by itself.
        counts: Their targets under each rule, in the order in which rules are tried.
        gradient_of: Computes the gradient ``[numbers]`` of a batch, given its target count.
        tolerance: How far apart rounding may bring two gradients, relative.

    Returns:
        The rule and its error; None and the first rule's error if none fits. The first rule with an
        error of 0 if there is no gradient.
    """
    first, first_error = next(iter(counts)), math.inf
    for rule, own in counts.items():
        if sum(own) <= 0 or min(own) < 0:
            continue
        try:
            together = gradient_of(inputs, sum(own)).double()
            parts = [
                gradient_of(row, n).double() * (n / sum(own))
                for row, n in zip(rows, own, strict=True)
                if n
            ]
        except (RuntimeError, TypeError):
            return first, 0.0  # none flows in evaluation mode (cuDNN's RNNs), or none at all
        size = float(together.norm())
        error = float((together - sum(parts)).norm()) / size if size else 0.0
        if error <= tolerance or math.isnan(error):
            return rule, error
        first_error = error if rule is first else first_error
    return (None, first_error) if math.isfinite(first_error) else (first, 0.0)


def measure_padding(
    rows: list[dict[str, Any]],
    mean_of: Callable[[Mapping[str, Any]], float],
    *,
    widen: Callable[[Mapping[str, Any], int], Mapping[str, Any]],
    max_width: int | None,
    enough: float,
) -> float:
    """Measure by how much padding changes the loss of a row; stop once it is `enough`.

    Several rows at several widths: pooling models (Funnel, CANINE) let padding in between some
    widths and not between others. One that cannot take a row as narrow as this one counts as
    changed, which costs speed and never exactness.
    """
    worst = 0.0
    for row in rows:
        main = row.get("input_ids")
        if not isinstance(main, Tensor) or not isinstance(row.get("attention_mask"), Tensor):
            return 0.0
        bare = trim_padding(row)
        width = bare["input_ids"].shape[-1]
        # A column beyond the learned positions breaks a GPU's whole process, so there is a margin:
        # RoBERTa's positions begin at 2.
        widest = math.inf if max_width is None else max_width - 8
        padded = [widen(bare, width + extra) for extra in (1, 3) if width + extra <= widest]
        if main.shape[-1] > width:
            padded.insert(0, row)
        try:
            natural = mean_of(bare) if padded else 0.0
            for part in padded:
                worst = max(worst, differ(mean_of(part), natural))
                if not worst <= enough:
                    return worst
        except (RuntimeError, ValueError, IndexError, AssertionError):
            return math.inf
    return worst
