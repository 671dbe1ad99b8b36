"""The Trainer's place in its run: kept with every checkpoint, found again after it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from hf_gradacc.ledger import Ledger
from hf_gradacc.loader import UpdateStream
from hf_gradacc.sampler import UpdateSampler
from hf_gradacc.trainer_save import WholeCheckpoints

logger = logging.get_logger(__name__)

__all__ = ["ExactResume"]


class ExactResume(WholeCheckpoints):
    """Overrides that let a resumed run go on as if it had never stopped."""

    ledger: Ledger
    _tr_loss: torch.Tensor
    _total_loss_scalar: float
    _globalstep_last_logged: int

    def _membership(self) -> dict[str, Any]:
        """Say what decides which sequences share an update."""
        raise NotImplementedError

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Take the position in the data from the ledger, not from a division of steps."""
        self.ledger.restart()  # the new state takes over what callbacks hold of the last train()
        epochs, updates = super()._init_training_state(*args, **kwargs)
        callbacks = self.callback_handler.callbacks  # stock may have put a new one in its place
        self.ledger = next(c for c in callbacks if isinstance(c, Ledger))
        self.ledger.restart()
        self.ledger.membership = self._membership()
        saved = (self.state.stateful_callbacks or {}).get(type(self.ledger).__name__)
        for callback in callbacks:
            if isinstance(callback, ExportableState) and self.state.stateful_callbacks is not None:
                # A checkpoint of the stock Trainer lacks ours, and its next save would stumble.
                name = type(callback).__name__
                self.state.stateful_callbacks.setdefault(name, callback.state())
        if not saved or "membership" not in saved.get("attributes", {}):
            return epochs, updates
        if self.args.ignore_data_skip:
            self.ledger.restore_totals(saved)
            return epochs, updates
        self.ledger.restore(saved, allow_changed_data=self.args.allow_changed_data)
        then, now = len(self.ledger.loss_sums), self.args.world_size
        if then not in (0, now):
            logger.warning(
                f"the checkpoint was saved by {then} ranks and goes on with {now}: every update "
                f"holds the same sequences and weights agree within rounding, but dropout and "
                f"other layers that draw random numbers will draw others."
            )
        return self.ledger.epoch, self.ledger.update

    def _run_epoch(self, **kwargs: Any) -> None:
        """Tell the loader its epoch and where in it to begin, and stock how many updates it has."""
        epoch, loader = kwargs["epoch"], kwargs["train_dataloader"]
        loader.set_epoch(epoch)
        if isinstance(loader.batch_sampler, UpdateSampler):
            updates = loader.batch_sampler.num_updates(epoch)
            kwargs["num_update_steps_per_epoch"] = kwargs["steps_in_epoch"] = updates
        checkpoint = kwargs["resume_from_checkpoint"]
        resumed = checkpoint is not None and epoch == kwargs["epochs_trained"]
        skipped = kwargs["steps_trained_in_current_epoch"] if resumed else 0
        if resumed:
            self._take_over_losses()
        if resumed and skipped >= kwargs["num_update_steps_per_epoch"]:
            # Saved between the last update and the end of the epoch: the stock loop would restore
            # the random state with the first batch it loads, and there is none left to load.
            self._load_rng_state(checkpoint)
        if skipped and isinstance(loader.dataset, UpdateStream):
            loader.dataset.start_at(epoch, updates=skipped, position=self.ledger.position)
        self.ledger.update = skipped
        super()._run_epoch(**kwargs)

    def _take_over_losses(self) -> None:
        """Put back the losses not yet logged, so that the next row is the mean it would be."""
        sums = self.ledger.loss_sums
        if not sums:
            return
        same = len(sums) == self.args.world_size
        own = sums[self.args.process_index] if same else sum(sums) / len(sums)
        self._tr_loss += own
        self._globalstep_last_logged = self.ledger.last_logged
        self._total_loss_scalar -= sum(sums) / len(sums)  # train_loss is of this call's steps

    def _before_save(self) -> None:
        """Note what every rank has summed up since the last log row."""
        own = float(self._tr_loss)
        sums: list[Any] = [own]
        if self.args.world_size > 1:
            sums = [None] * self.args.world_size
            dist.all_gather_object(sums, own)
        self.ledger.loss_sums, self.ledger.last_logged = sums, self._globalstep_last_logged
