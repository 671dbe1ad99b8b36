"""The Trainer's numbers: float32 sums, and no update that is NaN or infinite."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.utils import logging

from hf_gradacc.errors import NonFiniteError
from hf_gradacc.ranks.outcome import Outcome
from hf_gradacc.safety.non_finite import describe_rows, find_bad_tensor
from hf_gradacc.safety.precision import Float32Gradients
from hf_gradacc.safety.rollback import RandomState, Rollback
from hf_gradacc.tracking.install import record_event
from hf_gradacc.trainer.noise import MeasuredNoise
from hf_gradacc.updates.update import Update

__all__ = ["CheckedNumbers"]

logger = logging.get_logger(__name__)


class CheckedNumbers(MeasuredNoise):
    """Overrides between an update's gradient and the optimizer.

    Attributes:
        _update: The update as it ran, `_loss` its loss on this rank, `_outcome` what the ranks
            said of it, `_loss_before` the sum of losses logged before it, `_grad_norm` its norm.
    """

    _float32: Float32Gradients | None = None
    _rollback: Rollback | None = None
    _skipped_in_a_row = 0
    _update: Update
    _loss: Tensor
    _outcome: Outcome
    _loss_before: Tensor | None = None
    _grad_norm: float | None = None

    # ---- the dtype of gradients ----------------------------------------------------------------

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Find the weights whose gradients lose most in a sum, once the model is wrapped."""
        model, loader = super()._prepare_for_training(*args, **kwargs)
        self._float32 = None
        if self.args.accumulate_grads_in_fp32 is not False and self._can_roll_back:
            self._float32 = Float32Gradients(model.parameters())
        return model, loader

    @property
    def _can_roll_back(self) -> bool:
        """Whether a forward or backward may be left in the middle: not with collectives in it."""
        return not (self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _choose_precision(self) -> None:
        """Sum in float32 if asked to, or if there is a sum at all."""
        wants = self.args.accumulate_grads_in_fp32 or self._global_stats.num_micro_batches > 1
        if self._float32 is not None and wants:
            self._float32.begin()

    # ---- bad numbers ---------------------------------------------------------------------------

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip nothing in an update without targets: a GradScaler must not unscale it."""
        if self._global_stats.num_targets == 0:
            return torch.zeros((), device=self.args.device)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Let only finite gradients through to the optimizer, in the dtype of their weights."""
        if self._global_stats.num_targets == 0:
            return torch.zeros((), device=self.args.device)
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not self._passes(model, norm):
            model.zero_grad()
        if self._float32 is not None:
            self._float32.cast_to_weights()
        return norm

    def _passes(self, model: nn.Module, norm: Any) -> bool:
        """Check an update's loss and gradient norm, in one read from the device."""
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else torch.as_tensor(norm)
        # Many ranks have told each other already, see `Outcome`.
        loss = self._loss.to(norm) if self.args.world_size == 1 else torch.zeros_like(norm)
        norm_value, loss_value = torch.stack([norm, loss]).tolist()
        self._grad_norm = norm_value
        bad_loss = not math.isfinite(loss_value) or bool(self._outcome.bad_loss)
        largest = min(norm_value, self.args.max_grad_norm or norm_value)
        overflows = self._float32 is not None and not self._float32.fits(largest)
        if math.isfinite(norm_value) and not bad_loss and not overflows:
            self._skipped_in_a_row = 0
            return True
        scaler = self.accelerator.scaler
        searches = scaler is not None and scaler.get_scale() >= 1.0
        if self._update_engine is not None:
            searches = self._update_engine.searches_loss_scale
        if searches and not bad_loss:
            # Overflow of scaled gradients is how a GradScaler finds its scale: it skips by itself.
            self._forget_update()
            return True
        self._refuse(model, loss=loss_value, norm=norm_value)
        if scaler is not None:
            scaler.update()  # it has unscaled and would not do so again before this
        return False

    def _refuse(self, model: nn.Module, *, loss: float, norm: float) -> None:
        """Keep an update from the optimizer, and say which rows made it bad."""
        where = self._explain(model)
        text = (
            f"update {self._update.index} of epoch {self._update.epoch} (step "
            f"{self.state.global_step + 1}) is not finite: gradient norm {norm:g}, {where}."
        )
        if self.args.on_non_finite == "raise":
            raise NonFiniteError(
                f"{text}\n  The optimizer has not seen it. Look at these rows; lower the learning "
                f"rate; use bf16 instead of fp16; or set on_non_finite = 'skip'."
            )
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= self.args.max_skipped_updates_in_a_row:
            raise NonFiniteError(
                f"{text}\n  That is the {self._skipped_in_a_row}. update in a row "
                f"(max_skipped_updates_in_a_row = {self.args.max_skipped_updates_in_a_row}): the "
                f"model itself has gone bad. Resume from an earlier checkpoint with a lower "
                f"learning rate."
            )
        self.accelerator.gradient_state._set_sync_gradients(False)
        self._forget_update()
        logger.warning(f"{text} It is skipped: the optimizer has not seen it.")
        record_event(self, "skipped_update", text=text)

    def _forget_update(self) -> None:
        """Take an update that trained nothing out of the logs: loss, targets, sequences."""
        if self._loss_before is not None:
            self._tr_loss.copy_(self._loss_before)
        self._global_stats = dataclasses.replace(self._global_stats, num_targets=0, num_sequences=0)

    def _explain(self, model: nn.Module) -> str:
        """Run this rank's micro-batches again to find the first bad tensor; ask all ranks."""
        assert self._rollback is not None
        after = RandomState(self.args.device)
        self._rollback.restore()
        rows = "; ".join(describe_rows(mb) for mb in self._update if not mb.weightless)
        text: str | None = f"its micro-batches held {rows}"  # sharded: no rank can run one alone
        if self._can_roll_back:
            bare = self.accelerator.unwrap_model(model, keep_torch_compile=False)
            try:
                text = find_bad_tensor(
                    bare,
                    self._update.micro_batches,
                    lambda mb: self._run_micro_batch(model, mb, self._global_stats.num_targets),
                )
            except Exception as error:  # the other ranks wait below for what this one found
                text = f"running it again failed ({type(error).__name__}: {error})"
            self._rollback.restore()
        after.restore()
        if self.args.world_size > 1:
            texts: list[Any] = [None] * self.args.world_size
            dist.all_gather_object(texts, text)
            text = "; ".join(f"rank {r}: {t}" for r, t in enumerate(texts) if t) or None
        return text or "but each of its micro-batches is finite by itself"
