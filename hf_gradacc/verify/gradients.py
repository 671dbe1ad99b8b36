"""Gradients for `hf_gradacc.verify`: of a trainer's plan, and of the same rows at once."""

from __future__ import annotations

import contextlib
import copy
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from hf_gradacc.errors import ConfigError
from hf_gradacc.trainer.loss.asking import prepared
from hf_gradacc.trainer.mixin import GradAccMixin
from hf_gradacc.updates.batch import count_rows, slice_rows
from hf_gradacc.updates.targets import TargetRule, count_targets
from hf_gradacc.updates.update import Update

__all__ = [
    "Accumulated",
    "Differentiated",
    "accumulate",
    "arguments_for_one_update",
    "collate_at_once",
    "collate_by_row",
    "copy_gradient",
    "differentiate",
    "relative_error",
    "scale",
    "stock_class_of",
]

Gradient = dict[str, Tensor]
"""Parameter name -> its gradient, a copy on the CPU."""


@dataclass
class Accumulated:
    """What one trainer left in ``.grad`` after one update.

    Attributes:
        trainer: The trainer, stopped before its optimizer stepped.
        gradient: Its gradient.
        rule: What it counted as targets.
        num_targets: How many it counted.
        pieces: The micro-batches it ran, as collated.
        warnings: What it said about the loss.
    """

    trainer: Any
    gradient: Gradient
    rule: TargetRule = TargetRule.SEQUENCE
    num_targets: int = 0
    pieces: tuple[dict[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass
class Differentiated:
    """The reference.

    Attributes:
        gradient: Of the mean loss over all rows.
        loss: That mean.
        num_targets_reached: Predictions the loss has a gradient for, None if unknown.
    """

    gradient: Gradient
    loss: float
    num_targets_reached: int | None


def relative_error(actual: Gradient, expected: Gradient) -> float:
    """``|actual - expected| / |expected|`` over all parameters; one that is missing is zero."""
    apart = size = 0.0
    for name in actual.keys() | expected.keys():
        a, b = actual.get(name), expected.get(name)
        if b is not None:
            size += float(b.double().square().sum())
        some = b if a is None else a
        assert some is not None
        difference = some if a is None or b is None else a.double() - b.double()
        apart += float(difference.double().square().sum())
    return math.sqrt(apart / size) if size else math.inf if apart else 0.0


def scale(actual: Gradient, expected: Gradient) -> float:
    """The least-squares multiple of `expected` in `actual`."""
    shared = actual.keys() & expected.keys()
    dot = sum(float((actual[n].double() * expected[n].double()).sum()) for n in shared)
    size = sum(float(b.double().square().sum()) for b in expected.values())
    return dot / size if size else math.nan


class _StopBeforeStep(Exception):  # noqa: N818  (control flow, not an error)
    """Leaves the training loop once the gradient is complete."""


class _KeepGradient(TrainerCallback):
    gradient: Gradient | None = None

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self.gradient = copy_gradient(model)
        raise _StopBeforeStep


def copy_gradient(model: nn.Module) -> Gradient:
    """Copy the gradients of a model to the CPU."""
    return {
        name: parameter.grad.detach().to("cpu", copy=True)
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def stock_class_of(trainer_class: type[Any]) -> type[Any]:
    """The nearest base class of a trainer that accumulates as the stock Trainer does."""
    return next(
        base
        for base in trainer_class.__mro__
        if issubclass(base, Trainer) and not issubclass(base, GradAccMixin)
    )


def accumulate(
    trainer_class: type[Any],
    model: nn.Module,
    rows: list[Any],
    arguments: Any,
    parts: Mapping[str, Any],
) -> Accumulated | None:
    """Run one update of all rows through a trainer, up to its optimizer step.

    Args:
        trainer_class: Ours or the stock one.
        model: Left with the weights it has, and without gradients.
        rows: The update.
        arguments: Of the run; see `arguments_for_one_update`.
        parts: Further arguments of the trainer's constructor.

    Returns:
        None if the trainer made no step, because nothing in the rows is a target.
    """
    keep = _KeepGradient()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            model=model,
            args=arguments_for_one_update(arguments, len(rows), folder),
            train_dataset=rows,
            callbacks=[keep],
            **parts,
        )
        pieces = _record_pieces(trainer)
        try:
            with contextlib.suppress(_StopBeforeStep):
                trainer.train()
        finally:
            # Mixed precision wraps forward; the model is the user's.
            trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
            model.zero_grad(set_to_none=True)
    if keep.gradient is None:
        return None
    result = Accumulated(trainer, keep.gradient, pieces=tuple(pieces))
    facts = getattr(trainer, "facts", None)
    if facts is not None:
        result.rule, result.warnings = facts.rule, facts.warnings
        result.num_targets = trainer.last_update.stats.num_targets
    return result


def _record_pieces(trainer: Any) -> list[dict[str, Any]]:
    """Note the micro-batches of the update that a trainer is about to run."""
    pieces: list[dict[str, Any]] = []
    step = trainer.training_step

    def training_step(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        pieces.extend(dict(mb.inputs) for mb in inputs if isinstance(inputs, Update))
        return step(model, inputs, *args, **kwargs)

    trainer.training_step = training_step
    return pieces


def arguments_for_one_update(arguments: Any, num_rows: int, folder: str) -> Any:
    """A copy of a run's arguments that makes one update of all rows and leaves nothing behind.

    Raises:
        ConfigError: If the run is on several ranks or under an engine that shards weights.
    """
    if arguments.world_size > 1 or arguments.deepspeed or arguments.fsdp:
        raise ConfigError(
            f"verify_parity runs in one process without DeepSpeed or FSDP (world_size = "
            f"{arguments.world_size}, deepspeed = {arguments.deepspeed!r}, fsdp = "
            f"{arguments.fsdp!r}): the gradient does not depend on the ranks, so check it on one."
        )
    one = copy.copy(arguments)
    rows = min(one.per_device_train_batch_size, -(-num_rows // 2))  # two pieces at least
    changes = {
        "output_dir": folder,
        "max_steps": 1,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": -(-num_rows // rows),
        "effective_batch_size": None,
        "tokens_per_update": None,
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "optim_args": None,
        "neftune_noise_alpha": None,
        "torch_compile": False,
        "report_to": [],
        "disable_tqdm": True,
        "log_level": "error",  # no plan is printed for what is no training
        "logging_strategy": IntervalStrategy.NO,
        "eval_strategy": IntervalStrategy.NO,
        "eval_on_start": False,
        "save_strategy": SaveStrategy.NO,
        "load_best_model_at_end": False,
        "push_to_hub": False,
        "dataloader_num_workers": 0,
        "dataloader_drop_last": False,
        "incomplete_update": "keep",
    }
    for name, value in changes.items():
        if hasattr(one, name):
            setattr(one, name, value)
    return one


def collate_at_once(trainer: Any, rows: list[Any]) -> dict[str, Any]:
    """All rows padded together by the trainer's collator."""
    return dict(trainer.data_collator(rows))


def collate_by_row(trainer: Any, rows: list[Any]) -> list[dict[str, Any]]:
    """The same padding, one row each."""
    collated = collate_at_once(trainer, rows)
    per_sequence = _rows_per_sequence(trainer)
    return [slice_rows(collated, [i], rows_per_sequence=per_sequence) for i in range(len(rows))]


def _rows_per_sequence(trainer: Any) -> int:
    """Collated rows of each sequence: two for a pair of answers."""
    collator = trainer.update_collator
    return 1 if collator is None else collator.rows_per_sequence or 1


def differentiate(trainer: Any, pieces: Sequence[dict[str, Any]]) -> Differentiated:
    """Differentiate the loss over pieces, each weighted by its own targets unless it is a sum.

    Args:
        trainer: The trainer that ran the rows; its loss is taken, not its weights, and not its
            counts unless the model's outputs do not say how many targets a piece has.
        pieces: Collated batches: all rows in one, or cut in some way.
    """
    model = trainer.model
    gradient: dict[str, Tensor] = {}
    losses, counts, seen = [], [], []
    is_sum = trainer.facts.weighing == "sum"
    for piece in pieces:
        num_sequences = count_rows(piece) // _rows_per_sequence(trainer)
        count = count_targets(piece, trainer.facts.rule, num_sequences=num_sequences)
        if not count:
            continue
        model.zero_grad(set_to_none=True)
        loss, reached = _backward(trainer, model, piece, count)
        weight: float = 1 if is_sum else count if reached is None else reached
        if trainer.facts.class_weights is not None:
            weight = trainer.facts.class_weights.total(piece, trainer.facts.rule)
        for name, part in copy_gradient(model).items():
            part = part if len(pieces) == 1 else part.double() * weight
            gradient[name] = gradient[name] + part if name in gradient else part
        losses.append(loss)
        counts.append(weight)
        seen.append(reached)
    model.zero_grad(set_to_none=True)
    total = 1 if is_sum else sum(counts)
    if len(pieces) > 1:
        gradient = {name: part / total for name, part in gradient.items()}
    loss = sum(n * value for n, value in zip(counts, losses, strict=True)) / max(total, 1)
    known = [n for n in seen if n is not None]
    return Differentiated(gradient, loss, sum(known) if len(known) == len(seen) else None)


def _backward(
    trainer: Any, model: nn.Module, piece: dict[str, Any], count: int
) -> tuple[float, int | None]:
    """Backward of one forward; its loss, and the number of predictions the loss looks at."""
    inputs = prepared(trainer, dict(piece))
    own = torch.tensor(count, device=trainer.args.device)
    with trainer.compute_loss_context_manager():
        loss, outputs = trainer.compute_loss(
            model,
            inputs,
            return_outputs=True,
            num_items_in_batch=own if trainer.facts.wants_own_count else None,
        )
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    if not isinstance(logits, Tensor) or not logits.requires_grad:
        trainer.accelerator.backward(loss)
        return float(loss.detach()), None
    logits.retain_grad()
    trainer.accelerator.backward(loss)
    if logits.grad is None:
        return float(loss.detach()), None
    # [rows, seq, vocabulary] of a token level loss; any other has one target per row.
    level = 2 if trainer.facts.rule is not TargetRule.SEQUENCE else 1
    touched = logits.grad.ne(0).flatten(level).any(-1) if logits.ndim > level else None
    if touched is None:
        return float(loss.detach()), None
    # One target of a pair is reached by the scores of both its answers.
    per_target = _rows_per_sequence(trainer) if level == 1 else 1
    return float(loss.detach()), int(touched.sum()) // per_target
