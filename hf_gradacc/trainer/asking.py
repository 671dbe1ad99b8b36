"""Ask a trainer's own model how its loss counts: with its `compute_loss`, precision and padding."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from hf_gradacc.errors import DataError
from hf_gradacc.loss.asking import (
    Loss,
    ask,
    dtype_computed_in,
    held_in_eval_mode,
    sample_of,
    with_warnings,
)
from hf_gradacc.loss.facts import LossFacts
from hf_gradacc.loss.probe_rows import ProbeRows
from hf_gradacc.loss.shortcuts import Setting, Shortcuts, choose_shortcuts
from hf_gradacc.ranks.engine import Engine
from hf_gradacc.safety.rollback import BufferState, RandomState
from hf_gradacc.updates.batch import count_rows
from hf_gradacc.updates.stream import is_stream
from hf_gradacc.updates.targets import TargetRule, can_have_target, count_all_targets

__all__ = [
    "ask_trainer",
    "has_foreign_loss",
    "padding_style",
    "prepared",
    "refuse_data_without_targets",
    "without_trace",
]

logger = logging.get_logger(__name__)


def ask_trainer(
    trainer: Any, model: nn.Module, inputs: Any, *, sample: ProbeRows | None, engine: Engine
) -> tuple[LossFacts, Shortcuts | None]:
    """Ask the model how its loss counts and which shortcuts it allows; say what is not exact.

    While the loss is asked, ``trainer.facts`` is None, so that labels are not smoothed. It is set
    before shortcuts are tried, because they must reproduce the smoothed loss.

    Args:
        trainer: The trainer. What was found is written into its collator, if it has one.
        model: The model, wrapped or bare.
        inputs: Collated rows to ask with.
        sample: The dataset rows they are made of; None if those are not known.
        engine: How the ranks work together.

    Returns:
        What the loss is a mean over, and the shortcuts taken; None for them if the trainer does not
        use our loader.

    Raises:
        LossError: If the loss is not a mean.
        ConfigError: If a shortcut was asked for by name and would not give the same gradient.
    """
    if not isinstance(inputs, Mapping) or count_rows(inputs) == 0:
        unknown = (
            "the data collator returns no tensors by name, so what the loss is a mean over cannot "
            "be asked: each micro-batch is weighted by its rows. That is exact if the loss is a "
            "mean over rows."
        )
        logger.warning_once(f"{type(trainer.model).__name__}: {unknown}")
        return LossFacts(TargetRule.SEQUENCE, warnings=(unknown,)), None
    args, collator = trainer.args, trainer.update_collator
    asked, known = sample_of(inputs, sample)
    bare = trainer.accelerator.unwrap_model(model, keep_torch_compile=False)
    dtype = dtype_computed_in(bare, bf16=args.bf16, fp16=args.fp16)

    def compute(part: Mapping[str, Any], count: int | None) -> Tensor:
        num_items = None if count is None else torch.tensor(count, device=args.device)
        with trainer.compute_loss_context_manager():
            loss: Tensor = trainer.compute_loss(
                bare, prepared(trainer, part), num_items_in_batch=num_items
            )
        return loss

    loss, shortcuts = Loss(bare, compute), None
    with without_trace(bare, args.device), held_in_eval_mode(bare):
        facts = ask(
            loss,
            asked,
            known,
            dtype=dtype,
            can_differentiate=engine.can_differentiate_outside,
            **padding_style(trainer),
        )
        if collator is not None:
            trainer.facts = facts
            setting = Setting(
                args,
                facts,
                has_loss_func=trainer.compute_loss_func is not None,
                has_foreign_loss=has_foreign_loss(type(trainer)),
                smooths_labels=trainer.label_smoother is not None,
                lockstep=engine.lockstep,
            )
            shortcuts = choose_shortcuts(bare, asked, loss.value, setting=setting, dtype=dtype)
    facts = with_warnings(facts, bare, trainer.sample)
    for warning in facts.warnings:
        logger.warning_once(f"{type(bare).__name__}: {warning}")
    if collator is not None and shortcuts is not None:
        collator.packed = shortcuts.packed
        collator.rule, collator.pad_to_one_width = facts.rule, facts.pad_to_one_width
    return facts, shortcuts


def prepared(trainer: Any, inputs: Mapping[str, Any]) -> Any:
    """Prepare collated inputs as the trainer does before a forward: move and cast them."""
    return trainer._prepare_inputs(inputs)


@contextlib.contextmanager
def without_trace(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Run a block that leaves buffers and random states as they were."""
    random_state, buffers = RandomState(device), BufferState(model)
    try:
        yield
    finally:
        buffers.restore()
        random_state.restore()


def refuse_data_without_targets(dataset: Any, sample: ProbeRows | None, rule: TargetRule) -> None:
    """Refuse a dataset in which no row has a target under the loss's rule.

    Raises:
        DataError: If no row has a target.
    """
    if sample is None or is_stream(dataset) or not hasattr(dataset, "__getitem__"):
        return
    counts = count_all_targets(sample.inputs, num_sequences=len(sample.rows), num_input_tokens=2)
    if counts.under(rule):
        return
    if any(can_have_target(dataset[i], rule=rule) for i in range(len(dataset))):
        return
    raise DataError(
        f"none of the {len(dataset)} training rows has a target: all labels but each row's first "
        f"are -100, and this model predicts every label from the one before. Check how the "
        f"prompt is masked and how rows are cut."
    )


def padding_style(trainer: Any) -> dict[str, Any]:
    """Return how the trainer's data collator pads: with which token, and on which side."""
    tokenizer, config = trainer.processing_class, getattr(trainer.model, "config", None)
    pad = getattr(tokenizer, "pad_token_id", None)
    pad = getattr(config, "pad_token_id", None) if pad is None else pad
    left = getattr(tokenizer, "padding_side", "right") == "left"
    return {"pad_token_id": pad or 0, "left": left}


def has_foreign_loss(trainer_class: type) -> bool:
    """Return whether a class other than the stock Trainer and ours defines ``compute_loss``."""
    return any(
        "compute_loss" in vars(cls)
        and cls is not Trainer
        and cls.__module__.partition(".")[0] != "hf_gradacc"
        for cls in trainer_class.__mro__
    )
