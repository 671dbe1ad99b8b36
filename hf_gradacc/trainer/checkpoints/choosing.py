"""Which checkpoint a run begins from, and which run it is."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from hf_gradacc.errors import CheckpointError, ConfigError
from hf_gradacc.ranks.collectives import share_of_first_rank
from hf_gradacc.safety.checkpoints import (
    STAGING_NAME,
    find_edits,
    find_whole_checkpoint,
    holds_optimizer,
    list_checkpoints,
    run_of,
    step_of,
)
from hf_gradacc.safety.final_model import complete_model
from hf_gradacc.safety.identity import RunIdentity, go_on
from hf_gradacc.safety.run_lock import hold_folder
from hf_gradacc.safety.run_state import STATE_KEY
from hf_gradacc.tracking.run_files import read_settings

__all__ = ["Start", "choose_start", "hold_run_folder", "read_record"]

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Start:
    """What a run begins from; the same on all ranks.

    Attributes:
        checkpoint: The folder; None to start from the beginning.
        run: The identity of the run.
        shares_folder: Another process trains into the folder, and this one saves nothing there.
    """

    checkpoint: str | None = None
    run: RunIdentity = field(default_factory=RunIdentity)
    shares_folder: bool = False


@contextlib.contextmanager
def hold_run_folder(args: Any) -> Iterator[str | None]:
    """Hold the run's folder on rank 0 while training lasts; see `hold_folder`."""
    if args.process_index != 0:
        yield None
        return
    with hold_folder(args.output_dir) as holder:
        yield holder


def choose_start(args: Any, asked: str | bool | None, *, holder: str | None = None) -> Start:
    """Choose a whole checkpoint, the same on all ranks: rank 0 decides.

    Args:
        args: The trainer's arguments.
        asked: A folder; True for the newest whole one in ``output_dir``; or "auto" for that one if
            there is any of the run that the folder is of.
        holder: Who else trains into the folder, from `hold_run_folder`.

    Raises:
        CheckpointError: If the one asked for is damaged, or True was asked and none is whole.
        ConfigError: If another process trains into the folder.
    """
    answer: Any = None
    if args.process_index == 0:
        try:
            answer = _choose(args, asked, holder)
        except (CheckpointError, ConfigError) as error:
            answer = error
    answer = share_of_first_rank(answer)
    if isinstance(answer, Exception):
        raise answer
    start: Start = answer
    return start


def _choose(args: Any, asked: str | bool | None, holder: str | None) -> Start:
    if holder:
        _refuse_or_share(args, holder)
        return Start(shares_folder=True) if not asked else Start(str(asked), shares_folder=True)
    # Left behind by a run that was killed while it wrote or deleted.
    shutil.rmtree(Path(args.output_dir, STAGING_NAME), ignore_errors=True)
    complete_model(args.output_dir)
    if not asked:
        return Start()
    is_edited = False
    if asked is True or asked == "auto":
        path = _newest(args.output_dir, is_auto=asked == "auto")
    else:
        path, is_edited = _named(asked)
    if path is None:
        return Start()
    if not (is_edited or holds_optimizer(path)):
        _tell_weights_alone(path, is_auto=asked == "auto")
    saved = RunIdentity.of(read_record(path).get("run"))
    others = [(run_of(p), step_of(p)) for p in list_checkpoints(args.output_dir)]
    return Start(str(path), go_on(saved, step=step_of(path), others=others))


def _refuse_or_share(args: Any, holder: str) -> None:
    """Refuse a second process in a folder; one that saves nothing may train beside the first."""
    told = f"output_dir = {args.output_dir!r}: {holder}, trains into this folder"
    if args.save_strategy != "no":
        raise ConfigError(
            f"{told}, and each would overwrite what the other saves.\n  Wait for it, end it, or "
            f"use another output_dir (output.dir in a recipe)."
        )
    logger.warning(
        f"{told}. This one saves no checkpoint (save_strategy = 'no'), so it goes on, without a "
        f"gradacc_log.jsonl of its own."
    )


def _named(asked: str | bool) -> tuple[Path, bool]:
    """Return the folder that was named, and whether somebody has edited it, which is told."""
    path = Path(str(asked))
    damage, edits = find_edits(path) if path.is_dir() else ("there is no such folder", [])
    if damage is not None:
        raise CheckpointError(
            f"resume_from_checkpoint = {str(asked)!r}: {damage}.\n  Name another checkpoint, or "
            f"use True to take the newest whole one in output_dir."
        )
    if edits:
        logger.warning(f"{path.name} is not as it was written: {'; '.join(edits)}.")
    return path, bool(edits)


def _newest(output_dir: str, *, is_auto: bool) -> Path | None:
    """Find the newest whole checkpoint of the folder's run; None to start from the beginning.

    True is the stock Trainer's word for the newest in the folder, whoever saved it: if the folder's
    run has saved none, one of another run is taken, and that is said.
    """
    run = RunIdentity.of(read_settings(Path(output_dir)).get("run"))

    def is_own(path: Path) -> bool:
        return run is None or run.owns(run_of(path), step_of(path))

    path, passed_over = find_whole_checkpoint(output_dir, is_own=is_own)
    others = [p.name for p in list_checkpoints(output_dir) if not is_own(p)]
    if path is None and others and not is_auto and not passed_over:
        path, passed_over = find_whole_checkpoint(output_dir)
        if path is not None:
            logger.warning(
                f"{path.name} is of an earlier run than the last one in {output_dir}, which has "
                f"saved no checkpoint. Training goes on from it, as asked."
            )
    elif others:
        logger.warning(
            f"{', '.join(others)} in {output_dir}: of another run than the last one there, so "
            f"{'it is' if len(others) == 1 else 'they are'} left alone. To go on from one, name it."
        )
    for line in passed_over:
        logger.warning(f"{line}. It is skipped.")
    if path is not None:
        if passed_over:
            logger.warning(f"The run goes on from {path.name}, the newest whole checkpoint.")
        return path
    if is_auto and not passed_over:
        return None
    lines = "".join(f"\n  {line}" for line in passed_over)
    raise CheckpointError(
        f"no whole checkpoint found in output_dir = {output_dir}{lines}\n  Leave out "
        f"resume_from_checkpoint, or move damaged ones away, to start from the beginning."
    )


def _tell_weights_alone(path: Path, *, is_auto: bool) -> None:
    """Say that a checkpoint has weights alone; refuse it if nobody asked for it in person."""
    told = (
        f"{path} holds weights and no optimizer (save_only_model = True, or it was taken away): "
        f"optimizer, learning rate schedule and random numbers would start anew"
    )
    if is_auto:
        raise CheckpointError(
            f"{told}.\n  To do so, name it: resume_from_checkpoint = {str(path)!r}. For resumes "
            f"that repeat the undisturbed run, leave save_only_model out."
        )
    logger.warning(told.replace("would start", "start") + ".")


def read_record(checkpoint: str | Path) -> dict[str, Any]:
    """Read what `run_state.keep` saved with a checkpoint, without loading it; {} if nothing."""
    try:
        state = json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_bytes())
        record = dict(state["stateful_callbacks"][STATE_KEY]["attributes"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {**record, "updates_planned": state.get("max_steps")}
