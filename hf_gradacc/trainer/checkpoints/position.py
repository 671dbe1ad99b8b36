"""The position of a run in its data: saved with every checkpoint, restored from it."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from hf_gradacc.errors import ConfigError, DataError
from hf_gradacc.ranks.collectives import gather_objects
from hf_gradacc.tracking.window import StatsWindow
from hf_gradacc.updates.sampler import UpdateSampler
from hf_gradacc.updates.stream import UpdateStream
from hf_gradacc.updates.update import UpdateStats

__all__ = ["FACTS_OF_DATA", "Ledger", "begin_epoch", "find_place", "note_losses", "restored"]

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
        position: The position of a stream after them, see `UpdateStream.start_at`.
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
        """Record that a pass has ended, before a checkpoint of this moment is written."""
        self.epoch, self.update, self.position = self.epoch + 1, 0, None

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs, as JSON values."""
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
        """Continue a run from what `state` returned.

        Args:
            saved: As `state` returned it.
            allow_changed_data: Continue even if the dataset has changed since.

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
        of_data = {key: changed.pop(key) for key in FACTS_OF_DATA if key in changed}
        if changed:
            raise ConfigError(
                "the checkpoint was trained with other updates, so its step does not say which "
                f"rows are still to come:\n{_list(changed)}\nResume with those settings, or "
                "set ignore_data_skip = True to start the data from its beginning."
            )
        if of_data and self.membership.get("order") == "stream":
            logger.warning(
                "the stream does not begin as it did when the checkpoint was written. It is read "
                "on from the same place; if its order is random, rows come again or are left out."
            )
        elif of_data and not allow_changed_data:
            raise DataError(
                "the training dataset is not the one the checkpoint was trained on:\n"
                f"{_list(of_data)}\nResume with that dataset; set allow_changed_data = True "
                "to continue at the same place in this one; or set ignore_data_skip = True to "
                "start it from its beginning."
            )
        self.epoch, self.update = saved["epoch"], saved["update"]
        self.position = saved["position"]
        self.restore_totals(saved)

    def restore_totals(self, saved: dict[str, Any]) -> None:
        """Restore only what the run has consumed, not its position."""
        saved = saved.get("attributes", saved)
        window = dict(saved["window"])
        self.window = StatsWindow(**{**window, "total": UpdateStats(**window["total"])})
        self.loss_sums, self.last_logged = list(saved["loss_sums"]), saved["last_logged"]


FACTS_OF_DATA = ("num_sequences", "fingerprint", "families")
"""Keys of a membership that the training rows decide, and no setting."""


def _list(changed: dict[str, tuple[Any, Any]]) -> str:
    return "\n".join(f"  {key}: {then} before, {now} now" for key, (then, now) in changed.items())


def restored(trainer: Any, kind: type) -> Any:
    """Return our callback of a kind; the stock code may have made a new one from a checkpoint."""
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, kind))


def find_place(
    trainer: Any, ledger: Ledger, membership: dict[str, Any], *, epochs: int, updates: int
) -> tuple[int, int]:
    """Return the position in the data by the ledger; stock divides the step by the loader's length.

    Args:
        trainer: The trainer, its state restored from the checkpoint if there is one.
        ledger: Its ledger.
        membership: What decides which sequences share an update today.
        epochs: Passes that have ended, as the stock code computes them.
        updates: Updates taken from the current pass, likewise.

    Returns:
        Epochs and updates, corrected.

    Raises:
        ConfigError: If the settings that decide membership have changed since.
        DataError: If the dataset has.
    """
    ledger.restart()
    ledger.membership = membership
    states = trainer.state.stateful_callbacks
    saved = (states or {}).get(type(ledger).__name__)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ExportableState) and states is not None:
            # A checkpoint of the stock Trainer lacks our entries; without them its next save fails.
            states.setdefault(type(callback).__name__, callback.state())
    if saved and not trainer.args.restore_callback_states_from_checkpoint:
        _restore_callbacks(trainer, states)
    if not saved or "membership" not in saved.get("attributes", {}):
        return epochs, updates
    if trainer.args.ignore_data_skip:
        ledger.restore_totals(saved)
        return epochs, updates
    ledger.restore(saved, allow_changed_data=trainer.args.allow_changed_data)
    then, now = len(ledger.loss_sums), trainer.args.world_size
    if then not in (0, now):
        logger.warning(
            f"the checkpoint was saved by {then} ranks and is resumed by {now}: every update "
            f"holds the same sequences, and weights agree within rounding. Dropout and other "
            f"layers that draw random numbers will draw different ones."
        )
    return ledger.epoch, ledger.update


def _restore_callbacks(trainer: Any, states: dict[str, Any]) -> None:
    """Let early stopping count on from the checkpoint; say which callbacks begin anew.

    The stock code restores callbacks only if ``restore_callback_states_from_checkpoint`` is set,
    and then takes their settings from the checkpoint, too. A count that begins at 0 lets a run
    that was interrupted go on for longer than one that was not.
    """
    for callback in trainer.callback_handler.callbacks:
        entry = states.get(type(callback).__name__)
        if not isinstance(callback, ExportableState) or not isinstance(entry, dict):
            continue
        kept, now = entry.get("attributes", {}), callback.state().get("attributes", {})
        if type(callback) is EarlyStoppingCallback:
            vars(callback).update({name: kept[name] for name in kept if name in now})
        elif kept != now and not type(callback).__module__.startswith("hf_gradacc."):
            logger.warning(
                f"{type(callback).__name__} begins anew: the checkpoint holds its state, which "
                f"restore_callback_states_from_checkpoint = True takes over."
            )


def begin_epoch(trainer: Any, ledger: Ledger, arguments: dict[str, Any]) -> None:
    """Set the loader's epoch and its start in it, and the number of updates for the stock loop.

    Args:
        trainer: The trainer.
        ledger: Its ledger.
        arguments: Those of the stock ``_run_epoch``, changed in place.
    """
    epoch, loader = arguments["epoch"], arguments["train_dataloader"]
    loader.set_epoch(epoch)
    if isinstance(loader.batch_sampler, UpdateSampler):
        updates = loader.batch_sampler.num_updates(epoch)
        arguments["num_update_steps_per_epoch"] = arguments["steps_in_epoch"] = updates
    checkpoint = arguments["resume_from_checkpoint"]
    is_resumed = checkpoint is not None and epoch == arguments["epochs_trained"]
    num_skipped = arguments["steps_trained_in_current_epoch"] if is_resumed else 0
    if is_resumed:
        _take_over_losses(trainer, ledger)
    if is_resumed and num_skipped >= arguments["num_update_steps_per_epoch"]:
        # Saved between the last update and the end of the epoch. The stock loop restores the
        # random state when it loads its first batch, but no batch is left to load.
        trainer._load_rng_state(checkpoint)
    if num_skipped and isinstance(loader.dataset, UpdateStream):
        loader.dataset.start_at(epoch, updates=num_skipped, position=ledger.position)
    ledger.update = num_skipped


def _take_over_losses(trainer: Any, ledger: Ledger) -> None:
    """Restore the losses not yet logged, so that the next row has the mean of all its updates."""
    sums = ledger.loss_sums
    if not sums:
        return
    is_same_world = len(sums) == trainer.args.world_size
    mean = sum(sums) / len(sums)
    trainer._tr_loss += sums[trainer.args.process_index] if is_same_world else mean
    trainer._globalstep_last_logged = ledger.last_logged
    trainer._total_loss_scalar -= mean  # train_loss covers this call's steps only


def note_losses(trainer: Any, ledger: Ledger) -> None:
    """Store each rank's sum of losses since the last log row, for the next checkpoint."""
    ledger.loss_sums = gather_objects(float(trainer._tr_loss))
    ledger.last_logged = trainer._globalstep_last_logged
