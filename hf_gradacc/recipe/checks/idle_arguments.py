"""Training arguments that would change nothing as a recipe stands.

Transformers reads some only beside others, and some not at all where this package does their work.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_gradacc.recipe.checks.idle_keys import Finding
from hf_gradacc.recipe.checks.readable import ReadableSections

__all__ = ["NEVER_READ", "find_idle_arguments"]

_NO_METRICS = "evaluation.metrics says what is measured beside the loss, and keeps no logits"
_NO_PHASE = "the command says what is done, and that data.eval or data.holdout is evaluated"
_NO_DDP = "DDP does not sum gradients here: they are summed once an update, outside of it"

NEVER_READ: dict[str, tuple[str, str]] = {
    "average_tokens_across_devices": ("the loss is a mean over all ranks, always", ""),
    "batch_eval_metrics": (_NO_METRICS, ""),
    "bf16_full_eval": (
        "the model would be rounded before it is saved",
        "set bf16, or model.dtype",
    ),
    "dataloader_in_order": ("updates are trained in the order they were drawn, always", ""),
    "ddp_broadcast_buffers": (_NO_DDP, ""),
    "ddp_find_unused_parameters": (_NO_DDP, ""),
    "ddp_static_graph": (_NO_DDP, ""),
    "do_eval": (_NO_PHASE, "set eval_strategy for evaluations on the way"),
    "do_predict": (_NO_PHASE, ""),
    "do_train": (_NO_PHASE, ""),
    "eval_accumulation_steps": (_NO_METRICS, ""),
    "eval_do_concat_batches": (_NO_METRICS, ""),
    "eval_use_gather_object": (_NO_METRICS, ""),
    "fp16_full_eval": (
        "the model would be rounded before it is saved",
        "set fp16, or model.dtype",
    ),
    "include_for_metrics": (_NO_METRICS, ""),
    "label_names": ("the labels of a recipe's rows are called labels", ""),
    "length_column_name": ("lengths are measured, not read", ""),
    "logging_nan_inf_filter": ("a loss that is NaN is never hidden", "set on_non_finite"),
    "prediction_loss_only": (_NO_METRICS, ""),
    "remove_unused_columns": ("a recipe's rows have the columns that the model takes", ""),
}
"""Arguments that never take effect in a recipe: why, and what to set instead."""

_NOT_IN_ACCELERATOR = {
    "split_batches": "every rank loads its own share of each update",
    "use_seedable_sampler": "rows are drawn by train.seed and train.data_seed",
}

_ADAM_FREE = ("adafactor", "adagrad", "galore", "grokadamw", "lomo", "adalomo", "rmsprop", "sgd")
"""How the names of optimizers begin that read neither betas nor epsilon."""

_NO_WARMUP = ("constant", "greedy", "reduce_lr_on_plateau")
_NO_SCHEDULER_OPTIONS = ("constant", "constant_with_warmup")
_LOW_RANK = ("apollo", "galore")


def find_idle_arguments(sections: ReadableSections) -> Iterator[Finding]:
    """Yield the keys of `train` that nothing reads.

    Args:
        sections: The recipe.
    """
    for name, (why, fix) in NEVER_READ.items():
        if sections.sets(name):
            yield ("train", name), f"has no effect: {why}", fix or "leave it out"
    for name, is_read, why, fix in _conditions(sections):
        if not is_read and sections.sets(name):
            yield ("train", name), f"has no effect: {why}", fix
    accelerator = sections.trains_with("accelerator_config")
    for name in accelerator if isinstance(accelerator, dict) else ():
        if name in _NOT_IN_ACCELERATOR and accelerator[name] is not None:
            why = f"has no effect: {_NOT_IN_ACCELERATOR[name]}"
            yield ("train", "accelerator_config", name), why, "leave it out"


_Condition = tuple[str, bool, str, str]
"""An argument, whether it is read, why not, and what to do."""


def _conditions(sections: ReadableSections) -> Iterator[_Condition]:
    yield from _of_evaluation(sections)
    yield from _of_saving_and_logging(sections)
    yield from _of_size_and_loading(sections)
    yield from _of_optimizer(sections)
    yield from _of_model(sections)


def _needs(other: str, names: tuple[str, ...], is_set: bool) -> Iterator[_Condition]:
    for name in names:
        yield name, is_set, f"it belongs to train.{other}", f"set train.{other}, or leave it out"


def _of_evaluation(sections: ReadableSections) -> Iterator[_Condition]:
    get = sections.trains_with
    evaluates = get("eval_strategy") != "no"
    names = ("per_device_eval_batch_size",)
    for name in (*names, "eval_steps", "eval_delay", "greater_is_better"):
        why, fix = "there are no held-out rows", "set data.eval or data.holdout"
        yield name, sections.has_eval, why, fix
    by_steps = get("eval_strategy") == "steps"
    yield from _needs("eval_strategy: steps", ("eval_steps",), by_steps or not sections.has_eval)
    judged = ("eval_delay", "metric_for_best_model", "greater_is_better", "load_best_model_at_end")
    yield from _needs("eval_strategy", judged, evaluates or not sections.has_eval)
    has_metric = get("metric_for_best_model") is not None or get("load_best_model_at_end")
    has_metric = has_metric or sections.stops_early
    has_metric = has_metric or get("lr_scheduler_type") in ("greedy", "reduce_lr_on_plateau")
    yield from _needs("metric_for_best_model", ("greater_is_better",), bool(has_metric))


def _of_saving_and_logging(sections: ReadableSections) -> Iterator[_Condition]:
    get = sections.trains_with
    yield from _needs("save_strategy: steps", ("save_steps",), get("save_strategy") == "steps")
    saved = ("save_total_limit", "save_only_model", "save_on_each_node")
    yield from _needs("save_strategy", saved, get("save_strategy") != "no")
    # Evaluations come as often as log rows if nothing is said of them.
    by_steps = get("eval_strategy") == "steps" and get("eval_steps") is None
    by_steps = by_steps or get("logging_strategy") == "steps"
    yield from _needs("logging_strategy: steps", ("logging_steps",), by_steps)
    reporters = get("report_to")
    reporters = reporters if isinstance(reporters, list) else [reporters]
    tracks = bool({"trackio", "all"} & set(reporters))
    of_trackio = ("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")
    yield from _needs("report_to: trackio", of_trackio, tracks)
    pushes = bool(get("push_to_hub"))
    pushed = ("hub_model_id", "hub_strategy", "hub_always_push", "hub_revision")
    yield from _needs("push_to_hub", pushed, pushes)
    yield from _needs("push_to_hub", ("hub_private_repo",), pushes or tracks)


def _of_size_and_loading(sections: ReadableSections) -> Iterator[_Condition]:
    get = sections.trains_with
    by_updates = (get("max_steps") or -1) > 0
    why = "train.max_steps says when to end"
    yield "num_train_epochs", not by_updates, why, "keep one of them"
    has_budget = get("max_tokens_per_micro_batch") is not None
    sized = get("effective_batch_size") is not None or get("tokens_per_update") is not None
    why = "train.max_tokens_per_micro_batch cuts by tokens"
    yield "per_device_train_batch_size", not (has_budget and sized), why, "leave it out"
    yield (
        "auto_find_batch_size",
        not has_budget,
        f"{why}, and finer if memory runs out",
        "leave it out",
    )
    skips = get("on_non_finite") == "skip"
    yield from _needs("on_non_finite: skip", ("max_skipped_updates_in_a_row",), skips)
    workers = ("persistent_workers", "prefetch_factor", "multiprocessing_context")
    has_workers = (get("dataloader_num_workers") or 0) > 0
    names = tuple(f"dataloader_{name}" for name in workers)
    yield from _needs("dataloader_num_workers", names, has_workers)
    why = "nothing is copied to a device with train.use_cpu"
    yield "dataloader_pin_memory", not get("use_cpu"), why, "leave it out"
    is_stream = sections.data is not None and sections.data.streaming
    why = "the rows of data.streaming are trained in the order they are read"
    yield "train_sampling_strategy", not is_stream, why, "leave it out"
    by_length = get("train_sampling_strategy") not in ("random", "sequential")
    why = (
        "every update draws its rows by train.seed, and its micro-batches hold rows of like length"
    )
    yield "train_sampling_strategy", not by_length, why, "use random or sequential"


def _of_optimizer(sections: ReadableSections) -> Iterator[_Condition]:
    get = sections.trains_with
    optimizer, schedule = str(get("optim")), str(get("lr_scheduler_type"))
    is_schedule_free = optimizer.startswith("schedule_free") and optimizer != "schedule_free_radam"
    why = f"lr_scheduler_type {schedule} has no warmup"
    warms = schedule not in _NO_WARMUP or is_schedule_free
    yield "warmup_steps", warms, why, "use a train.lr_scheduler_type with warmup, or leave it out"
    deepspeed = sections.paths.get(("train", "deepspeed"), get("deepspeed"))
    decays = schedule == "warmup_stable_decay"
    yield from _needs("lr_scheduler_type: warmup_stable_decay", ("lr_decay_steps",), decays)
    why = "DeepSpeed makes the optimizer that its options name, of all parameters alike"
    yield "learning_rates", not _makes_optimizer(deepspeed), why, "leave one of them out"
    why = f"train.lr_scheduler_type {schedule} has no options"
    yield "lr_scheduler_kwargs", schedule not in _NO_SCHEDULER_OPTIONS, why, "leave it out"
    why = f"train.optim {optimizer} does not read it"
    names: tuple[str, ...] = ("adam_beta1", "adam_beta2", "adam_epsilon")
    if optimizer.startswith(("lion", "paged_lion")):
        names = ("adam_epsilon",)
    elif not (optimizer.startswith(_ADAM_FREE) or optimizer == "schedule_free_sgd"):
        names = ()
    for name in names:
        yield name, False, why, "leave it out; options of its own stand in train.optim_args"
    yield "optim_target_modules", optimizer.startswith(_LOW_RANK), why, "leave it out"


def _makes_optimizer(deepspeed: Any) -> bool:
    """Whether options of DeepSpeed, or a file of them, have an optimizer of their own."""
    if isinstance(deepspeed, str) and not deepspeed.lstrip().startswith("{"):
        try:
            deepspeed = Path(deepspeed).read_text(encoding="utf-8")
        except (OSError, ValueError):  # it is missed elsewhere
            return False
    if isinstance(deepspeed, str):
        try:
            deepspeed = json.loads(deepspeed)
        except ValueError:
            return False
    return isinstance(deepspeed, dict) and "optimizer" in deepspeed


def _of_model(sections: ReadableSections) -> Iterator[_Condition]:
    get, model = sections.trains_with, sections.model
    recomputes = bool(get("activation_checkpointing") or get("gradient_checkpointing"))
    options = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
    yield from _needs("activation_checkpointing", options, recomputes)
    for name in ("checkpointing", "checkpointing_kwargs"):
        twice = sections.sets(f"activation_{name}") and sections.sets(f"gradient_{name}")
        why = f"it is an older name of train.activation_{name}"
        yield f"gradient_{name}", not twice, why, "keep one of them"
    yield from _needs("use_liger_kernel", ("liger_kernel_config",), bool(get("use_liger_kernel")))
    compiles = sections.train.get("torch_compile") is not False
    yield from _needs(
        "torch_compile: true", ("torch_compile_backend", "torch_compile_mode"), compiles
    )
    sharded = bool(get("fsdp")) or "ACCELERATE_USE_FSDP" in os.environ
    yield from _needs("fsdp", ("fsdp_config",), sharded)
    if model is None:
        return
    is_float32 = model.dtype == "float32" or (model.dtype == "auto" and model.config is not None)
    for name in ("low_precision_updates", "accumulate_grads_in_fp32"):
        why = "the weights are float32"
        yield name, not is_float32, why, "leave it out, or set model.dtype"
    for name in ("target_only_logits", "chunked_loss"):
        is_class = model.task == "classification" and get(name) is True
        yield (
            name,
            not is_class,
            "a classifier has one row of logits for a sequence",
            "leave it out",
        )
