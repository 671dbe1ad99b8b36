"""Describe settings and times in sentences, for reports and the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from hf_gradacc.text import quantity
from hf_gradacc.tracking.parity_file import describe_parity
from hf_gradacc.tracking.phases import Phase

__all__ = ["PHASE_LABELS", "describe_settings", "describe_time"]

PHASE_LABELS: dict[Phase, str] = {
    "data": "waiting for data",
    "forward_backward": "forward and backward",
    "reduction": "reduction over ranks",
    "optimizer": "optimizer",
}


def describe_settings(
    settings: Mapping[str, Any], *, micro_batches: float | None = None
) -> Iterator[str]:
    """Describe in sentences what was trained, how, and on what.

    Args:
        settings: The content of `gradacc_run.json`.
        micro_batches: Mean micro-batches per update; None if it was not logged.
    """
    batch, model = settings.get("batch", {}), settings.get("model", {})
    args, hardware = settings.get("training_arguments", {}), settings.get("hardware", {})
    if model:
        total, trained = model["num_parameters"], model["num_trainable_parameters"]
        name = model.get("name_or_path") or model["class"]
        share = "all of them" if total == trained else f"{quantity(trained)} of them"
        yield (
            f"{name} has {quantity(total)} parameters in {', '.join(model['dtypes'])}; "
            f"{share} were trained."
        )
    if batch.get("tokens_per_update"):
        yield f"An update held at least {batch['tokens_per_update']:,} target tokens."
    elif batch.get("effective_batch_size"):
        asked, how = batch.get("requested", {}), ""
        if not asked.get("effective_batch_size"):
            size, steps = (
                asked.get(name) or 1
                for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
            )
            # Ranks that compute rows together are one.
            num_replicas = batch["effective_batch_size"] // (size * steps)
            how = f" ({size} per device × {steps} accumulation steps × {num_replicas} ranks)"
        yield f"An update held {batch['effective_batch_size']:,} sequences{how}."
    if micro_batches is not None:
        budget = batch.get("max_tokens_per_micro_batch")
        limit = f", at most {budget:,} tokens each" if isinstance(budget, int) else ""
        yield f"It was cut into {quantity(micro_batches)} micro-batches on average{limit}."
    if args:
        yield (
            f"Optimizer {args.get('optim')}, learning rate {quantity(args.get('learning_rate'))} "
            f"({args.get('lr_scheduler_type')}), weight decay {args.get('weight_decay')}, "
            f"gradients clipped at {args.get('max_grad_norm')}, seed {args.get('seed')}."
        )
    if hardware:
        device = hardware.get("device_name") or hardware.get("device", "cpu")
        ranks = hardware.get("world_size", 1)
        yield f"It ran on {ranks} × {device}, {hardware.get('platform', '')}."
    if settings.get("parity"):
        yield (
            f"The check of its gradient against that of the whole batch "
            f"{describe_parity(settings['parity'])}."
        )
    if settings.get("resumed_at"):
        *steps, last = map(str, settings["resumed_at"])
        yield (
            f"It was resumed after updates {', '.join(steps)} and {last}."
            if steps
            else f"It was resumed after update {last}."
        )
    if settings.get("versions"):
        listed = ", ".join(f"{name} {number}" for name, number in settings["versions"].items())
        yield f"Versions: {listed}."


def describe_time(phases: Mapping[Any, float]) -> Iterator[str]:
    """Describe where the time of an update went, largest share first.

    Args:
        phases: Seconds per update of each phase; {} yields nothing.

    >>> list(describe_time({"data": 0.1, "forward_backward": 0.8, "optimizer": 0.1}))
    ['Where time goes: an update took 1 s, 80.0% of it forward and backward, 10.0% waiting for data,
    10.0% optimizer.']
    """
    total = math.fsum(phases.values())
    if total <= 0:
        return
    shares = sorted(phases.items(), key=lambda item: -item[1])
    parts = [f"{seconds / total:.1%} {PHASE_LABELS[phase]}" for phase, seconds in shares if seconds]
    first, *rest = parts
    head = first.replace("% ", "% of it ", 1)
    yield f"Where time goes: an update took {total:.3g} s, {', '.join([head, *rest])}."
