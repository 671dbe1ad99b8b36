"""Updates of trees on several ranks."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import TrainerCallback

from hf_gradacc import GradAccTrainer
from hf_gradacc.loss.shortcuts.choose import Shortcuts
from hf_gradacc.trainer.loss import asking

from .common_prompts import rows_of_prompts, watching_calls
from .kept_rows import KEEPING, keeping_always, rows_behind, watching_kept
from .rank_jobs import FSDP2, WholeGradients, allow_sharding_on_cpu
from .reduction_jobs import small_buckets
from .reference import float64_everywhere
from .tiny import log_rows, make_trainer, tiny_llama

__all__ = ["NUM_ROWS", "PER_UPDATE", "RunsRowsTwice", "train_kept", "train_trees"]

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


class RunsRowsTwice(GradAccTrainer):
    """Adds up two gradients of every micro-batch."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        return super().training_step(*args, **kwargs) + super().training_step(*args, **kwargs)


class _FindsLess:
    """A rank whose trial finds less than that of the others, as one that runs out of memory."""

    def __init__(self, changes: Mapping[str, Any]) -> None:
        self.changes, self.stock = changes, asking.with_sharing

    def __call__(self, *args: Any, **options: Any) -> Shortcuts:
        return replace(self.stock(*args, **options), **self.changes)


def train_kept(
    *,
    sharded: bool = False,
    twice: bool = False,
    finds_on_first: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train three updates whose beginnings are kept, and say which each rank kept.

    Args:
        sharded: By FSDP2.
        twice: By a step that runs its rows twice.
        finds_on_first: What the first rank finds otherwise in its trial of trees.
        **options: Of the trainer.
    """
    if finds_on_first is not None and int(os.environ["RANK"]) == 0:
        asking.with_sharing = _FindsLess(finds_on_first)
    options |= {"trainer_class": RunsRowsTwice} if twice else {}
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
        taken, cost = trainer.shortcuts, trainer.update_collator.tree_cost
    return {
        "gradients": recorder.gradients,
        "kept": kept,
        "why": taken.reason("kept_beginnings"),
        "way": (bool(taken.bodies), taken.trees_by_rows, taken.keeps_beginnings),
        "costs_of": (trainer.update_collator.shares_prefixes, cost.by_rows, cost.keeps),
        "logs": log_rows(trainer),
    }
