"""The Trainer's disk side: checkpoints that are whole or not there, and resuming from those."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import Trainer
from transformers.trainer_utils import sort_checkpoints
from transformers.utils import logging

from hf_gradacc.errors import CheckpointError
from hf_gradacc.safety.checkpoints import (
    STAGING_NAME,
    find_damage,
    find_whole_checkpoint,
    is_storage_error,
    publish,
    remove,
    write_manifest,
)
from hf_gradacc.tracking.install import record_event

__all__ = ["WholeCheckpoints"]

logger = logging.get_logger(__name__)


class WholeCheckpoints(Trainer):
    """Overrides around saving and finding checkpoints; their contents are the stock Trainer's."""

    _staging: Path | None = None
    _save_error: Exception | None = None
    _saved_step = -1

    # ---- finding -------------------------------------------------------------------------------

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train, from a checkpoint if asked to.

        Args:
            resume_from_checkpoint: A folder; True for the newest whole one in ``output_dir``; or
                "auto" for that one if there is any, else from the start.
            *args: As for the stock Trainer.
            **kwargs: Likewise.

        Raises:
            CheckpointError: If the one asked for is damaged, or True was asked and none is whole.
        """
        if self.args.process_index == 0:  # what a killed run was writing or deleting
            shutil.rmtree(Path(self.args.output_dir, STAGING_NAME), ignore_errors=True)
        return super().train(self._choose_checkpoint(resume_from_checkpoint), *args, **kwargs)

    def _choose_checkpoint(self, asked: str | bool | None) -> str | None:
        """Choose a whole checkpoint, the same on all ranks."""
        if not asked:
            return None
        answer: list[Any] = [None, None]
        if self.args.process_index == 0:
            named = None if asked is True or asked == "auto" else asked
            answer = list(self._look_for_checkpoint(named, needed=asked != "auto"))
        if self.args.world_size > 1:
            dist.broadcast_object_list(answer)
        path, problem = answer
        if problem is not None:
            raise CheckpointError(problem)
        return None if path is None else str(path)

    def _look_for_checkpoint(
        self, named: str | None, *, needed: bool
    ) -> tuple[str | None, str | None]:
        """Give a checkpoint, or what is wrong; neither if there is nothing to go on from."""
        if named is not None:
            damage = find_damage(named) if Path(named).is_dir() else "there is no such folder"
            problem = (
                f"resume_from_checkpoint = {named!r}: {damage}.\n  Name another checkpoint, or use "
                f"True to take the newest whole one in output_dir."
            )
            return (named, None) if damage is None else (None, problem)
        path, passed_over = find_whole_checkpoint(self.args.output_dir)
        for line in passed_over:
            logger.warning(f"{line}. It is passed over.")
        if path is not None:
            if passed_over:
                logger.warning(f"The run goes on from {path.name}, the newest whole checkpoint.")
            return str(path), None
        if not needed and not passed_over:
            return None, None
        lines = "".join(f"\n  {line}" for line in passed_over)
        return None, (
            f"no whole checkpoint found in output_dir = {self.args.output_dir}{lines}\n  Leave out "
            f"resume_from_checkpoint, or move damaged ones away, to start from the beginning."
        )

    # ---- saving --------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Let the stock code write aside, then give the whole checkpoint its name."""
        run_dir = Path(super()._get_output_dir(trial))
        final = run_dir / f"checkpoint-{self.state.global_step}"
        self._before_save()
        staging = run_dir / STAGING_NAME
        if self.args.local_process_index == 0:
            shutil.rmtree(staging, ignore_errors=True)
        self._wait()
        self._save_error, self._staging = None, staging
        best = self.state.best_model_checkpoint
        try:
            with self._keeping_storage_errors():
                super()._save_checkpoint(model, trial)
            staged = staging / final.name
            with self._keeping_storage_errors():
                self._name_best_checkpoint(staged, final)
        finally:
            self._staging = None
        problem = self._agree_on_problem()
        if problem is None:
            with self._keeping_storage_errors():
                if self.args.process_index == 0:
                    _complete(staged, final)
            problem = self._agree_on_problem()
        if problem is None and self.args.local_process_index == 0 and staged.is_dir():
            _complete(staged, final)  # a disk of this node's own, without rank 0's files
        if problem is None:
            self._saved_step = self.state.global_step
            self._rotate(run_dir)
            if self.args.push_to_hub:
                super()._push_from_checkpoint(str(final))
            return
        self.state.best_model_checkpoint = best
        if self.args.local_process_index == 0:
            shutil.rmtree(staging, ignore_errors=True)
        text = (
            f"the checkpoint of step {self.state.global_step} could not be saved: {problem}. "
            f"Training goes on; earlier checkpoints are as they were."
        )
        logger.error(text)
        record_event(self, "checkpoint_failed", text=text)

    def _before_save(self) -> None:
        """Hook for what has to be noted in every checkpoint, called on all ranks."""

    def _get_output_dir(self, trial: Any) -> str:
        """Point the stock code aside while it writes a checkpoint."""
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload nothing that is not whole; `_save_checkpoint` does it once it is."""
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _name_best_checkpoint(self, staged: Path, final: Path) -> None:
        """Write down the best checkpoint under the name it is going to have."""
        best = self.state.best_model_checkpoint
        if best is not None and Path(best) == staged:
            self.state.best_model_checkpoint = str(final)
            if self.args.should_save and self._save_error is None:
                self.state.save_to_json(str(staged / "trainer_state.json"))

    def _rotate(self, run_dir: Path) -> None:
        """Do what the stock rotation does, leaving no half-deleted checkpoint under its name."""
        limit = self.args.save_total_limit
        if not self.args.should_save or not limit or limit < 0:
            return
        checkpoints = sort_checkpoints(str(run_dir), use_mtime=True)
        if not checkpoints:
            return
        best = self.state.best_model_checkpoint
        keep = {checkpoints[-1], str(Path(best)) if best else checkpoints[-1]}
        excess = len(checkpoints) - max(limit, len(keep))
        for path in [p for p in checkpoints if p not in keep][: max(excess, 0)]:
            remove(Path(path), aside=run_dir / STAGING_NAME)
        with contextlib.suppress(OSError):
            (run_dir / STAGING_NAME).rmdir()

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        """Keep the newest checkpoint beside the best one.

        With ``save_total_limit = 1`` stock deletes it once training ends, be it by a signal: the
        run would go on, or a finished one begin again, from wherever the best one was.
        """
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            output = super()._finalize_training(trial, *args, **kwargs)
        finally:
            self.args.save_total_limit = limit
        self._rotate(
            Path(self._get_output_dir(trial))
        )  # a kill may have come between saving and this
        return output

    # ---- a disk that fails ---------------------------------------------------------------------

    @contextlib.contextmanager
    def _keeping_storage_errors(self) -> Iterator[None]:
        """Keep an error of the disk until all ranks can hear of it: some wait in a barrier."""
        try:
            yield
        except Exception as error:
            if not is_storage_error(error):
                raise
            self._save_error = self._save_error or error

    def _agree_on_problem(self) -> str | None:
        """Tell all ranks whether any of them could not write."""
        error = self._save_error
        own = None if error is None else f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError):  # torch says "unexpected pos 64 vs 0" of a full disk
            free = shutil.disk_usage(self.args.output_dir).free
            own = own and f"{own.rstrip('.')} ({free:,} bytes are free on that disk)"
        problems: list[Any] = [own]
        if self.args.world_size > 1:
            problems = [None] * self.args.world_size
            dist.all_gather_object(problems, own)
        return next((problem for problem in problems if problem is not None), None)

    def _wait(self) -> None:
        if self.args.world_size > 1:
            dist.barrier()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as stock does; inside a checkpoint a disk error waits for the other ranks.

        Raises:
            CheckpointError: If the disk fails, with where the weights can still be found.
        """
        if self._staging is not None:
            with self._inside_checkpoint():
                super().save_model(output_dir, _internal_call=_internal_call)
            return
        try:
            super().save_model(output_dir, _internal_call=_internal_call)
        except Exception as error:
            if not is_storage_error(error):
                raise
            path, _ = find_whole_checkpoint(self.args.output_dir)
            kept = "No checkpoint holds its weights" if path is None else f"{path} is whole"
            raise CheckpointError(
                f"the model could not be saved in {output_dir or self.args.output_dir}: {error}\n"
                f"  What lies there may be cut short. {kept}. Free some space and save again, or "
                f"on another disk: trainer.save_model(FOLDER), output.dir in a recipe."
            ) from error

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._inside_checkpoint():
            super()._save_optimizer_and_scheduler(output_dir)

    def _save_scaler(self, output_dir: str) -> None:
        with self._inside_checkpoint():
            super()._save_scaler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        with self._inside_checkpoint():
            super()._save_rng_state(output_dir)

    def _inside_checkpoint(self) -> contextlib.AbstractContextManager[None]:
        if self._staging is None:
            return contextlib.nullcontext()
        return self._keeping_storage_errors()


def _complete(staged: Path, final: Path) -> None:
    write_manifest(staged)
    publish(staged, final)
