"""Updates of trees on several ranks."""

from __future__ import annotations

import contextlib
import tempfile
from typing import Any

from transformers import TrainerCallback

from .common_prompts import rows_of_prompts, watching_calls
from .kept_rows import KEEPING, keeping_always, rows_behind, watching_kept
from .rank_jobs import FSDP2, WholeGradients, allow_sharding_on_cpu
from .reduction_jobs import small_buckets
from .reference import float64_everywhere
from .tiny import log_rows, make_trainer, tiny_llama

__all__ = ["NUM_ROWS", "PER_UPDATE", "train_kept", "train_trees"]

NUM_ROWS, PER_UPDATE = 25, 12
"""Rows, and those of an update; the last of an epoch has one, and one rank has none."""


class _SettledOnRows(TrainerCallback):
    """Computes rows from the first update on."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.update_collator.takes_trees = False


def train_trees(
    *,
    sharded: bool = False,
    in_float64: bool = True,
    on_rows: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train an epoch of rows that begin alike, and say what was computed as trees.

    Args:
        sharded: By FSDP2, so that ranks run as many micro-batches.
        in_float64: Without the float32 of norms; not where layers are computed again.
        on_rows: A rank whose clock has settled on rows.
        **options: Of the trainer.
    """
    if sharded:
        allow_sharding_on_cpu()
        options |= FSDP2
    recorder = WholeGradients()
    rows = rows_of_prompts(NUM_ROWS, seed=1, prompts=2)
    with float64_everywhere():  # weights are drawn in the default dtype
        model = tiny_llama()
    exactly = float64_everywhere() if in_float64 else contextlib.nullcontext()
    with tempfile.TemporaryDirectory() as out, exactly, watching_calls() as calls:
        settings = {"effective_batch_size": PER_UPDATE, "train_sampling_strategy": "sequential"}
        trainer = make_trainer(
            out,
            rows,
            model=model,
            callbacks=[recorder],
            eval_dataset=rows[:7],
            **{"layout": "shared_prefix", **settings, **options},
        )
        if trainer.args.process_index == on_rows:
            trainer.add_callback(_SettledOnRows(trainer))
        trainer.train()
        trained = calls.num_trained_trees
        evaluated = trainer.evaluate()
    return {
        "gradients": recorder.gradients,
        "trees": trained,
        "eval_trees": calls.num_trees,
        "logs": log_rows(trainer),
        "eval_loss": evaluated["eval_loss"],
    }


def train_kept(*, sharded: bool = False, **options: Any) -> dict[str, Any]:
    """Train two epochs of one update whose beginnings are kept, and say how many each rank kept.

    Args:
        sharded: By FSDP2.
        **options: Of the trainer.
    """
    if sharded:
        allow_sharding_on_cpu()
        options |= FSDP2
    recorder, rows = WholeGradients(), rows_behind()
    settings = {"effective_batch_size": len(rows), "num_train_epochs": 3} | KEEPING | options
    with contextlib.ExitStack() as stack:
        for context in (float64_everywhere(), keeping_always(), small_buckets()):
            stack.enter_context(context)
        kept = stack.enter_context(watching_kept())
        out = stack.enter_context(tempfile.TemporaryDirectory())
        model = tiny_llama(attn_implementation="sdpa")
        trainer = make_trainer(out, rows, model=model, callbacks=[recorder], **settings)
        trainer.train()
        why = trainer.shortcuts.reason("kept_beginnings")
    return {"gradients": recorder.gradients, "kept": kept, "why": why, "logs": log_rows(trainer)}
