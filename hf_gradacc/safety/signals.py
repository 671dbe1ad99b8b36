"""SIGTERM, SIGINT, SIGHUP, SIGUSR1: finish the update, save, exit with the code a shell expects.

Schedulers send SIGTERM some time before they kill a job, Slurm SIGUSR1 if asked to; people press
Ctrl-C, or close the terminal, which is SIGHUP (one that `nohup` ignores stays ignored). The run
finishes the update in progress, all ranks agree to stop after it, a checkpoint is written, and the
process exits with 128 + the signal's number (143, 138, 130, 129). An evaluation in progress is
broken off. A save in progress is finished, and no other update begins. A second signal of the same
kind acts at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hf_gradacc.ranks.collectives import largest_over_ranks
from hf_gradacc.safety.run_state import keep

__all__ = ["EvaluationStopped", "StopSignals"]

logger = logging.get_logger(__name__)


_DEFAULTS: dict[signal.Signals, Any] = {
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGINT: signal.default_int_handler,
}
_DEFAULTS |= {  # Windows has neither
    getattr(signal, name): signal.SIG_DFL for name in ("SIGHUP", "SIGUSR1") if hasattr(signal, name)
}


# Ctrl-C reaches every process of a terminal, and torchrun forwards it too: the same signal twice
# within moments is one request.
_ECHO_SECONDS = 1.0


class EvaluationStopped(Exception):  # noqa: N818  (nothing is wrong: somebody asked for it)
    """An evaluation was broken off because a signal came."""


def _take_no_notice(number: int, frame: FrameType | None) -> None:
    """Handle a signal by doing nothing."""


class StopSignals(TrainerCallback):
    """Turns a signal into a checkpoint and a clean exit.

    It handles only signals that have no handler yet, in the main thread, while training.

    Attributes:
        received: Number of the signal this rank got, 0 if none.
        agreed: Number of the signal all ranks stop for, 0 if none.
    """

    def __init__(self) -> None:
        self.received = 0
        self.agreed = 0
        self._received_at = 0.0
        self._taken: list[signal.Signals] = []
        self._process = os.getpid()
        self._on_child: Any = None

    def install(self) -> None:
        """Install the handlers."""
        self.received = self.agreed = 0
        self._process = os.getpid()
        if threading.current_thread() is not threading.main_thread():
            return
        for number, default in _DEFAULTS.items():
            if signal.getsignal(number) == default:
                signal.signal(number, self._note)
                self._taken.append(number)

    def uninstall(self) -> None:
        """Restore the handlers that were there before."""
        while self._taken:
            number = self._taken.pop()
            signal.signal(number, _DEFAULTS[number])
        if self._on_child is not None:
            signal.signal(signal.SIGCHLD, self._on_child)
            self._on_child = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a loader worker forked from us: we end it after the update
        now = time.monotonic()
        if self.received == number:
            if now - self._received_at < _ECHO_SECONDS:
                return
            self.uninstall()
            signal.raise_signal(number)
            return
        self.received, self._received_at = number, now
        on_child = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
        if self._on_child is None and callable(on_child):
            # A scheduler signals the loader's workers, too. Torch would raise about their deaths in
            # the middle of the update, which has all its data already. With SIG_DFL, Python would
            # print a warning about a signal it has noticed and not yet handled ("ignored due to
            # race").
            self._on_child = on_child
            signal.signal(signal.SIGCHLD, _take_no_notice)
        name = signal.Signals(number).name
        # Without logging, which may hold a lock at the moment the signal comes.
        with contextlib.suppress(OSError):  # stderr may go to a file on a full disk
            os.write(
                2, f"\n{name}: finishing the update, then saving; again to end now.\n".encode()
            )

    def agree(self, device: torch.device, *, alone: bool) -> int:
        """Find whether any rank got a signal, in one small collective.

        Args:
            device: Where collectives run.
            alone: There is one rank.

        Returns:
            Number of the signal to stop for, the same on all ranks; 0 for none.
        """
        if alone:
            self.agreed = self.agreed or self.received
        elif not self.agreed:
            self.agreed = largest_over_ranks(self.received, device=device)
        return self.agreed

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save and stop after the update that the ranks agreed on."""
        if self.agreed:
            control.should_save = control.should_training_stop = True
            at_the_end = state.global_step >= state.max_steps and args.eval_strategy == "epoch"
            if control.should_evaluate or at_the_end:
                keep(state, evaluation_due="left out")  # the resumed run runs it
            control.should_evaluate = False  # only seconds may be left

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the stock loop from saving again at the end of the epoch, which comes next."""
        if self.agreed:
            control.should_save = control.should_evaluate = False

    def exit_if_asked(self) -> None:
        """Exit with the code of the signal, if the run stopped for one.

        Raises:
            SystemExit: With 128 + the signal's number.
        """
        number = self.agreed or self.received
        if number:
            logger.warning(f"stopped by {signal.Signals(number).name} after a whole update.")
            raise SystemExit(128 + number)
