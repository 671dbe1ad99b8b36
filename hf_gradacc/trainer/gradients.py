"""Check an update's gradient before the optimizer steps: one that is NaN or infinite is stopped."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_gradacc.errors import NonFiniteError
from hf_gradacc.ranks.collectives import gather_objects
from hf_gradacc.safety.non_finite import describe_rows, find_bad_tensor
from hf_gradacc.safety.rollback import RandomState, devices_of
from hf_gradacc.tracking.install import record_event
from hf_gradacc.trainer.foreign_metrics import ForeignMetrics
from hf_gradacc.trainer.runner import UpdateResult, UpdateRunner

__all__ = ["GradientGate"]

logger = logging.get_logger(__name__)


class GradientGate:
    """Clips and checks the gradient of an update, and lets it through to the optimizer or not.

    Args:
        metrics: What a skipped update collected is deleted from them.

    Attributes:
        grad_norm: Norm of the last update's gradient before clipping; None if it was not computed.
    """

    def __init__(self, metrics: ForeignMetrics) -> None:
        self.grad_norm: float | None = None
        self._metrics = metrics
        self._num_skipped_in_a_row = 0
        self._loss_before: Tensor | None = None

    def begin_run(self) -> None:
        """Begin a call of ``train()``."""
        self._num_skipped_in_a_row = 0

    def begin_update(self, trainer: Any) -> None:
        """Keep the sum of losses before an update, in case the update is skipped."""
        total = getattr(trainer, "_tr_loss", None)
        self._loss_before = None if total is None else total.clone()

    def take_norm(self) -> float | None:
        """Return the norm of the update that has just ended, for its log row, and forget it."""
        norm, self.grad_norm = self.grad_norm, None
        return norm

    def clip(
        self,
        trainer: Any,
        runner: UpdateRunner,
        result: UpdateResult,
        model: nn.Module,
        stock_clip: Callable[[nn.Module], Any],
    ) -> Any:
        """Clip the gradient. One without targets is left out: a GradScaler must not unscale it."""
        if result.stats.num_targets == 0:
            return torch.zeros((), device=trainer.args.device)
        return runner.engine.clip(model, stock_clip)

    def check(
        self,
        trainer: Any,
        runner: UpdateRunner,
        result: UpdateResult,
        model: nn.Module,
        norm: Any,
        stock_norm: Callable[[nn.Module, Any], Any],
    ) -> Any:
        """Let only finite gradients through to the optimizer, in the dtype of their weights.

        Args:
            trainer: The trainer.
            runner: What ran the update.
            result: What became of the update.
            model: The wrapped model.
            norm: What clipping returned.
            stock_norm: The stock ``_get_grad_norm``.

        Returns:
            The norm of the gradient before clipping.

        Raises:
            NonFiniteError: If the norm is not finite, and ``on_non_finite`` is "raise" or too many
                updates in a row were skipped.
        """
        if result.stats.num_targets == 0:
            return torch.zeros((), device=trainer.args.device)
        norm = runner.engine.grad_norm(model, norm, stock_norm)
        if norm is not None and not self._can_pass(trainer, runner, result, model, norm):
            model.zero_grad()
        if runner.float32 is not None:
            runner.float32.cast_to_weights()
        return norm

    def _can_pass(
        self,
        trainer: Any,
        runner: UpdateRunner,
        result: UpdateResult,
        model: nn.Module,
        norm: Any,
    ) -> bool:
        """Check an update's loss and gradient norm, with one read from the device."""
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else torch.as_tensor(norm)
        # Several ranks have shared whether a loss is bad already, see `UpdateOutcome`.
        is_alone = trainer.args.world_size == 1
        loss = result.local_loss.to(norm) if is_alone else torch.zeros_like(norm)
        norm_value, loss_value = torch.stack([norm, loss]).tolist()
        self.grad_norm = norm_value
        bad_loss = not math.isfinite(loss_value) or bool(result.outcome.bad_loss)
        largest = min(norm_value, trainer.args.max_grad_norm or norm_value)
        overflows = runner.float32 is not None and not runner.float32.can_cast(largest)
        if math.isfinite(norm_value) and not bad_loss and not overflows:
            self._num_skipped_in_a_row = 0
            return True
        if runner.engine.searches_loss_scale and not bad_loss:
            # A GradScaler lets scaled gradients overflow to find its scale, and skips such updates.
            self._forget(trainer, result)
            return True
        self._refuse(trainer, runner, result, model, norm=norm_value)
        if trainer.accelerator.scaler is not None:
            # The scaler has unscaled, and refuses to do so again until it is updated.
            trainer.accelerator.scaler.update()
        return False

    def _refuse(
        self,
        trainer: Any,
        runner: UpdateRunner,
        result: UpdateResult,
        model: nn.Module,
        *,
        norm: float,
    ) -> None:
        """Skip an update, or raise; name the rows that made it bad either way."""
        args, update = trainer.args, result.update
        where = _explain(trainer, runner, result, model)
        text = (
            f"update {update.index} of epoch {update.epoch} (step "
            f"{trainer.state.global_step + 1}) is not finite: gradient norm {norm:g}, {where}."
        )
        if args.on_non_finite == "raise":
            raise NonFiniteError(
                f"{text}\n  The optimizer has not seen it. Look at these rows; lower the learning "
                f"rate; use bf16 instead of fp16; or set on_non_finite = 'skip'."
            )
        self._num_skipped_in_a_row += 1
        if self._num_skipped_in_a_row >= args.max_skipped_updates_in_a_row:
            raise NonFiniteError(
                f"{text}\n  {self._num_skipped_in_a_row} updates in a row were not finite "
                f"(max_skipped_updates_in_a_row = {args.max_skipped_updates_in_a_row}): the "
                f"weights themselves are damaged. Resume from an earlier checkpoint with a lower "
                f"learning rate."
            )
        trainer.accelerator.gradient_state._set_sync_gradients(False)
        self._forget(trainer, result)
        logger.warning(f"{text} It is skipped: the optimizer has not seen it.")
        record_event(trainer, "skipped_update", text=text)

    def _forget(self, trainer: Any, result: UpdateResult) -> None:
        """Remove a skipped update from the logs: its loss, targets and sequences."""
        if self._loss_before is not None:
            trainer._tr_loss.copy_(self._loss_before)
        result.stats = dataclasses.replace(result.stats, num_targets=0, num_sequences=0)
        self._metrics.forget_update()


def _explain(trainer: Any, runner: UpdateRunner, result: UpdateResult, model: nn.Module) -> str:
    """Run micro-batches again to find the first bad tensor; join what all ranks found."""
    after = RandomState(*devices_of(model, trainer.args.device))
    runner.rollback.restore()
    rows = "; ".join(describe_rows(mb) for mb in result.update if not mb.weightless)
    text: str | None = (
        f"its micro-batches held {rows}"  # for sharded weights: no rank can run a micro-batch alone
    )
    if runner.engine.can_roll_back:
        bare = trainer.accelerator.unwrap_model(model, keep_torch_compile=False)
        try:
            text = find_bad_tensor(
                bare,
                result.update.micro_batches,
                lambda mb: runner.run_micro_batches(trainer, model, [mb], result.stats),
            )
        except Exception as error:  # do not raise: the other ranks wait in the collective below
            text = f"running it again failed ({type(error).__name__}: {error})"
        runner.rollback.restore()
    after.restore()
    texts = gather_objects(text)
    if len(texts) > 1:
        text = "; ".join(f"rank {r}: {t}" for r, t in enumerate(texts) if t) or None
    return text or "but each of its micro-batches is finite by itself"
