"""What the answers of one loss show: under which rule the parts add up to the whole.

Every answer is asked for once, and only if it is needed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch

from hf_gradacc.loss.asking.answers import Answer, Ask
from hf_gradacc.loss.asking.questions import (
    first_label_alone,
    has_token_labels,
    misfit,
    rotate,
    split_targets,
)
from hf_gradacc.loss.class_weights import ClassWeights
from hf_gradacc.loss.facts import Weighing, differ, rounding_of
from hf_gradacc.updates.batch import (
    count_rows,
    find_main_input,
    labels_of,
    slice_rows,
    trim_padding,
)
from hf_gradacc.updates.targets import IGNORE_INDEX, TargetRule, count_targets

__all__ = ["CANNOT_TAKE", "Errors", "Evidence", "Found", "rules_in_order"]

Found = tuple[TargetRule, Weighing]
"""What a loss is a mean over, or the sum of."""

Errors = dict[Found, tuple[float, float]]
"""How far the parts are from adding up, in loss and gradient, see `misfit`."""

CANNOT_TAKE = (RuntimeError, ValueError, IndexError, TypeError, AssertionError)
"""What a model raises that cannot take the labels or the width it is asked with."""


def rules_in_order(
    inputs: Mapping[str, Any], *, main_input: str = "input_ids", encoder_decoder: bool = False
) -> list[TargetRule]:
    """Order the rules by what the labels suggest. The first that fits is taken."""
    if not _is_token_level(inputs, main_input):
        likely = [TargetRule.SEQUENCE]
    elif encoder_decoder or "shift_labels" in inputs:
        likely = [TargetRule.SAME_TOKEN, TargetRule.SEQUENCE]
    else:
        likely = [TargetRule.NEXT_TOKEN, TargetRule.SAME_TOKEN, TargetRule.SEQUENCE]
    return [*likely, *(rule for rule in TargetRule if rule not in likely)]


class Evidence:
    """Asks one loss with one batch of rows, and keeps the answers.

    Args:
        inputs: As for `probe_loss`, like all others.
        ask: Likewise.
        dtype: Likewise.
        encoder_decoder: Likewise.
        main_input: Likewise.
        has_router_loss: Likewise.
        two_passes_follow: Two passes are measured next, so it is not asked how far rows with a
            router loss are from adding up without them.
        num_rows: Likewise.
        take: Likewise.
    """

    def __init__(
        self,
        inputs: Mapping[str, Any],
        ask: Ask,
        *,
        dtype: torch.dtype = torch.float32,
        encoder_decoder: bool = False,
        main_input: str = "input_ids",
        has_router_loss: bool = False,
        two_passes_follow: bool = False,
        num_rows: int | None = None,
        take: Callable[[Sequence[int]], Mapping[str, Any]] | None = None,
    ) -> None:
        self.inputs = inputs
        self.ask = ask
        self.loss_limit = rounding_of(dtype)
        self.gradient_limit = rounding_of(dtype, "rows_gradient")
        self.is_coarse = dtype in (torch.bfloat16, torch.float16)
        self.encoder_decoder = encoder_decoder
        self.has_router_loss = has_router_loss
        self.two_passes_follow = two_passes_follow
        self.num_rows = num_rows or count_rows(inputs, main_input)
        self.take = take or partial(slice_rows, inputs)
        self.count = partial(count_targets, main_input=main_input)
        self.order = rules_in_order(inputs, main_input=main_input, encoder_decoder=encoder_decoder)
        self.wants_own_count = False
        self.failure: Exception | None = None
        """Why the model could not take some part of the rows, if it could not."""

    # ---- answers -------------------------------------------------------------------------------

    @cached_property
    def together(self) -> Answer:
        """The answer for all rows; it settles whether the loss can do without its count."""
        if not self.wants_own_count:
            try:
                return self.ask(self.inputs, None)
            except (TypeError, AttributeError) as error:  # "unsupported operand ...: NoneType"
                try:
                    answer = self.ask(self.inputs, self.count(self.inputs, self.order[0]))
                except Exception:
                    raise error from None
                self.wants_own_count = True
                self.order = [self.tell_shift(self.order[0])]
                return answer
        return self.ask(self.inputs, self.count(self.inputs, self.order[0]))

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """Each row by itself, padded as it is beside the others."""
        return [dict(self.take([i])) for i in range(self.num_rows)]

    @cached_property
    def rows_alone(self) -> list[Answer]:
        """The answers for each row without padding."""
        return self._ask_parts([trim_padding(row) for row in self.rows])

    @cached_property
    def copies(self) -> list[Answer]:
        """The answers for as many copies of each row as there are rows."""
        return self._ask_parts([self.take([i] * self.num_rows) for i in range(self.num_rows)])

    @cached_property
    def first_alone(self) -> Answer:
        """The answer for the first row, the shortest, without padding."""
        if "rows_alone" in vars(self):
            return self.rows_alone[0]
        return self._ask_parts([trim_padding(self.rows[0])])[0]

    @cached_property
    def grows_with_copies(self) -> bool:
        """Whether the copies of a row have a loss about as many times its own.

        A sum of copies is as many times its row's as there are rows: by itself it looks like the
        mean over rows that are as many times larger.
        """
        places = [i for i, many in enumerate(self.copies) if many.loss > 0]
        if self.num_rows < 2 or not places:
            return False
        if places[0] == 0:
            # Asked for padding's sake anyway. It tells, unless padding changes the loss.
            growth = self.copies[0].loss / max(self.first_alone.loss, 1e-30)
            for times in (1, self.num_rows):
                if differ(growth, times) <= self.loss_limit:
                    return times > 1
        (one,) = self._ask_parts([self.rows[places[-1]]])
        return self.copies[places[-1]].loss > math.sqrt(self.num_rows) * one.loss

    def _ask_parts(self, parts: Sequence[Mapping[str, Any]]) -> list[Answer]:
        """Ask with each part; one that the model cannot take answers NaN, which fits nothing."""
        answers = []
        for part in parts:
            count = self.own_count(part, self.order[0])
            if count == 0:
                answers.append(Answer(math.nan))
                continue
            try:
                answers.append(self.ask(part, count))
            except torch.OutOfMemoryError:
                raise
            except CANNOT_TAKE as error:
                self.failure = error
                answers.append(Answer(math.nan))
        return answers

    def own_count(self, part: Mapping[str, Any], rule: TargetRule) -> int | None:
        """Return what to pass as the count of a part, None if the loss does without."""
        return self.count(part, rule) if self.wants_own_count else None

    def told_its_count(self) -> Evidence:
        """Begin anew with the same rows, telling the loss its own count each time."""
        told = copy.copy(self)
        for name, value in vars(Evidence).items():
            if isinstance(value, cached_property):
                vars(told).pop(name, None)
        told.wants_own_count = True
        told.order = [self.tell_shift(self.order[0])]
        return told

    def weighted(self) -> tuple[TargetRule, ClassWeights, tuple[float, float]] | None:
        """The rule of a mean with class weights, and its error; None if there is none that fits.

        The labels that weigh as much as the call was divided by are its targets.
        """
        call = self.together.weighted
        if call is None:
            return None
        rules = [
            rule
            for rule in self.order
            if rule in (TargetRule.SEQUENCE, TargetRule.NEXT_TOKEN, TargetRule.SAME_TOKEN)
            and call.total > 0
            and math.isclose(call.weights.total(self.inputs, rule), call.total, rel_tol=1e-9)
        ]
        if not rules:
            return None
        sizes = [call.weights.total(row, rules[0]) for row in self.rows]
        for answers in ([] if self.is_coarse else [self.rows_alone]) + [self.copies]:
            error = misfit(self.together, answers, sizes, "mean")
            if self.fits(error):
                return rules[0], call.weights, error
        return None

    # ---- do they add up? -----------------------------------------------------------------------

    def errors_of(self, answers: Sequence[Answer]) -> Errors:
        """Measure how far the answers for the rows are from adding up, under each rule."""
        return self._errors(answers, self._counts_of_rows(), self.together)

    def _counts_of_rows(self) -> dict[TargetRule, list[int]]:
        return {rule: [self.count(row, rule) for row in self.rows] for rule in self.order}

    def _errors(
        self,
        answers: Sequence[Answer],
        counts: Mapping[TargetRule, Sequence[int]],
        together: Answer,
    ) -> Errors:
        errors: Errors = {}
        for rule, own in counts.items():
            if sum(own) > 0 and min(own) >= 0:
                errors[rule, "mean"] = misfit(together, answers, own, "mean")
        first = next(iter(counts))
        if sum(n > 0 for n in counts[first]) > 1:
            errors[first, "sum"] = misfit(together, answers, counts[first], "sum")
        return errors

    def fits(self, error: tuple[float, float], *, tight: bool = False) -> bool:
        """Return whether rounding explains an error.

        Args:
            error: Of loss and gradient.
            tight: The forwards were alike bit for bit, so the loss is hardly rounded.
        """
        limit = rounding_of(torch.float32) if tight else self.loss_limit
        return error[0] <= limit and error[1] <= self.gradient_limit

    def first_fit(
        self, errors: Mapping[Found, tuple[float, float]], *, tight: bool = False
    ) -> Found | None:
        """Return the first rule that fits; where several do, what masks and shifts decide."""
        fitting = [found for found, error in errors.items() if self.fits(error, tight=tight)]
        by_token = [
            found
            for found in fitting
            if found[0] in (TargetRule.NEXT_TOKEN, TargetRule.SAME_TOKEN) and found[1] == "mean"
        ]
        # Several fit where losses are all alike, and no gradient tells them apart.
        rivals = [f for f in fitting if f in by_token or f == (TargetRule.SEQUENCE, "mean")]
        is_open = bool(by_token) and len(rivals) > 1 and not self.encoder_decoder
        if is_open and self.by_masks in fitting:
            return self.by_masks
        if len(by_token) > 1:
            return self.tell_shift(fitting[0][0]), "mean"
        return fitting[0] if fitting else None

    @cached_property
    def by_masks(self) -> Found | None:
        """The rule found by masking labels in place; None if labels do not decide what counts."""
        if not has_token_labels(self.inputs):
            return None
        parts = split_targets(self.inputs)
        name = labels_of(self.inputs)[0]
        counts: dict[TargetRule, list[int]] = {
            # Rows whose labels are all masked are no sequences here.
            rule: [
                self.count(p, rule, num_sequences=int(p[name].ne(IGNORE_INDEX).any(1).sum()))
                for p in parts
            ]
            for rule in self.order
            if rule in (TargetRule.NEXT_TOKEN, TargetRule.SAME_TOKEN, TargetRule.SEQUENCE)
        }
        if not counts or sum(n > 0 for n in next(iter(counts.values()))) < 2:
            return None
        answers = self._ask_parts(parts)
        if not self._labels_decide(answers):
            return None
        values = [self.together.loss, *(a.loss for a in answers)]
        errors = self._errors(answers, counts, self.together)
        # The same forward bit for bit: only the loss's own mean is rounded.
        tight = not _looks_coarse(values)
        fitting = [found for found, error in errors.items() if self.fits(error, tight=tight)]
        means = [found for found in fitting if found[1] == "mean"]
        if {rule for rule, _ in means} >= {TargetRule.NEXT_TOKEN, TargetRule.SAME_TOKEN}:
            return self.tell_shift(means[0][0]), "mean"
        return fitting[0] if fitting else None

    def _labels_decide(self, answers: Sequence[Answer]) -> bool:
        """Return whether masked labels changed anything, and masking all leaves nothing."""
        if self.has_router_loss or any(math.isnan(a.loss) for a in answers):
            return True
        if any(differ(a.loss, self.together.loss) > 1e-6 for a in answers):
            return True
        whole = self.together.gradient
        return whole is not None and any(
            a.gradient is not None
            and float((a.gradient - whole).norm()) > 1e-6 * float(whole.norm())
            for a in answers
        )

    def tell_shift(self, guess: TargetRule) -> TargetRule:
        """Find out whether a token-level loss shifts; others keep the guess."""
        asked = None if self.encoder_decoder else first_label_alone(self.inputs)
        if guess not in (TargetRule.NEXT_TOKEN, TargetRule.SAME_TOKEN) or asked is None:
            return guess
        count = 1 if self.wants_own_count else None
        try:
            of_none, of_first = (self.ask(part, count).loss for part in asked)
        except CANNOT_TAKE:
            return TargetRule.SAME_TOKEN
        shifts = differ(of_none, of_first) < 1e-6
        return TargetRule.NEXT_TOKEN if shifts else TargetRule.SAME_TOKEN

    def by_rotations(self) -> Found | None:
        """Compare the mean over all rotations of the rows with the mean over copies of each."""
        rows = list(range(self.num_rows))
        turned = self._ask_parts([self.take(order) for order in rotate(rows)])
        mean = _mean(turned)
        if mean is None:
            return None
        errors = self._errors(self.copies, self._counts_of_rows(), mean)
        # A sum of copies is as many times its row's as there are rows: it looks like a mean.
        fitting = [found for found, e in errors.items() if found[1] == "mean" and self.fits(e)]
        if not fitting:
            return None
        return fitting[0][0], "sum" if self._grows_with_rows() else "mean"

    def _grows_with_rows(self) -> bool:
        """Return whether eight times as many rows make about eight times the loss.

        The draws differ, so only the size can tell, and only over many draws. A mean is the
        default.
        """
        rows = list(range(self.num_rows))
        few, many = self._ask_parts([self.take(rows * 4), self.take(rows * 32)])
        return many.loss > math.sqrt(8) * few.loss > 0


def _is_token_level(inputs: Mapping[str, Any], main_input: str) -> bool:
    """Return whether labels go with tokens rather than with rows."""
    if isinstance(inputs.get("shift_labels"), torch.Tensor):
        return True
    labels, main = labels_of(inputs)[1], find_main_input(inputs, main_input)
    if labels is None or labels.is_floating_point() or labels.ndim < 2:
        return False
    # [rows, classes] of a multi-label classifier that was given integers is not token level.
    return main is None or labels.shape == main.shape or bool(labels.eq(IGNORE_INDEX).any())


def _looks_coarse(values: Sequence[float]) -> bool:
    """Return whether losses look as if they were computed in bfloat16 or float16."""
    return any(
        all(float(torch.tensor(v).to(dtype)) == v for v in values if math.isfinite(v))
        for dtype in (torch.bfloat16, torch.float16)
    )


def _mean(answers: Sequence[Answer]) -> Answer | None:
    """Return the mean of some answers; None if any is not a number."""
    n = len(answers)
    loss = sum(answer.loss for answer in answers) / n
    if not math.isfinite(loss):
        return None
    gradients = [answer.gradient for answer in answers]
    if any(gradient is None for gradient in gradients):
        return Answer(loss, drew=answers[0].drew)
    total = sum(gradient for gradient in gradients if gradient is not None)
    assert isinstance(total, torch.Tensor)
    return Answer(loss, total / n, answers[0].drew)
