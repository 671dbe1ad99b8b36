"""What the hooks assume of the stock Trainer: checked when the trainer is imported.

A release that renames a hook would leave ours uncalled, and training would go on without it. So the
stock class is compared with this table, by names alone, which takes a millisecond. The tests of the
contract read the stock source, and run it.
"""

from __future__ import annotations

import inspect
import os
from typing import NamedTuple

from transformers import Trainer, __version__
from transformers.utils import logging

from hf_gradacc.compat import NEWEST_TESTED

__all__ = ["HOOKS", "USED", "Hook", "find_moved", "tell_what_moved"]

logger = logging.get_logger(__name__)


class Hook(NamedTuple):
    """A method of the stock Trainer that we override.

    Attributes:
        parameters: What the stock method takes, separated by spaces.
        callers: The stock methods that have to call it; empty if users do.
    """

    parameters: str
    callers: tuple[str, ...]


HOOKS = {
    "_clip_grad_norm": Hook("model", ("_run_epoch",)),
    "_determine_best_metric": Hook("metrics trial", ("_maybe_log_save_evaluate",)),
    "_evaluate": Hook("trial ignore_keys_for_eval skip_scheduler", ("_maybe_log_save_evaluate",)),
    "_finalize_training": Hook("trial num_train_samples start_time", ("_inner_training_loop",)),
    "_get_grad_norm": Hook("model grad_norm", ("_run_epoch",)),
    "_get_num_items_in_batch": Hook("batch_samples device", ("prediction_step",)),
    "_get_output_dir": Hook("trial", ("_save_checkpoint", "_finalize_training")),
    "_hp_search_setup": Hook("trial", ("train",)),
    "_init_training_state": Hook(
        "max_steps num_update_steps_per_epoch num_train_epochs resume_from_checkpoint trial",
        ("_inner_training_loop",),
    ),
    "_inner_training_loop": Hook(
        "batch_size args resume_from_checkpoint trial ignore_keys_for_eval", ("train",)
    ),
    "_load_best_model": Hook("", ("_finalize_training",)),
    "_load_from_checkpoint": Hook("resume_from_checkpoint model", ("train",)),
    "_load_optimizer_and_scheduler": Hook("checkpoint", ("_prepare_for_training",)),
    "_maybe_log_save_evaluate": Hook(
        "tr_loss grad_norm model trial epoch ignore_keys_for_eval start_time learning_rate",
        ("_run_epoch",),
    ),
    "_prepare_for_training": Hook(
        "max_steps train_dataloader resume_from_checkpoint", ("_inner_training_loop",)
    ),
    "_push_from_checkpoint": Hook("checkpoint_folder", ("_save_checkpoint",)),
    "_run_epoch": Hook(
        "model epoch train_dataloader steps_in_epoch num_update_steps_per_epoch trial "
        "ignore_keys_for_eval start_time resume_from_checkpoint epochs_trained "
        "steps_trained_in_current_epoch",
        ("_inner_training_loop",),
    ),
    "_save_checkpoint": Hook("model trial", ("_maybe_log_save_evaluate",)),
    "_save_optimizer_and_scheduler": Hook("output_dir", ("_save_checkpoint",)),
    "_save_rng_state": Hook("output_dir", ("_save_checkpoint",)),
    "_save_scaler": Hook("output_dir", ("_save_checkpoint",)),
    "_track_num_input_tokens": Hook("inputs", ("_run_epoch",)),
    "compute_loss": Hook(
        "model inputs return_outputs num_items_in_batch", ("training_step", "prediction_step")
    ),
    "create_model_card": Hook(
        "language license tags model_name finetuned_from tasks dataset_tags dataset dataset_args",
        ("push_to_hub",),
    ),
    "create_optimizer": Hook("model", ("_prepare_for_training",)),
    "create_scheduler": Hook("num_training_steps optimizer", ("_prepare_for_training",)),
    "evaluation_loop": Hook(
        "dataloader description prediction_loss_only ignore_keys metric_key_prefix",
        ("evaluate", "predict"),
    ),
    "floating_point_ops": Hook("inputs", ("_run_epoch",)),
    "get_batch_samples": Hook("epoch_iterator num_batches device", ("_run_epoch",)),
    "get_total_train_batch_size": Hook("args", ("set_initial_training_values",)),
    "get_train_dataloader": Hook("", ("_inner_training_loop",)),
    "log": Hook("logs start_time", ("_maybe_log_save_evaluate", "_finalize_training", "evaluate")),
    "prediction_step": Hook("model inputs prediction_loss_only ignore_keys", ("evaluation_loop",)),
    "save_model": Hook("output_dir _internal_call", ("_save_checkpoint",)),
    "set_initial_training_values": Hook("args dataloader", ("_inner_training_loop",)),
    "train": Hook("resume_from_checkpoint trial ignore_keys_for_eval", ()),
    "training_step": Hook("model inputs num_items_in_batch", ("_run_epoch",)),
}

USED = (
    "_finish_current_push",
    "_get_collator_with_removed_columns",
    "_get_train_sampler",
    "_load_rng_state",
    "_prepare_inputs",
    "_remove_unused_columns",
    "compute_loss_context_manager",
    "get_cp_size",
    "get_sp_size",
    "get_tp_size",
)
"""Methods that our parts call, and do not override."""


def find_moved(stock: type) -> list[str]:
    """Say what a Trainer class no longer does as the table has it.

    >>> class Renamed(Trainer):
    ...     def _clip_grad_norm(self, model, norm): ...
    >>> find_moved(Renamed)
    ['_clip_grad_norm takes model, norm']
    """
    moved = [f"{name} is gone" for name in (*HOOKS, *USED) if not hasattr(stock, name)]
    for name, hook in HOOKS.items():
        if not hasattr(stock, name):
            continue
        takes = [*inspect.signature(getattr(stock, name)).parameters][1:]
        if takes != hook.parameters.split():
            moved.append(f"{name} takes {', '.join(takes) or 'nothing'}")
        moved += [
            f"{caller} does not call {name}"
            for caller in hook.callers
            if name not in _names_in(getattr(stock, caller, None))
        ]
    return moved


def _names_in(method: object) -> tuple[str, ...]:
    """Return every name that the code of a method looks up."""
    code = getattr(inspect.unwrap(method) if callable(method) else None, "__code__", None)
    return () if code is None else code.co_names


def tell_what_moved(stock: type = Trainer) -> None:
    """Say in one line, on rank 0, what the installed Trainer does in another way."""
    moved = find_moved(stock)
    if moved and os.environ.get("RANK", "0") == "0":
        logger.warning_once(
            f"the Trainer of transformers {__version__} is not the one that hf_gradacc knows "
            f"({'; '.join(moved)}): training may fail, or not be exact. Use transformers "
            f"{NEWEST_TESTED['transformers']}."
        )
