"""What a run has consumed, and where it stands, kept with every checkpoint.

The Trainer's place in its run: kept with every checkpoint, found again after it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from hf_gradacc.errors import ConfigError, DataError
from hf_gradacc.tracking.window import StatsWindow
from hf_gradacc.trainer.saving import WholeCheckpoints
from hf_gradacc.updates.sampler import UpdateSampler
from hf_gradacc.updates.stream import UpdateStream
from hf_gradacc.updates.update import UpdateStats

__all__ = ["ExactResume", "Ledger"]

logger = logging.get_logger(__name__)


class Ledger(TrainerCallback, ExportableState):
    """Totals of the run and the position in its data.

    The stock Trainer derives the position from the step and the length of the loader, which is
    wrong for a stream in its second pass and for updates drawn by tokens. It is counted here, and
    saved in ``trainer_state.json`` the way stock callbacks save theirs.

    Attributes:
        window: Numbers since the last log row and totals of the run.
        epoch: Passes over the data that have ended.
        update: Updates taken from the current pass.
        position: Where a stream stands after them, see `UpdateStream.start_at`.
        membership: What decides which sequences share an update; a resume must not change it.
        loss_sums: Each rank's losses since the last log row, in the order of ranks.
        last_logged: Step of the last log row.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin a new run."""
        self.membership: dict[str, Any] = {}
        self.window = StatsWindow()
        self.epoch = self.update = self.last_logged = 0
        self.position: dict[str, Any] | None = None
        self.loss_sums: list[float] = []

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note that a pass has ended, before a checkpoint of this moment is written."""
        self.epoch, self.update, self.position = self.epoch + 1, 0, None

    def state(self) -> dict[str, Any]:
        """Give what `restore` needs; JSON only."""
        attributes = {
            "window": dataclasses.asdict(self.window),
            "epoch": self.epoch,
            "update": self.update,
            "position": self.position,
            "membership": self.membership,
            "loss_sums": self.loss_sums,
            "last_logged": self.last_logged,
        }
        return {"args": {}, "attributes": attributes}

    def restore(self, saved: dict[str, Any], *, allow_changed_data: bool = False) -> None:
        """Continue a run from what `state` gave.

        Args:
            saved: As `state` gave it.
            allow_changed_data: Go on even if the dataset is another one than then.

        Raises:
            ConfigError: If the settings that decide membership have changed since.
            DataError: If the dataset has.
        """
        saved = saved["attributes"]
        changed = {
            key: (saved["membership"][key], now)
            for key, now in self.membership.items()
            if key in saved["membership"] and saved["membership"][key] != now
        }
        of_data = {key: changed.pop(key) for key in _FACTS_OF_DATA if key in changed}
        if changed:
            raise ConfigError(
                "the checkpoint was trained with other updates, so its step does not say which "
                f"rows are still to come:\n{_list(changed)}\nResume with the settings of then, or "
                "set ignore_data_skip = True to start the data from its beginning."
            )
        if of_data and not allow_changed_data:
            raise DataError(
                "the training dataset is not the one the checkpoint was trained on:\n"
                f"{_list(of_data)}\nResume with the dataset of then; set allow_changed_data = True "
                "to go on at the same place of this one; or set ignore_data_skip = True to start "
                "it from its beginning."
            )
        self.epoch, self.update = saved["epoch"], saved["update"]
        self.position = saved["position"]
        self.restore_totals(saved)

    def restore_totals(self, saved: dict[str, Any]) -> None:
        """Take over what the run has consumed, whatever comes next."""
        saved = saved.get("attributes", saved)
        window = dict(saved["window"])
        self.window = StatsWindow(**{**window, "total": UpdateStats(**window["total"])})
        self.loss_sums, self.last_logged = list(saved["loss_sums"]), saved["last_logged"]


_FACTS_OF_DATA = ("num_sequences", "fingerprint")


def _list(changed: dict[str, tuple[Any, Any]]) -> str:
    return "\n".join(f"  {key}: {then} then, {now} now" for key, (then, now) in changed.items())


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
