"""Time the first updates of a run whose token budget tunes itself, and choose the next budget."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from hf_gradacc.loss.shortcuts.choose import describe_speed
from hf_gradacc.tracking.install import record_event
from hf_gradacc.updates.budget import BudgetTuner, LayoutTurns, TokenBudget
from hf_gradacc.updates.remembered_budgets import describe_setting, load_budget, store_budget
from hf_gradacc.updates.update import Update

__all__ = ["timed_for_budget"]

logger = logging.get_logger(__name__)


@contextlib.contextmanager
def timed_for_budget(
    trainer: Any, model: nn.Module, update: Update, budget: TokenBudget
) -> Iterator[None]:
    """Time one update while budgets are being tried, and choose the budget of the next.

    Args:
        trainer: The trainer; the next budget is written into its collator.
        model: The wrapped model.
        update: The update that runs inside.
        budget: The run's budget.
    """
    tuner = budget.tuner
    if tuner is None or tuner.settled:
        with _timed_for_layout(trainer, update, budget):
            yield
        return
    if budget.cap is not None and tuner.tokens > budget.cap:
        tuner.forbid(tuner.tokens)
    device = trainer.args.device
    _finish_device_work(device)
    started, cap = time.perf_counter(), budget.cap
    yield
    _finish_device_work(device)
    if budget.cap != cap and update.max_tokens is not None:
        tuner.forbid(update.max_tokens)  # it ran out of memory and was run again, cut finer
    else:
        longest = max((max(mb.lengths, default=0) for mb in update), default=0)
        tuner.note(
            update.max_tokens,
            seconds=time.perf_counter() - started,
            num_tokens=sum(micro_batch.num_input_tokens for micro_batch in update),
            longest=longest,
        )
        if trainer.args.remember_tuned_budget and tuner.num_updates == 1:
            tuner.setting = _describe(trainer, model, longest=longest)
            if (remembered := load_budget(tuner.setting)) is not None:
                tuner.adopt(remembered)
    if trainer.update_collator is not None:
        trainer.update_collator.max_tokens = tuner.tokens
    _announce_if_settled(trainer, tuner)


@contextlib.contextmanager
def _timed_for_layout(trainer: Any, update: Update, budget: TokenBudget) -> Iterator[None]:
    """Time one update of trees or of rows while the two take turns, after the budget is settled."""
    turns, cap = budget.turns, budget.cap
    # Without a budget it was cut at random, to measure noise: rows whatever trees would save.
    if turns is None or update.max_tokens is None or not _takes_turns(trainer, turns):
        yield
        return
    device = trainer.args.device
    has_trees = any(micro_batch.trees is not None for micro_batch in update)
    _finish_device_work(device)
    started = time.perf_counter()
    yield
    _finish_device_work(device)
    # Where trees would save too little, none were taken: such an update compares nothing, and
    # neither does one that ran out of memory and was run again.
    if budget.cap == cap and update.takes_trees and not has_trees:
        turns.note_without_saving()
    elif budget.cap == cap:
        turns.note(
            has_trees,
            seconds=time.perf_counter() - started,
            num_tokens=sum(micro_batch.num_input_tokens for micro_batch in update),
        )
    trainer.update_collator.takes_trees = turns.with_trees
    if turns.settled:
        logger.info(turns.describe())
        record_event(trainer, "layout_tuned", text=turns.describe() + ".", alert=False)


def _takes_turns(trainer: Any, turns: LayoutTurns) -> bool:
    """Return whether trees are still to be compared with rows, and nobody asked for either."""
    shares = trainer.shortcuts is not None and bool(trainer.shortcuts.bodies)
    is_open = trainer.args.layout == "auto" and trainer.update_collator is not None
    return shares and is_open and not turns.settled


def _describe(trainer: Any, model: nn.Module, *, longest: int) -> str:
    """Describe what the fastest budget of this run depends on."""
    bare = trainer.accelerator.unwrap_model(model, keep_torch_compile=False)
    return describe_setting(
        bare,
        device=trainer.args.device,
        longest=longest,
        world_size=trainer.args.world_size,
        extra=describe_speed(bare, trainer.shortcuts, trainer.args),
    )


def _announce_if_settled(trainer: Any, tuner: BudgetTuner) -> None:
    if not tuner.settled:
        return
    if tuner.setting and tuner.tried and trainer.is_world_process_zero():
        store_budget(tuner.setting, tuner.tokens)
    logger.info(tuner.describe())
    record_event(trainer, "budget_tuned", text=tuner.describe() + ".", alert=False)


def _finish_device_work(device: torch.device) -> None:
    """Wait for the device, which runs kernels later than they are launched. Only while tuning."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
