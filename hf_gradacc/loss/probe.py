"""Ask the model how its loss counts, instead of trusting its signature or its class name.

GPT-2's class is missing from Transformers' ``LOSS_MAPPING`` and shifts its labels; BART's decoder
is a causal LM and does not; dozens of losses accept ``num_items_in_batch`` and ignore it. A few
forward passes over the first rows, without gradients, settle all of that:

1. Is the loss a mean, and does it need to be told its own count? (rows twice, same loss)
2. Does it shift? (only the first label of each row set: a loss of nothing means yes)
3. Is the loss of rows together the weighted mean of the loss of each? (the weight rule itself,
   first with the labels of the other rows masked, then with the rows alone)
4. Does padding change a row's loss? (the same row, with padding and without)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_gradacc.errors import LossError
from hf_gradacc.loss.facts import LossFacts, LossOf, differ, rounding_of
from hf_gradacc.loss.questions import find_rule_by_gradients, find_rule_by_masks, measure_padding
from hf_gradacc.updates.batch import (
    count_rows,
    find_main_input,
    labels_of,
    pad_columns,
    slice_rows,
)
from hf_gradacc.updates.targets import IGNORE_INDEX, TargetRule, count_targets

__all__ = ["guess_rule", "probe_loss"]


def probe_loss(
    inputs: Mapping[str, Any],
    loss_of: LossOf,
    *,
    dtype: torch.dtype = torch.float32,
    encoder_decoder: bool = False,
    main_input: str = "input_ids",
    pad_token_id: int = 0,
    left: bool = False,
    max_width: int | None = None,
    has_router_loss: bool = False,
    num_rows: int | None = None,
    take: Callable[[Sequence[int]], Mapping[str, Any]] | None = None,
    gradient_of: Callable[[Mapping[str, Any], int | None], Tensor] | None = None,
) -> LossFacts:
    """Find out how a loss counts.

    Args:
        inputs: A few rows, collated together; best of different length and target count.
        loss_of: Returns the loss of collated inputs as a Python float, without gradients.
        dtype: What the model computes in; says how much rounding to expect.
        encoder_decoder: Such models never shift (and some crash when asked).
        main_input: The feature that holds the sequence.
        pad_token_id: To widen rows by.
        left: Padding goes in front.
        max_width: Most columns the model can take (learned positions), None if there is no limit.
        has_router_loss: The model adds a loss that is known not to be a mean over targets; the
            deviation it causes is expected and reported as such.
        num_rows: Dataset rows in `inputs`, if that is not what its tensors hold.
        take: Returns some of them, collated together; default is to slice `inputs`.
        gradient_of: As `loss_of`, gives a gradient ``[numbers]``, of some parameters. Losses of an
            untrained head are all alike and show no weight; their gradients do.

    Raises:
        LossError: If the loss is no mean, whichever way it is called.
    """
    tolerance = rounding_of(dtype)
    n = num_rows or count_rows(inputs, main_input)
    take = take or partial(slice_rows, inputs)
    twice = take([*range(n), *range(n)])
    count = partial(count_targets, main_input=main_input)
    wants_own_count = _find_way_to_call(inputs, twice, loss_of, main_input)

    def mean_of(part: Mapping[str, Any], rule: TargetRule) -> float:
        return loss_of(part, count(part, rule) if wants_own_count else None)

    rule = guess_rule(
        inputs,
        loss_of,
        main_input=main_input,
        encoder_decoder=encoder_decoder,
        wants_own_count=wants_own_count,
    )
    shown = None
    if not encoder_decoder:  # mBART looks for the last of a row's labels, and on a GPU crashes hard
        shown = find_rule_by_masks(
            inputs,
            loss_of,
            wants_own_count=wants_own_count,
            first=rule,
            coarse=tolerance,
            has_router_loss=has_router_loss,
        )
    rows = [dict(take([i])) for i in range(n)]
    candidates = [shown] if shown else [rule, *(r for r in TargetRule if r is not rule)]
    counts = {r: [count(row, r) for row in rows] for r in candidates}
    alone = rows
    if shown is None and dtype in (torch.bfloat16, torch.float16):
        # As many copies of a row as there are rows: a batch of one shape is rounded in one way.
        alone, tolerance = [dict(take([i] * n)) for i in range(n)], tolerance / 8
    guess, (rule, rule_error) = rule, _check_rule(inputs, alone, counts, mean_of, tolerance)
    tolerance = rounding_of(dtype)
    warnings = []
    if shown is None and gradient_of is not None and not has_router_loss:
        limit = rounding_of(dtype, "rows_gradient")
        found, error = find_rule_by_gradients(
            inputs,
            rows,
            {r: counts[r] for r in (rule, *(r for r in counts if r is not rule))},
            lambda part, count: gradient_of(part, count if wants_own_count else None),
            tolerance=limit,
        )
        if found is not rule:
            rule = found or guess
            rule, rule_error = _check_rule(inputs, alone, {rule: counts[rule]}, mean_of, tolerance)
        if found is None:
            warnings.append(
                f"the gradient of {n} rows together differs from the weighted mean of the gradient "
                f"of each by {error:.1e} (relative; rounding explains {limit:.0e}). Rows of a "
                f"batch influence each other, or the loss is not a mean over its targets (as with "
                f"class weights): the gradient of an update depends on how it is cut."
            )
    if not rule_error <= tolerance and not warnings:
        cause = (
            "The router loss of a mixture of experts is not a mean over targets; its weight in the "
            "update is right, what is left is its own nonlinearity."
            if has_router_loss
            else "Rows of a batch influence each other, or the loss is not a mean over its "
            "targets: the gradient of an update depends on how it is cut."
        )
        warnings.append(
            f"the loss of {n} rows together differs from the weighted mean of the loss of each by "
            f"{rule_error:.1e} (relative; rounding explains {tolerance:.0e}). {cause}"
        )
    padding_error = measure_padding(
        rows,
        lambda part: mean_of(part, rule),
        widen=lambda part, width: pad_columns(part, width, pad_token_id=pad_token_id, left=left),
        max_width=max_width,
        enough=tolerance,
    )
    return LossFacts(
        rule=rule,
        wants_own_count=wants_own_count,
        pad_to_one_width=not padding_error <= tolerance,
        rule_error=rule_error,
        padding_error=padding_error,
        warnings=tuple(warnings),
    )


def _is_token_level(inputs: Mapping[str, Any], main_input: str) -> bool:
    """Return whether labels go with tokens rather than with rows."""
    if isinstance(inputs.get("shift_labels"), Tensor):
        return True
    labels, main = labels_of(inputs)[1], find_main_input(inputs, main_input)
    if labels is None or labels.is_floating_point() or labels.ndim < 2:
        return False
    # [rows, classes] of a multi-label classifier that was given integers is not token level.
    return main is None or labels.shape == main.shape or bool(labels.eq(IGNORE_INDEX).any())


def _find_way_to_call(
    inputs: Mapping[str, Any], twice: Mapping[str, Any], loss_of: LossOf, main_input: str
) -> bool:
    """Return whether the loss is a mean only when it is told its own count."""
    n = count_rows(inputs, main_input)
    token_level = _is_token_level(inputs, main_input)
    count = partial(count_targets, main_input=main_input)
    seen: list[str] = []
    for own_count in (False, True):
        rule = TargetRule.SAME_TOKEN if token_level else TargetRule.SEQUENCE
        try:
            once_loss = loss_of(inputs, count(inputs, rule) if own_count else None)
            twice_loss = loss_of(twice, count(twice, rule) if own_count else None)
        except (TypeError, AttributeError) as error:  # "unsupported operand ...: NoneType"
            seen.append(f"{type(error).__name__}: {error}")
            continue
        # A mean stays, a sum doubles. In between lie losses whose rows influence each other
        # (expert capacity); the check of the weight rule measures those.
        if differ(once_loss, twice_loss) <= 0.25:
            return own_count
        seen.append(f"{once_loss:.6g} for {n} rows, {twice_loss:.6g} for the same rows twice")
    raise LossError(
        "the loss is not a mean over its targets, so micro-batches cannot be weighted by theirs.\n"
        f"  called with num_items_in_batch=None: {seen[0]}\n"
        f"  called with its own count:           {seen[-1]}\n"
        "  Return a mean over the micro-batch, or a sum divided by num_items_in_batch."
    )


def guess_rule(
    inputs: Mapping[str, Any],
    loss_of: LossOf,
    *,
    main_input: str,
    encoder_decoder: bool,
    wants_own_count: bool,
) -> TargetRule:
    """Find out whether a token-level loss shifts; other losses are taken to count sequences."""
    if not _is_token_level(inputs, main_input):
        return TargetRule.SEQUENCE
    name, labels = labels_of(inputs)
    if encoder_decoder or labels is None or "shift_labels" in inputs:
        return TargetRule.SAME_TOKEN
    valid = labels[labels.ne(IGNORE_INDEX)]
    if len(valid) == 0:
        return TargetRule.SAME_TOKEN
    none = torch.full_like(labels, IGNORE_INDEX)
    first = none.clone()
    first[..., 0] = valid[0]
    count = 1 if wants_own_count else None
    try:
        loss_of_none = loss_of({**inputs, name: none}, count)
        loss_of_first = loss_of({**inputs, name: first}, count)
    except (RuntimeError, ValueError, IndexError):
        return TargetRule.SAME_TOKEN  # the weight rule is checked next, and says if this is wrong
    shifts = differ(loss_of_none, loss_of_first) < 1e-6
    return TargetRule.NEXT_TOKEN if shifts else TargetRule.SAME_TOKEN


def _check_rule(
    inputs: Mapping[str, Any],
    alone: list[dict[str, Any]],
    counts: Mapping[TargetRule, list[int]],
    mean_of: Callable[[Mapping[str, Any], TargetRule], float],
    tolerance: float,
) -> tuple[TargetRule, float]:
    """Compare the loss of rows together with the weighted mean; try rules until one fits."""
    errors: dict[TargetRule, float] = {}
    rule = next(iter(counts))
    for candidate, own in counts.items():
        if sum(own) <= 0 or min(own) < 0:
            continue
        together = mean_of(inputs, candidate)
        if not math.isfinite(together):
            return rule, 0.0  # nothing can be seen by it, whatever made it so
        parts = [(n, mean_of(row, candidate)) for n, row in zip(own, alone, strict=True) if n]
        expected = sum(n * loss for n, loss in parts) / sum(own)
        errors[candidate] = differ(together, expected)
        if errors[candidate] <= tolerance:
            return candidate, errors[candidate]
    if not errors:
        return rule, 0.0
    # Nothing fits. Another rule has to be clearly better to win over what the labels say, and
    # losses that are all alike say nothing.
    best = min(errors, key=lambda r: errors[r])
    if rule in errors and (errors[best] > 0.1 * errors[rule] or errors[rule] < 1e-3):
        best = rule
    return best, errors[best]
