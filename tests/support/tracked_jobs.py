"""What the tests of W&B on ranks run on each of them."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import wandb

from hf_gradacc.tracking import record_event

from .tracked import tracked_trainer

__all__ = ["train_with_wandb"]


def train_with_wandb(
    out: str,
    *,
    environment: Mapping[str, str],
    resumes: Sequence[str | None] = (None,),
    event: str = "",
    **options: Any,
) -> str:
    """Train three updates that W&B is told about, once for each checkpoint to resume from.

    Args:
        out: Output directory.
        environment: Variables of the test, which are not those of the fork server.
        resumes: The checkpoints; None begins anew.
        event: What this rank reports once it has trained.
        **options: Of the trainer.

    Returns:
        What was printed.
    """
    os.environ |= environment
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for checkpoint in resumes:
            trainer = tracked_trainer(out, ddp_backend="gloo", max_steps=3, **options)
            trainer.train(resume_from_checkpoint=checkpoint)
            if event:
                text = f"{event} by rank {trainer.args.process_index}"
                record_event(trainer, "out_of_memory", text=text)
            if wandb.run is not None:
                wandb.finish()
    wandb.teardown()  # as at the end of a process; only then is all of the file on disk
    return printed.getvalue()
