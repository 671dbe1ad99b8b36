"""Choose what an update is run in two passes for, and check it before training.

A candidate is taken only if two passes over parts of a few rows give the loss and the gradient of
the rows together.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from torch import nn
from transformers.utils import logging

from hf_gradacc.errors import GradAccError
from hf_gradacc.loss.asking.answers import Loss
from hf_gradacc.loss.asking.ask import has_router_loss
from hf_gradacc.loss.asking.questions import misfit
from hf_gradacc.loss.coupled.cuts import find_replay
from hf_gradacc.loss.coupling import Coupling, Exchange, ForwardEnded
from hf_gradacc.loss.facts import LossFacts, Weighing, rounding_of
from hf_gradacc.loss.refusals import find_inexact_by_name
from hf_gradacc.loss.router.balance import find_router_loss
from hf_gradacc.ranks.engine import Engine
from hf_gradacc.safety.out_of_memory import is_out_of_memory
from hf_gradacc.updates.collator import make_micro_batch

__all__ = ["find_coupling", "may_balance_experts", "measure_coupling"]

logger = logging.get_logger(__name__)

Finder = Callable[[Any, nn.Module, LossFacts], "Coupling | None"]
"""Looks at a trainer, its bare model, and what is known of the loss."""


def _find_router_loss(trainer: Any, model: nn.Module, facts: LossFacts) -> Coupling | None:
    """Balance experts over the update, if the model has a router loss or rows do not add up."""
    if not facts.misfit and not has_router_loss(model):
        return None
    plugin = getattr(trainer.accelerator.state, "dynamo_plugin", None)
    is_compiled = plugin is not None and plugin.backend != DynamoBackend.NO
    return find_router_loss(model, compiled=is_compiled or trainer.args.torch_compile)


def may_balance_experts(trainer: Any, model: nn.Module) -> bool:
    """Return whether two passes are likely to make a model's router loss exact."""
    if trainer.args.update_passes == 1 or not has_router_loss(model):
        return False
    return find_router_loss(model) is not None


_FINDERS: tuple[Finder, ...] = (_find_router_loss,)


def find_coupling(
    trainer: Any,
    loss: Loss,
    inputs: Mapping[str, Any],
    parts: Sequence[Mapping[str, Any]],
    facts: LossFacts,
    *,
    dtype: torch.dtype,
    engine: Engine,
    rows_per_sequence: int | None = 1,
    left: bool = False,
) -> LossFacts:
    """Return the facts with what couples rows, if two passes make such an update exact.

    Args:
        trainer: The trainer.
        loss: Of its bare model, held in the mode to ask in.
        inputs: Collated rows.
        parts: The same rows in two parts or more.
        facts: What was found out about the loss.
        dtype: The coarsest dtype of a forward.
        engine: How the ranks work together.
        rows_per_sequence: Collated rows of each; None if they cannot be told apart.
        left: Padding goes in front.
    """
    passes = trainer.args.update_passes
    if passes == 1 or facts.terms or engine.layout.row_parts > 1 or len(parts) < 2:
        return facts
    replayed = partial(
        find_replay,
        inputs=inputs,
        parts=parts,
        compute=lambda rows: loss.compute(rows, None),
        dtype=dtype,
        rows_per_sequence=rows_per_sequence,
        left=left,
    )
    finders: list[Finder] = [*_FINDERS, partial(_find_replay, replayed)]
    for find in finders:
        coupling = find(trainer, loss.model, facts)
        if coupling is None:
            continue
        error = _measured(trainer, coupling, loss, inputs, parts, facts, rows_per_sequence)
        limits = rounding_of(dtype), rounding_of(dtype, "rows_gradient")
        if error is not None and error[0] <= limits[0] and error[1] <= limits[1]:
            return dataclasses.replace(facts, coupling=coupling, misfit="", rule_error=error[0])
    if passes == 2:
        logger.warning_once(
            "update_passes = 2: nothing was found that couples the rows of an update, or that two "
            "passes would make exact. Updates run in one."
        )
    return facts


def _find_replay(
    find: Callable[..., Coupling | None], trainer: Any, model: nn.Module, facts: LossFacts
) -> Coupling | None:
    """Take the loss once over all rows, if rows do not add up or its name says they may not."""
    is_expected = bool(facts.misfit) or any(find_inexact_by_name(trainer))
    if not is_expected or facts.wants_own_count:
        return None
    return find(trainer, model)


def _measured(
    trainer: Any,
    coupling: Coupling,
    loss: Loss,
    inputs: Mapping[str, Any],
    parts: Sequence[Mapping[str, Any]],
    facts: LossFacts,
    rows_per_sequence: int | None,
) -> tuple[float, float] | None:
    """Measure a candidate; None if the model cannot be run that way."""
    try:
        return measure_coupling(
            trainer, coupling, loss, inputs, parts, facts, rows_per_sequence=rows_per_sequence
        )
    except GradAccError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        logger.info("two passes were not possible: %s: %s", type(error).__name__, error)
        return None
    finally:
        coupling.begin()  # holds on to nothing


def measure_coupling(
    trainer: Any,
    coupling: Coupling,
    loss: Loss,
    inputs: Mapping[str, Any],
    parts: Sequence[Mapping[str, Any]],
    facts: LossFacts,
    *,
    rows_per_sequence: int | None = 1,
) -> tuple[float, float]:
    """Measure how far two passes over parts are from the rows together.

    Returns:
        The relative errors of loss and gradient. The gradient is that of the last few parameters,
        and of those in ``coupling.watched`` if it has any.
    """
    collated = partial(make_micro_batch, rows_per_sequence=rows_per_sequence)
    micro_batches = [collated(dict(part)) for part in parts]

    def count(micro_batch: Any) -> int | None:
        return micro_batch.targets.under(facts.rule) if facts.wants_own_count else None

    sizes = [facts.size_of(micro_batch) for micro_batch in micro_batches]
    coupling.begin()
    for micro_batch in micro_batches:
        with (
            contextlib.suppress(ForwardEnded),
            coupling.gathering(micro_batch, may_end=loss.can_differentiate),
        ):
            loss.value(micro_batch.inputs, count(micro_batch))
    with torch.enable_grad():
        coupling.couple(Exchange())
    watched: Sequence[nn.Parameter] = getattr(coupling, "watched", ())
    whole = loss.ask_anew(inputs, count(collated(dict(inputs))), watched=watched)
    answers = []
    for i, micro_batch in enumerate(micro_batches):
        trainer._loss_settler.coupling = coupling
        try:
            scale = facts.divisor(micro_batch, of=sum(sizes), num_micro_batches=len(micro_batches))
            with coupling.applying(i, scale=scale):
                answers.append(
                    loss.ask_anew(micro_batch.inputs, count(micro_batch), watched=watched)
                )
        finally:
            trainer._loss_settler.coupling = None
    weighing: Weighing = "sum" if facts.weighing == "sum" else "mean"
    if facts.weighing == "micro_batch":
        sizes = [1.0] * len(answers)
    return misfit(whole, answers, sizes, weighing)
