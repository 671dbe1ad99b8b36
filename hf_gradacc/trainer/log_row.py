"""One log row: what the updates since the last row consumed, their times, and their costs."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

from transformers.utils import logging

from hf_gradacc.loss.facts import LossFacts
from hf_gradacc.tracking.mfu import CostMeter
from hf_gradacc.tracking.phases import PhaseClock
from hf_gradacc.tracking.run_files import is_training_row, kind_of
from hf_gradacc.tracking.wandb_ranks import RankRuns
from hf_gradacc.tracking.window import StatsWindow
from hf_gradacc.trainer.runner import UpdateResult
from hf_gradacc.updates.update import Update, UpdateStats

__all__ = ["LogBook"]

logger = logging.get_logger(__name__)


class LogBook:
    """Records what each update consumed and how long it took, and puts both into the log.

    Args:
        clock: Measures what the time of an update is spent on.
        rank_runs: This rank's own W&B run, if asked for.

    Attributes:
        clock: The same; each call of ``train()`` has a new one.
        losses: Means of parts of the loss, for the next row.
    """

    def __init__(self, clock: PhaseClock, rank_runs: RankRuns | None) -> None:
        self.clock = clock
        self.losses: dict[str, float] = {}
        self._rank_runs = rank_runs
        self._started = 0.0  # when the update in progress began; 0 between updates
        self._costs: CostMeter | None = None
        self._local_window = StatsWindow()

    @property
    def is_open(self) -> bool:
        """Whether an update is in progress."""
        return bool(self._started)

    def open(self) -> float:
        """Start timing the wait for an update's data; return the time."""
        started = time.perf_counter()
        self.clock.enter("data")
        return started

    def begin_update(self, started: float, *, has_data: bool) -> None:
        """Record that the update's data have come, if there were any.

        Args:
            started: From `open`.
            has_data: False if the iterator was at its end, so no update starts.
        """
        if has_data:
            self._started = started
            self.clock.enter("forward_backward")
        else:
            self.clock.drop()

    def close(
        self,
        window: StatsWindow,
        result: UpdateResult,
        *,
        grad_norm: float | None,
        facts: LossFacts | None,
    ) -> None:
        """Add the update that has just ended to the log row.

        Args:
            window: The updates since the last log row.
            result: What became of this one.
            grad_norm: Norm of its gradient.
            facts: What the loss is a mean over.
        """
        self.clock.stop()
        seconds = time.perf_counter() - self._started
        window.add(dataclasses.replace(result.stats, step_seconds=seconds), grad_norm=grad_norm)
        if self._rank_runs is not None:
            local = _local_stats(result, facts)
            self._local_window.add(dataclasses.replace(local, step_seconds=seconds))
        self._started = 0.0  # at the end of an epoch the stock loop calls this again

    def complete(
        self, logs: dict[str, float], window: StatsWindow, *, trainer: Any
    ) -> dict[str, float]:
        """Add what the updates consumed to the stock numbers of a training row, in place.

        The row that ends a run is given the total: the last training row may be older.

        Args:
            logs: The row, changed in place.
            window: The updates since the last row; it is reset.
            trainer: The trainer; its model and step count are read.

        Returns:
            The row.
        """
        if kind_of(logs) == "end":
            logs["target_tokens_seen"] = window.target_tokens_seen
        if not is_training_row(logs) or not window.num_updates:
            return logs
        num_trained = window.num_updates - window.num_skipped
        if window.num_skipped:
            # The stock mean counted skipped updates as updates with a loss of 0.
            logs["loss"] *= window.num_updates / num_trained if num_trained else math.nan
        logs.update(window.metrics())
        left = trainer.state.max_steps - trainer.state.global_step
        logs["hours_left"] = left * logs["step_seconds"] / 3600
        logs.update(self.losses)
        seconds_by_phase = self.clock.take()
        costs = self._measure_costs(window, trainer)
        logs.update(seconds_by_phase)
        logs.update(costs)
        window.start_next()
        if self._rank_runs is not None:
            local = seconds_by_phase | self._local_window.metrics()
            local |= {key: costs[key] for key in costs if key == "peak_memory_bytes"}
            self._local_window = StatsWindow(target_tokens_seen=int(local["target_tokens_seen"]))
            self._rank_runs.send(local, step=trainer.state.global_step)
        return logs

    def _measure_costs(self, window: StatsWindow, trainer: Any) -> dict[str, float]:
        """Measure MFU and memory; what cannot be measured is left out, and never ends a run."""
        try:
            self._costs = self._costs or CostMeter(trainer.args, trainer.model)
            return self._costs.metrics(
                num_input_tokens=window.total.num_input_tokens,
                num_sequences=window.total.num_sequences,
                seconds=window.total.step_seconds,
                num_shared_tokens=window.total.num_shared_tokens,
            )
        except Exception as error:  # whatever a model's config or a device's driver answers
            logger.warning_once(
                f"mfu and peak_memory_bytes are left out: {type(error).__name__}: {error}"
            )
            return {}


def _local_stats(result: UpdateResult, facts: LossFacts | None) -> UpdateStats:
    """Add up what this rank ran in the update that has just ended."""
    if facts is None or result.stats.num_targets == 0:
        return UpdateStats()
    local = Update([mb for mb in result.update if not mb.weightless]).stats(facts.rule)
    return dataclasses.replace(local, num_micro_batches=len(result.update))
