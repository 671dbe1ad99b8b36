"""Refuse to save what is lost already, before a file is written or an older checkpoint deleted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_gradacc.errors import NonFiniteError
from hf_gradacc.ranks.collectives import gather_objects
from hf_gradacc.safety.checkpoints import find_whole_checkpoint
from hf_gradacc.safety.saved_values import find_bad_value, state_to_save, weights_to_save

__all__ = ["refuse_bad_values"]


def refuse_bad_values(trainer: Any, folder: str | Path, *, is_checkpoint: bool) -> None:
    """Look at trained weights, and at the optimizer's state for a checkpoint.

    Ranks that hold the same weights may save without each other, so they agree only where each
    holds a part, or where all write a checkpoint together.

    Args:
        trainer: The trainer.
        folder: Where its weights would be saved.
        is_checkpoint: The optimizer's state is saved as well.

    Raises:
        NonFiniteError: If a weight holds NaN or infinities, or optimizer state holds NaN, and
            ``save_non_finite`` is False.
    """
    if trainer.args.save_non_finite:
        return
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    tensors = [*weights_to_save(model)]
    if is_checkpoint and not trainer.args.save_only_model:
        names = {id(weight): name for name, weight in model.named_parameters()}
        masters = trainer.optimizer_steps.masters
        tensors += state_to_save(trainer.optimizer, names=names, masters=masters)
    found = [find_bad_value(tensors)]
    if is_checkpoint or trainer.shards_weights:
        found = gather_objects(found[0])
    bad = next((text for text in found if text is not None), None)
    if bad is None:
        return
    newest, _ = find_whole_checkpoint(trainer.args.output_dir)
    way_out = (
        "No checkpoint was saved before: begin again with a lower learning rate"
        if newest is None
        else f"{newest} is whole: resume from it with a lower learning rate"
    )
    raise NonFiniteError(
        f"nothing is saved in {folder} after step {trainer.state.global_step}: {bad}.\n  What was "
        f"saved before is as it was. {way_out}; or set save_non_finite = True to save it all the "
        f"same."
    )
