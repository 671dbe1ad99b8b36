"""The Trainer's side of ``max_tokens_per_micro_batch = "auto"``: time updates, move the budget."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_gradacc.tracking.install import record_event
from hf_gradacc.trainer.guard import GuardedUpdates
from hf_gradacc.updates.budget import BudgetTuner
from hf_gradacc.updates.remembered_budgets import describe_setting, recall_budget, remember_budget
from hf_gradacc.updates.update import Update

__all__ = ["TunedBudget"]

logger = logging.get_logger(__name__)


class TunedBudget(GuardedUpdates):
    """Overrides that time the first updates, for a budget that tunes itself."""

    _tuner: BudgetTuner | None = None
    _setting = ""

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Begin anew with each run: the machine may be another one."""
        tunes = self.args.max_tokens_per_micro_batch == "auto"
        self._tuner = BudgetTuner() if tunes else None
        return super()._prepare_for_training(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Time one update, as long as budgets are being tried."""
        tuner = self._tuner
        if tuner is None or tuner.settled or not isinstance(inputs, Update):
            return super().training_step(model, inputs, num_items_in_batch)
        if self.budget.cap is not None and tuner.budget > self.budget.cap:
            tuner.forbid(tuner.budget)
        self._finish_device_work()
        started = time.perf_counter()
        cap = self.budget.cap
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._finish_device_work()
        if self.budget.cap != cap and inputs.max_tokens is not None:
            tuner.forbid(inputs.max_tokens)  # it ran out of memory, and then again, cut finer
        else:
            longest = max((max(mb.lengths, default=0) for mb in inputs), default=0)
            tuner.note(
                inputs.max_tokens,
                seconds=time.perf_counter() - started,
                num_tokens=sum(micro_batch.num_input_tokens for micro_batch in inputs),
                longest=longest,
            )
            if self.args.remember_tuned_budget and tuner.num_updates == 1:
                self._recall(model, tuner, longest=longest)
        if self._collator is not None:
            self._collator.max_tokens = tuner.budget
        self._announce(tuner)
        return loss

    def _recall(self, model: nn.Module, tuner: BudgetTuner, *, longest: int) -> None:
        """Start with what an earlier run of the same kind settled on."""
        bare = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        self._setting = describe_setting(
            bare,
            device=self.args.device,
            longest=longest,
            world_size=self.args.world_size,
            extra=self._describe_speed(bare),
        )
        if (budget := recall_budget(self._setting)) is not None:
            tuner.adopt(budget)

    def _announce(self, tuner: BudgetTuner) -> None:
        if tuner.settled:
            if self._setting and tuner.tried and self.is_world_process_zero():
                remember_budget(self._setting, tuner.budget)
            logger.info(tuner.describe())
            record_event(self, "budget_tuned", text=tuner.describe() + ".", alert=False)

    def _finish_device_work(self) -> None:
        """Wait for the device: only while tuning, since kernels are launched ahead of time."""
        if self.args.device.type == "cuda":
            torch.cuda.synchronize(self.args.device)
