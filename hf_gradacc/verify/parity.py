"""The parity check: on your model and your rows, is the accumulated gradient that of the whole?

`verify_parity` takes the rows of one update and compares three gradients: of all rows at once,
of the plan that training would use, and of the stock Trainer. It trains nothing: each trainer is
stopped before its optimizer could step. Dropout is off while gradients are compared, since no two
cuts draw the same one, and so is mixed precision; half-precision weights are compared in float32,
where rounding hides less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hf_gradacc.arguments import GradAccArguments
from hf_gradacc.errors import ConfigError, DataError, LossError
from hf_gradacc.loss.asking.ask import has_router_loss
from hf_gradacc.loss.facts import rounding_of
from hf_gradacc.safety.out_of_memory import free_memory, is_out_of_memory
from hf_gradacc.safety.waiting import telling
from hf_gradacc.trainer.mixin import GradAccTrainer
from hf_gradacc.updates.targets import TargetRule
from hf_gradacc.verify.conditions import (
    compared_in,
    own_log_level,
    without_autocast,
    without_dropout,
)
from hf_gradacc.verify.gradients import (
    Differentiated,
    Gradient,
    accumulate,
    collate_at_once,
    collate_by_row,
    differentiate,
    relative_error,
    scale,
    stock_class_of,
)
from hf_gradacc.verify.preflight import run_preflight
from hf_gradacc.verify.result import ParityReport

__all__ = ["verify_parity"]


@own_log_level()
def verify_parity(
    model: nn.Module,
    rows: Sequence[Any],
    *,
    data_collator: Any = None,
    processing_class: Any = None,
    arguments: Any = None,
    compute_loss_func: Any = None,
    trainer_class: type[Any] = GradAccTrainer,
    trainer_parts: Mapping[str, Any] | None = None,
    reference: str = "auto",
    compare_with_stock: bool = True,
    preflight_rows: Sequence[Any] | None = None,
) -> ParityReport:
    """Compare the gradient our plan accumulates with that of all rows at once.

    Weights, their dtype and the model's mode are afterwards what they were; gradients are None.

    Args:
        model: The model as it would be trained, adapters included.
        rows: Dataset rows of one update; eight to thirty-two of unequal length show most.
        data_collator: As for the trainer.
        processing_class: As for the trainer.
        arguments: `GradAccArguments` of the run; its micro-batch options are used, the size of the
            update is that of `rows`. Default: a quarter of the rows in a micro-batch.
        compute_loss_func: As for the trainer.
        trainer_class: Any class with `GradAccMixin`.
        trainer_parts: What else its constructor takes, such as TRL's `ref_model`.
        reference: ``whole`` batch at once, single ``rows`` padded alike and weighted by their
            targets, or ``auto``: rows where the whole runs out of memory.
        compare_with_stock: Also measure what the stock Trainer would have given.
        preflight_rows: Rows whose longest are run once, forward and backward, to know memory and
            time; `rows` themselves if empty, nothing if None.

    Returns:
        The figures. ``report.passed`` says whether accumulation is exact;
        ``report.raise_if_failed()`` raises if it is not.

    Raises:
        ConfigError: If `arguments` ask for several ranks, DeepSpeed or FSDP.
        DataError: If there are fewer than two rows, or no row has a target.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8,
    ...                      num_hidden_layers=1, num_attention_heads=1)
    >>> rows = [{"input_ids": [1] * 9, "labels": [-100] * n + [1] * (9 - n)} for n in (1, 3, 7)]
    >>> report = verify_parity(LlamaForCausalLM(config), rows)
    >>> report.passed, report.num_targets, report.num_micro_batches
    (True, 16, 3)
    """
    rows = list(rows)
    if reference not in ("auto", "whole", "rows"):
        raise ConfigError(f"reference = {reference!r}: use 'auto', 'whole' or 'rows'.")
    if len(rows) < 2:
        raise DataError(f"rows holds {len(rows)}: an update needs two or more to be cut.")
    arguments = arguments or _default_arguments(len(rows))
    parts = {
        "data_collator": data_collator,
        "processing_class": processing_class,
        **({} if compute_loss_func is None else {"compute_loss_func": compute_loss_func}),
        **(trainer_parts or {}),
    }
    facts: dict[str, Any] = {"num_sequences": len(rows)}
    problems: list[str] = []
    with compared_in(model) as dtype, without_dropout(model), without_autocast(arguments) as plain:
        facts["dtype"] = str(dtype).removeprefix("torch.")
        facts["tolerance"] = rounding_of(dtype, "update_gradient")
        try:
            with telling(f"verify: the gradient of {len(rows)} rows in micro-batches"):
                ours = accumulate(trainer_class, model, rows, plain, parts)
        except LossError as error:
            return ParityReport((str(error),), **facts)
        if ours is None:
            raise DataError(
                f"no row of the {len(rows)} has a target: all their labels are -100 (or, in a "
                f"causal LM, all but the first). Look at how the labels were made."
            )
        expected = None
        if reference != "rows":
            with telling(f"verify: the gradient of the {len(rows)} rows at once"):
                expected = _at_once(ours.trainer, rows, reference)
        facts["reference"] = "single rows" if expected is None else "whole batch"
        if expected is None:
            with telling(f"verify: the gradients of the {len(rows)} rows, one by one"):
                expected = differentiate(ours.trainer, collate_by_row(ours.trainer, rows))
        facts |= {
            "warnings": ours.warnings,
            "num_targets": ours.num_targets,
            "num_targets_reached": expected.num_targets_reached,
            "target_rule": ours.rule.value,
            "num_micro_batches": len(ours.pieces),
            "loss": expected.loss,
            "error": relative_error(ours.gradient, expected.gradient),
            "scale": scale(ours.gradient, expected.gradient),
        }
        if has_router_loss(model) and ours.trainer.facts.coupling is None:
            shares = differentiate(ours.trainer, ours.pieces).gradient
            facts["share_error"] = relative_error(ours.gradient, shares)
        if compare_with_stock:
            with telling("verify: what the stock Trainer gives for the same rows"):
                facts |= _measure_stock(trainer_class, model, rows, plain, parts, expected.gradient)
    counts_targets = ours.trainer.facts.is_plain or has_router_loss(model)
    problems += _find_problems(facts, ours.rule, counts_targets=counts_targets)
    if preflight_rows is not None:
        with telling("verify: the largest micro-batch of the longest rows, to measure it"):
            preflight, problem = run_preflight(
                trainer_class, model, list(preflight_rows) or rows, arguments, parts
            )
        facts["preflight"] = preflight
        problems += [problem] if problem else []
    free_memory(model)
    return ParityReport(tuple(problems), **facts)


def _find_problems(facts: dict[str, Any], rule: TargetRule, *, counts_targets: bool) -> list[str]:
    problems = []
    # In one pass a router loss is not that of the whole; it can only count once, by share.
    error, tolerance = facts.get("share_error", facts["error"]), facts["tolerance"]
    if not error <= tolerance:
        problems.append(
            f"the accumulated gradient is {error:.1e} of its size away from that of the "
            f"{facts['reference']} (scale {facts['scale']:.4f}); rounding in {facts['dtype']} "
            f"explains {tolerance:.0e}. "
            + (
                "The warning says why."
                if facts["warnings"]
                else "Rows of a batch influence each other, or the loss is not a mean over its "
                "targets."
            )
        )
    reached, counted = facts["num_targets_reached"], facts["num_targets"]
    # A loss of terms, or of all rows, may reach more than the targets, or few of the rows.
    by_token = rule is not TargetRule.SEQUENCE
    is_short = reached is not None and reached < counted and (counts_targets or by_token)
    if is_short or (reached is not None and reached > counted and counts_targets):
        missed = f"ignores {counted - reached:,} of" if reached < counted else "has more terms than"
        problems.append(
            f"the loss {missed} the {counted:,} targets in the labels ({rule.value}): it reaches "
            f"{reached:,} predictions. Give ignored labels the value -100, so that they are "
            f"counted as what they are."
        )
    return problems


def _at_once(trainer: Any, rows: list[Any], reference: str) -> Differentiated | None:
    """The whole batch's gradient, None if it does not fit and single rows will do."""
    try:
        return differentiate(trainer, [collate_at_once(trainer, rows)])
    except RuntimeError as error:
        if reference == "whole" or not is_out_of_memory(error):
            raise
    # Out of the except block: there the traceback would keep the activations alive.
    free_memory(trainer.model)
    return None


def _measure_stock(
    trainer_class: type[Any],
    model: nn.Module,
    rows: list[Any],
    arguments: Any,
    parts: dict[str, Any],
    expected: Gradient,
) -> dict[str, Any]:
    try:
        stock = accumulate(stock_class_of(trainer_class), model, rows, arguments, parts)
    except Exception as error:  # whatever it is, it is the stock Trainer's answer to these rows
        return {"stock_note": f"{type(error).__name__}: {error}".splitlines()[0]}
    if stock is None:
        return {"stock_note": "no step"}
    return {
        "stock_error": relative_error(stock.gradient, expected),
        "stock_scale": scale(stock.gradient, expected),
    }


def _default_arguments(num_rows: int) -> GradAccArguments:
    """Micro-batches of a quarter of the rows, rounded up: four of them, the last one smaller."""
    return GradAccArguments(
        output_dir="verify",
        per_device_train_batch_size=max(1, -(-num_rows // 4)),
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )
