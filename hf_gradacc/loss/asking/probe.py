"""Ask the model how its loss counts, instead of trusting its signature or its class name.

GPT-2's class is missing from Transformers' ``LOSS_MAPPING`` and shifts its labels; BART's decoder
is a causal LM and does not; dozens of losses accept ``num_items_in_batch`` and ignore it. A few
forward passes over a few rows settle all of that: the rows together, then each by itself. Whatever
rule makes the parts add up to the whole, in loss and gradient, is the one the loss follows
(`hf_gradacc.loss.asking.questions`). Usually that is all. More is asked if they do not add up: is
it the padding, the rounding, the random numbers, or do rows influence each other?
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from hf_gradacc.loss.asking.answers import Answer, Ask
from hf_gradacc.loss.asking.evidence import CANNOT_TAKE, Errors, Evidence, Found
from hf_gradacc.loss.asking.questions import has_token_labels, misfit, most_columns
from hf_gradacc.loss.facts import LossFacts, differ
from hf_gradacc.updates.batch import pad_columns, trim_padding
from hf_gradacc.updates.targets import TargetRule

__all__ = ["complete", "may_share_images", "measure_padding", "probe_in_place", "probe_loss"]

_NOTHING = (0.0, 0.0)


def probe_loss(
    inputs: Mapping[str, Any],
    ask: Ask,
    *,
    pad_token_id: int = 0,
    left: bool = False,
    max_width: int | None = None,
    is_large: bool = False,
    **options: Any,
) -> LossFacts:
    """Find out how a loss counts, and whether padding changes it.

    Args:
        inputs: A few rows, collated together; best of different length and target count.
        ask: Answers for collated inputs.
        pad_token_id: To widen rows by.
        left: Padding goes in front.
        max_width: Most columns the model can take (learned positions), None if there is no limit.
        is_large: A forward takes long.
        **options: See `Evidence`.

    Raises:
        Exception: Whatever the model raises on the rows together, or on some of them if their
            images may be shared.
    """
    evidence = Evidence(inputs, ask, **options)
    if not math.isfinite(evidence.together.loss):
        return _facts_of_nan(evidence)
    if evidence.together.drew:
        return _facts_of_draws(evidence)
    facts = _facts(evidence)
    if facts.pad_to_one_width:
        return facts
    add_up = "rows_alone" in vars(evidence) and not (facts.warnings or evidence.has_router_loss)
    error = measure_padding(
        evidence,
        facts,
        pad_token_id=pad_token_id,
        left=left,
        max_width=max_width,
        rows_alone_add_up=add_up,
        is_large=is_large,
    )
    is_changed = not error <= evidence.loss_limit
    return dataclasses.replace(facts, padding_error=error, pad_to_one_width=is_changed)


def probe_in_place(inputs: Mapping[str, Any], ask: Ask, **options: Any) -> LossFacts:
    """Find out how a loss counts from one batch whose rows cannot be told apart.

    Images of a batch may lie in one tensor, or the model takes one row at a time. Whether padding
    matters is not asked.

    Args:
        inputs: Collated rows.
        ask: Answers for collated inputs.
        **options: See `Evidence`.

    Raises:
        Exception: Whatever the model raises on the inputs.
    """
    evidence = Evidence(inputs, ask, **options)
    together = evidence.together
    found = None if evidence.encoder_decoder else evidence.by_masks
    if found is None and not evidence.wants_own_count and not evidence.encoder_decoder:
        try:
            found = evidence.told_its_count().by_masks
        except CANNOT_TAKE:
            found = None
        evidence.wants_own_count = found is not None
    misfit = ""
    if found is None and (evidence.num_rows > 1 or has_token_labels(inputs)):
        misfit = (
            "rows cannot be separated in a batch (images in one tensor?), and masking labels did "
            "not show what the loss is a mean over: the gradient of an update may depend on how it "
            "is cut."
        )
    rule, weighing = found or (evidence.order[0], "mean")
    if found is None or weighing == "sum":
        rule = evidence.tell_shift(evidence.order[0])
    return LossFacts(
        rule,
        weighing,
        wants_own_count=evidence.wants_own_count,
        draws=together.drew,
        misfit=misfit,
    )


def complete(facts: LossFacts, evidence: Evidence) -> LossFacts:
    """Add to a rule that is known how the loss is called, and whether it shifts its labels."""
    draws = evidence.together.drew
    rule = evidence.tell_shift(facts.rule)
    if not evidence.wants_own_count and facts.weighing == "mean":
        _divided_by_its_count(evidence, rule)
    return dataclasses.replace(
        facts, rule=rule, wants_own_count=evidence.wants_own_count, draws=draws
    )


def measure_padding(
    evidence: Evidence,
    facts: LossFacts,
    *,
    pad_token_id: int,
    left: bool,
    max_width: int | None,
    rows_alone_add_up: bool,
    is_large: bool = False,
) -> float:
    """Measure by how much more padding changes the loss, relative.

    Several widths: pooling models (Funnel, CANINE) let padding in between some widths and not
    between others. A model that cannot take a row as narrow as this one counts as changed, which
    costs speed and never exactness.

    Args:
        evidence: The rows, and how to ask with them.
        facts: What the loss is a mean over.
        pad_token_id: To widen rows by.
        left: Padding goes in front.
        max_width: See `probe_loss`.
        rows_alone_add_up: Rows without padding have made up the whole, so the widths they have in
            it are asked already.
        is_large: A forward takes long, so one width more is enough.
    """
    inputs = evidence.inputs
    main, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(main, torch.Tensor) or not isinstance(mask, torch.Tensor):
        return 0.0
    widen = partial(pad_columns, pad_token_id=pad_token_id, left=left)
    widest, width = most_columns(max_width), main.shape[-1]
    trimmed = trim_padding(inputs)
    has_margin = trimmed["input_ids"].shape[-1] < width
    if rows_alone_add_up and has_margin:
        return facts.rule_error
    others: list[Mapping[str, Any]] = [trimmed] if has_margin else []
    extras = [extra for extra in (3, 1) if width + extra <= widest]
    if rows_alone_add_up:
        extras = extras[:1]
    elif has_margin:
        extras = extras[-1:]
    others += [widen(inputs, width + extra) for extra in extras]
    if is_large and has_margin:
        others = []  # the first row says as much
    worst = 0.0

    def pairs() -> Iterator[tuple[Answer, Answer]]:
        if not rows_alone_add_up and width > trim_padding(evidence.rows[0])["input_ids"].shape[-1]:
            yield evidence.first_alone, _first_row_padded(evidence, facts)
        for part in others:
            yield evidence.together, _ask_for(evidence, facts, part)

    try:
        for expected, actual in pairs():
            error = misfit(expected, [actual], [1], "mean")
            worst = max(worst, error[0] if evidence.fits(error) else max(error))
            if not worst <= evidence.loss_limit:
                break  # more would say no more
    except CANNOT_TAKE:
        return math.inf
    return worst


def _ask_for(evidence: Evidence, facts: LossFacts, part: Mapping[str, Any]) -> Answer:
    return evidence.ask(part, evidence.own_count(part, facts.rule))


def _first_row_padded(evidence: Evidence, facts: LossFacts) -> Answer:
    """Return the answer for the first row beside padding; of copies a mean is that of one."""
    if "copies" in vars(evidence) and facts.weighing == "mean":
        return evidence.copies[0]
    return _ask_for(evidence, facts, evidence.rows[0])


# ---- deciding ----------------------------------------------------------------------------------


def _facts(evidence: Evidence) -> LossFacts:
    """Ask until the answers decide, and say in plain words what they leave open."""
    weighted = evidence.weighted()
    if weighted is not None:
        rule, class_weights, misfits = weighted
        return LossFacts(rule, class_weights=class_weights, rule_error=misfits[0])
    found, errors, is_padding = _find(evidence)
    if found is not None and found[1] == "sum":
        # Every rule fits a sum; the targets are those that labels say.
        errors_of_sum, rule = errors.get(found, _NOTHING), evidence.tell_shift(evidence.order[0])
        is_mean = not evidence.wants_own_count and _divided_by_its_count(evidence, rule)
        found = (rule, "mean" if is_mean else "sum")
        errors = {found: errors_of_sum}
    if found is None and not evidence.wants_own_count:
        found, errors, is_padding = _find_with_own_count(evidence) or (None, errors, False)
    misfit = ""
    if found is None and evidence.failure is not None and may_share_images(evidence.inputs):
        raise evidence.failure
    if found is None:
        found = _closest(errors, first=(evidence.tell_shift(evidence.order[0]), "mean"))
        misfit = _misfit_message(evidence, errors.get(found, _NOTHING))
    elif evidence.has_router_loss and not evidence.fits(errors.get(found, _NOTHING)):
        misfit = _misfit_message(evidence, errors[found])
    error = errors.get(found, _NOTHING)[0]
    return LossFacts(
        rule=found[0],
        weighing=found[1],
        wants_own_count=evidence.wants_own_count,
        pad_to_one_width=is_padding,
        rule_error=error,
        padding_error=error if is_padding else 0.0,
        misfit=misfit,
    )


def may_share_images(inputs: Mapping[str, Any]) -> bool:
    """Return whether there may be as many images as rows by chance, some rows holding none."""
    return any(value.ndim > 2 for value in inputs.values() if isinstance(value, torch.Tensor))


def _find(evidence: Evidence) -> tuple[Found | None, Errors, bool]:
    """Find what makes the parts add up: with rows alone, copies, masks, in this order.

    Returns:
        What was found, the errors under all rules, and whether padding explains them.
    """
    if evidence.has_router_loss:
        found = evidence.by_masks
        if found is not None and evidence.two_passes_follow:
            return found, {}, False
        return found, evidence.errors_of(evidence.rows_alone), False
    errors: Errors = {}
    if not (evidence.is_coarse or "start_positions" in evidence.inputs):
        # Where positions are classes, padding adds some, and rows without it tell no more.
        errors = evidence.errors_of(evidence.rows_alone)
        if found := evidence.first_fit(errors):
            return found, errors, False
    of_copies = evidence.errors_of(evidence.copies)
    found = evidence.first_fit(of_copies, tight=evidence.is_coarse)
    if found is not None and _may_be_sum(evidence, of_copies) and evidence.grows_with_copies:
        return (found[0], "sum"), {(found[0], "sum"): of_copies[found]}, bool(errors)
    by_masks = None if found else evidence.by_masks
    if found is None and evidence.is_coarse:
        is_explained = by_masks is not None and evidence.fits(of_copies[by_masks])
        found = by_masks if is_explained else evidence.first_fit(of_copies)
    if found is not None:
        return found, of_copies, bool(errors)
    if by_masks is not None and by_masks in of_copies:
        of_copies = {by_masks: of_copies[by_masks]}
    return None, of_copies, False


def _may_be_sum(evidence: Evidence, of_copies: Errors) -> bool:
    """Return whether a sum would give these copies: it looks like a mean over rows, larger."""
    error = of_copies.get((TargetRule.SEQUENCE, "mean"), (math.inf, 0.0))
    return math.isinf(error[0]) or evidence.fits(error, tight=evidence.is_coarse)


def _find_with_own_count(evidence: Evidence) -> tuple[Found, Errors, bool] | None:
    """Ask again, telling the loss its own count; None if that makes no mean of it either."""
    try:
        found, errors, is_padding = _find(evidence.told_its_count())
    except CANNOT_TAKE:
        return None
    if found is None or found[1] == "sum":
        return None
    evidence.wants_own_count = True
    return found, {found: errors.get(found, _NOTHING)}, is_padding


def _divided_by_its_count(evidence: Evidence, rule: TargetRule) -> bool:
    """See whether a sum becomes a mean once it is told its count; if so, note that it wants it."""
    count = evidence.count(evidence.inputs, rule)
    if count < 2:
        return False
    try:
        told = evidence.ask(evidence.inputs, count)
    except CANNOT_TAKE:
        return False
    if differ(told.loss * count, evidence.together.loss) > evidence.loss_limit:
        return False
    evidence.wants_own_count = True
    return True


def _closest(errors: Errors, *, first: Found) -> Found:
    """Choose among rules of which none fits: the first, unless another is clearly better.

    Losses that are all alike say nothing.
    """
    means = {found: error[0] for found, error in errors.items() if found[1] == "mean"}
    best = min(means, key=lambda found: means[found], default=first)
    if first in means and (means[best] > 0.1 * means[first] or means[first] < 1e-3):
        return first
    return best


def _facts_of_draws(evidence: Evidence) -> LossFacts:
    """Ask a loss that draws random numbers: only forwards of one shape draw the same ones."""
    seen = evidence.by_masks or evidence.by_rotations()
    found = seen or (evidence.order[0], "mean")
    if seen is None or seen[1] == "sum":
        found = (evidence.tell_shift(evidence.order[0]), found[1])
    misfit = ""
    if seen is None:
        what = "rows" if found[0] is TargetRule.SEQUENCE else "target tokens"
        misfit = (
            f"the loss draws random numbers, and the losses of rows do not add up to that of all: "
            f"it is taken for a mean over {what}. If rows influence each other, the gradient of an "
            f"update depends on how it is cut; if not, loss_is_mean_over says what it is."
        )
    return LossFacts(
        rule=found[0],
        weighing=found[1],
        wants_own_count=evidence.wants_own_count,
        draws=True,
        misfit=misfit,
    )


def _facts_of_nan(evidence: Evidence) -> LossFacts:
    return LossFacts(
        evidence.tell_shift(evidence.order[0]),
        wants_own_count=evidence.wants_own_count,
        other_warnings=(
            f"the loss of {evidence.num_rows} rows is {evidence.together.loss} before the first "
            f"update, so what it is a mean over could not be asked: it is taken for a mean over "
            f"its targets.",
        ),
    )


def _misfit_message(evidence: Evidence, error: tuple[float, float]) -> str:
    cause = (
        "Rows of a batch influence each other, or the loss is not a mean over its targets (but a "
        "weighted mean, or a sum of several: name them with LossTerms): the gradient of an update "
        "depends on how it is cut."
    )
    if evidence.has_router_loss:
        cause = (
            "The router loss of a mixture of experts is not a mean over targets; its weight in the "
            "update is right, what is left is its own nonlinearity."
        )
    of, value, limit = "loss", error[0], evidence.loss_limit
    if value <= limit:
        of, value, limit = "gradient", error[1], evidence.gradient_limit
    return (
        f"the {of} of {evidence.num_rows} rows together differs from the weighted mean of the {of} "
        f"of each by {value:.1e} (relative; rounding explains {limit:.0e}). {cause}"
    )
