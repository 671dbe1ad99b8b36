"""The loss of rows that several ranks compute together.

What it is a mean over was asked of whole rows, in evaluation mode, where they are not split. Here
it is computed from parts, with a count that makes their losses add up, see
`ranks.sequence_parallel`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers.utils import logging

from hf_gradacc.errors import ConfigError, LossError
from hf_gradacc.loss.facts import LossFacts
from hf_gradacc.ranks.layout import RankLayout
from hf_gradacc.ranks.sequence_parallel import part_of_rows, rows_for_ring
from hf_gradacc.trainer.loss.asking import has_foreign_loss
from hf_gradacc.updates.targets import TargetRule

__all__ = ["loss_in_ring", "loss_of_part", "refuse_losses_of_whole_rows"]

logger = logging.get_logger(__name__)


def refuse_losses_of_whole_rows(trainer: Any, facts: LossFacts | None = None) -> None:
    """Refuse losses that need whole rows, or that nobody can make a sum over parts.

    Args:
        trainer: The trainer.
        facts: What its loss is a mean over; None if that is not known yet.

    Raises:
        ConfigError: If the loss is not the model's own.
        LossError: If the model's own is no mean over the next tokens.
    """
    layout = trainer.rank_layout
    if layout.row_parts == 1:
        return
    setting = "cp_size" if layout.cp_size > 1 else "sp_size"
    size = f"{setting} = {layout.row_parts}"
    model = trainer.accelerator.unwrap_model(trainer.model)
    parameters = inspect.signature(model.forward).parameters.values()
    reason = None
    if trainer.compute_loss_func is not None:
        reason = "compute_loss_func"
    elif trainer.label_smoother is not None:
        reason = "label_smoothing_factor"
    elif has_foreign_loss(type(trainer)):
        reason = f"compute_loss of {type(trainer).__name__}"
    elif not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        reason = f"{type(model).__name__}.forward, which takes no **kwargs,"
    if reason is not None:
        raise ConfigError(
            f"{size} splits rows between ranks, and {reason} does not know what the others hold: "
            f"their losses would not add up. Leave it out, or train without {setting}."
        )
    if layout.cp_size > 1:
        logger.warning_once(
            f"{size}: exact in tests on CPUs with a stand-in for torch's ring attention, which has "
            f"not been run here. Compare the first losses with those of a run without it."
        )
    if facts is not None and (facts.rule is not TargetRule.NEXT_TOKEN or facts.weighing != "mean"):
        raise LossError(
            f"{size} splits rows between ranks, and the loss of {type(model).__name__} is no mean "
            f"over the tokens that follow: losses of parts do not add up to it.\n"
            f"  Train without {setting}."
        )


def loss_in_ring(
    stock_step: Callable[..., Any],
    model: nn.Module,
    inputs: Any,
    loss_only: bool,
    ignore_keys: Any,
    *,
    layout: RankLayout,
) -> Any:
    """Evaluate rows that a ring of ranks computes together.

    Returns:
        What the stock ``prediction_step`` returns. The loss is this rank's part, times the number
        of parts: the mean over ranks is the mean loss of the rows.
    """
    if isinstance(inputs, Mapping) and "labels" in inputs:
        inputs = rows_for_ring(inputs, layout, device=inputs["input_ids"].device)
    loss, *rest = stock_step(model, inputs, loss_only, ignore_keys)
    return (None if loss is None else loss * layout.cp_size, *rest)


def loss_of_part(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    count: Tensor | int,
    layout: RankLayout,
    return_outputs: bool,
) -> Any:
    """Compute this rank's part of a micro-batch's mean loss; the parts of all ranks add up to it.

    Args:
        model: The wrapped model, in training mode.
        inputs: The rows, whole, on the device.
        count: Targets of the whole rows.
        layout: Which part is this rank's.
        return_outputs: Return the outputs too.
    """
    part = part_of_rows(inputs, layout)
    outputs = model(**part, labels=part["shift_labels"], num_items_in_batch=count)
    loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs[0]
    return (loss, outputs) if return_outputs else loss
