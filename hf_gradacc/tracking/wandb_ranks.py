"""One W&B run per rank, on request: the ranks of a run side by side, in one group.

Rank 0's run is the run; it is put into the group and gets rank 0's own figures besides. The others
hold their own figures alone, under ``rank/``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.utils import logging

from hf_gradacc.ranks.collectives import share_of_first_rank
from hf_gradacc.tracking.run_facts import describe_run
from hf_gradacc.tracking.wandb_start import start_rank_run

__all__ = ["RankRuns", "find_rank_runs"]

logger = logging.get_logger(__name__)


class RankRuns(TrainerCallback):
    """Begins this rank's run in the group of rank 0's, and sends its figures there."""

    def __init__(self) -> None:
        self._run: Any = None
        self._is_first_rank = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Learn from rank 0 which run the ranks belong to, and begin this one's."""
        self._run, self._is_first_rank = None, args.process_index == 0
        whole = _agree_on_run(args)
        if whole is None:  # W&B is disabled, or rank 0 could not begin
            return
        if args.process_index == 0:
            import wandb

            self._run = wandb.run
            return
        try:
            facts = describe_run(args, state=state, model=kwargs.get("model"))
            own = {"rank": args.process_index, "hf_gradacc": facts}
            self._run = start_rank_run(args, config=own, **whole)
        except Exception as error:  # whatever a tracker throws, the run is worth more
            self._give_up(error)

    def send(self, figures: Mapping[str, float], *, step: int) -> None:
        """Log this rank's own figures.

        Args:
            figures: As in a log row, of this rank alone.
            step: Updates done.
        """
        if self._run is None:
            return
        row = {f"rank/{key}": value for key, value in figures.items()} | {"train/global_step": step}
        try:
            own = None if self._is_first_rank else step  # rank 0's run has rows of its own between
            self._run.log(row, step=own)
        except Exception as error:
            self._give_up(error)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the run of this rank; rank 0's stays open, as the stock callback leaves it."""
        run, self._run = self._run, None
        if run is not None and args.process_index > 0:
            try:
                run.finish()
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        logger.warning(
            f"W&B: the run of this rank ends here ({type(error).__name__}: {error}). Training goes "
            f"on without it."
        )
        self._run = None


def find_rank_runs(trainer: Any) -> RankRuns | None:
    """Return the callback of a trainer that was asked for a run per rank."""
    callbacks = trainer.callback_handler.callbacks
    return next((callback for callback in callbacks if isinstance(callback, RankRuns)), None)


def _agree_on_run(args: Any) -> dict[str, str] | None:
    """Return on every rank the run of rank 0: its id, its name and its group."""
    own: dict[str, str] | None = None
    if args.process_index == 0:
        import wandb

        run = wandb.run
        if run is not None and not run.disabled:
            name = args.run_name or Path(args.output_dir).name
            own = {"run_id": run.id, "name": name, "group": run.group or run.id}
    shared: dict[str, str] | None = share_of_first_rank(own)
    return shared
