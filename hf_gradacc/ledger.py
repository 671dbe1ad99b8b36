"""What a run has consumed, and where it stands, kept with every checkpoint."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hf_gradacc.errors import ConfigError, DataError
from hf_gradacc.update import StatsWindow, UpdateStats

__all__ = ["Ledger"]


class Ledger(TrainerCallback, ExportableState):
    """Totals of the run and the position in its data.

    The stock Trainer derives the position from the step and the length of the loader, which is
    wrong for a stream in its second pass and for updates drawn by tokens. It is counted here, and
    saved in ``trainer_state.json`` the way stock callbacks save theirs.

    Attributes:
        window: Numbers since the last log row and totals of the run.
        epoch: Passes over the data that have ended.
        update: Updates taken from the current pass.
        position: Where a stream stands after them, see `hf_gradacc.loader.UpdateStream.start_at`.
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
