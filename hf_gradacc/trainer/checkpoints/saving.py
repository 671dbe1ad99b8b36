"""Checkpoints that are whole or absent: written to a staging folder, checked, then renamed."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers.trainer_utils import sort_checkpoints
from transformers.utils import logging

from hf_gradacc.compat import is_sharded_by_loading
from hf_gradacc.errors import CheckpointError
from hf_gradacc.ranks.collectives import gather_objects, wait_for_ranks
from hf_gradacc.safety.checkpoints import (
    STAGING_NAME,
    find_whole_checkpoint,
    publish,
    remove,
    run_of,
    step_of,
    write_manifest,
)
from hf_gradacc.safety.final_model import written_aside
from hf_gradacc.safety.identity import RunIdentity
from hf_gradacc.safety.run_state import kept
from hf_gradacc.safety.storage_errors import find_storage_fault
from hf_gradacc.tracking.install import flush_log, record_event

__all__ = ["CheckpointWriter", "finish_pushes", "rotate", "save_aside"]

logger = logging.get_logger(__name__)


class CheckpointWriter:
    """Lets the stock code write into a staging folder, then renames the whole checkpoint.

    Attributes:
        staging: Where the checkpoint in progress is written; None between checkpoints.
        saved_step: Step of the last checkpoint of this run that is whole.
        newest: Its folder; None before the first.
    """

    def __init__(self) -> None:
        self.staging: Path | None = None
        self.saved_step = -1
        self.newest: str | None = None
        self._run_dir: Path | None = None
        self._fault: str | None = None

    def begin_run(self) -> None:
        """Forget what an earlier run has saved."""
        self.saved_step, self.newest = -1, None

    def save(
        self,
        trainer: Any,
        run_dir: Path,
        stock_save: Callable[[], None],
        *,
        push: Callable[[str], None],
    ) -> None:
        """Save a checkpoint; if the disk fails, training goes on without it.

        Args:
            trainer: The trainer.
            run_dir: The folder that holds the checkpoints.
            stock_save: Writes one into `staging`.
            push: Uploads a whole checkpoint, if pushing was asked for.
        """
        args, state = trainer.args, trainer.state
        final = run_dir / f"checkpoint-{state.global_step}"
        staging = run_dir / STAGING_NAME
        staged = staging / final.name
        if args.local_process_index == 0:
            shutil.rmtree(staging, ignore_errors=True)
        wait_for_ranks()
        self._fault, self._run_dir, self.staging = None, run_dir, staging
        best = state.best_model_checkpoint
        try:
            with self._keeping_storage_errors():
                stock_save()
            with self._keeping_storage_errors():
                self._name_best_checkpoint(trainer, staged, final)
        finally:
            self.staging = None
        problem = self._agree_on_problem(args.output_dir)
        if problem is None:
            flush_log(trainer)  # rows of before a checkpoint last as long as it does
            with self._keeping_storage_errors():
                if args.process_index == 0:
                    _complete(staged, final, state)
            problem = self._agree_on_problem(args.output_dir)
        if problem is None and args.local_process_index == 0 and staged.is_dir():
            _complete(
                staged, final, state
            )  # this node has a disk of its own, where rank 0 wrote nothing
        if problem is None:
            self.saved_step, self.newest = state.global_step, str(final)
            rotate(args, state, run_dir)
            if args.push_to_hub:
                push(str(final))
            return
        state.best_model_checkpoint = best
        if args.local_process_index == 0:
            shutil.rmtree(staging, ignore_errors=True)
        text = (
            f"the checkpoint of step {state.global_step} could not be saved: {problem}. "
            f"Training goes on; earlier checkpoints are as they were."
        )
        logger.error(text)
        record_event(trainer, "checkpoint_failed", text=text)

    def inside_checkpoint(self) -> contextlib.AbstractContextManager[None]:
        """While a checkpoint is written, hold back a disk error: other ranks wait for this one."""
        if self.staging is None:
            return contextlib.nullcontext()
        return self._keeping_storage_errors()

    @contextlib.contextmanager
    def explaining_failure(self, args: Any, output_dir: str | None) -> Iterator[None]:
        """If saving a model outside of checkpoints fails, say where the weights can still be found.

        Raises:
            CheckpointError: In place of a disk error.
        """
        try:
            yield
        except Exception as error:
            fault = find_storage_fault(error, output_dir or args.output_dir)
            if fault is None:
                raise
            path, _ = find_whole_checkpoint(args.output_dir)
            kept = "No checkpoint holds its weights" if path is None else f"{path} is whole"
            raise CheckpointError(
                f"the model could not be saved in {output_dir or args.output_dir}: {fault}\n"
                f"  What was there before is as it was. {kept}. Free some space and save again, or "
                f"on another disk: trainer.save_model(FOLDER), output.dir in a recipe."
            ) from error

    @contextlib.contextmanager
    def keeping_newest(self, args: Any) -> Iterator[None]:
        """Keep the newest checkpoint beside the best one when training ends.

        With ``save_total_limit = 1`` the stock code deletes the newest when training ends, also by
        a signal. A resumed run would then repeat everything since the best one.
        """
        limit, args.save_total_limit = args.save_total_limit, None
        try:
            yield
        finally:
            args.save_total_limit = limit

    def _name_best_checkpoint(self, trainer: Any, staged: Path, final: Path) -> None:
        """Record the best checkpoint under its final name; the stock code looks in staging only."""
        best = final.with_name(f"checkpoint-{trainer.state.best_global_step}")
        if best == final or (best.is_dir() and str(best) != trainer.state.best_model_checkpoint):
            trainer.state.best_model_checkpoint = str(best)
            if trainer.args.should_save and self._fault is None:
                trainer.state.save_to_json(str(staged / "trainer_state.json"))

    @contextlib.contextmanager
    def _keeping_storage_errors(self) -> Iterator[None]:
        """Hold back a disk error until all ranks are told of it: some wait in a barrier."""
        try:
            yield
        except Exception as error:
            fault = find_storage_fault(error, self._run_dir)
            if fault is None:
                raise
            self._fault = self._fault or fault

    def _agree_on_problem(self, output_dir: str) -> str | None:
        """Tell all ranks whether any of them could not write."""
        own = self._fault
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(output_dir).free
            own = own and f"{own.rstrip('.')}, with {free:,} bytes free on that disk"
        return next((problem for problem in gather_objects(own) if problem is not None), None)


@contextlib.contextmanager
def save_aside(trainer: Any, folder: str | Path) -> Iterator[Path]:
    """Give a folder to save a model into outside of checkpoints; see `written_aside`.

    Where each rank holds all weights, rank 0 may save alone, so nobody waits for the others. Where
    checkpoints are written in parts, the model is saved whole all the same.

    Raises:
        CheckpointError: If the disk fails; it says where the weights can still be found.
    """
    args = trainer.args
    together = trainer.shards_weights or is_sharded_by_loading(trainer)
    with (
        trainer._checkpoint_writer.explaining_failure(args, str(folder)),
        written_aside(
            folder,
            is_mover=args.should_save,
            is_first_here=together and args.local_process_index == 0,
            wait=wait_for_ranks if together else _wait_for_nobody,
        ) as staged,
        trainer._rank_engine.gathering_whole_weights(),
    ):
        yield staged


def finish_pushes(trainer: Any) -> None:
    """Wait for the checkpoints that are being uploaded."""
    trainer._finish_current_push()


def _wait_for_nobody() -> None:
    """Go on."""


def rotate(args: Any, state: Any, run_dir: Path) -> None:
    """Delete old checkpoints as the stock rotation does, each whole or not at all.

    Those of other runs in the folder are neither counted nor deleted.
    """
    limit = args.save_total_limit
    if not args.should_save or not limit or limit < 0:
        return
    run = _identity(state)
    checkpoints = [
        path
        for path in sort_checkpoints(str(run_dir), use_mtime=True)
        if run is None or run.owns(run_of(Path(path)), step_of(Path(path)))
    ]
    if not checkpoints:
        return
    best = state.best_model_checkpoint
    keep = {checkpoints[-1], str(Path(best)) if best else checkpoints[-1]}
    excess = len(checkpoints) - max(limit, len(keep))
    for path in [p for p in checkpoints if p not in keep][: max(excess, 0)]:
        remove(Path(path), aside=run_dir / STAGING_NAME)
    with contextlib.suppress(OSError):
        (run_dir / STAGING_NAME).rmdir()


def _complete(staged: Path, final: Path, state: Any) -> None:
    run = _identity(state)
    write_manifest(staged, run=None if run is None else run.id)
    publish(staged, final)


def _identity(state: Any) -> RunIdentity | None:
    return RunIdentity.of(kept(state).get("run"))
