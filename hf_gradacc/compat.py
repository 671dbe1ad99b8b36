"""All that differs between the releases we run with. Elsewhere nobody asks for a version.

Each entry names the release that changed something, and the change. What can be seen on the thing
itself is looked for there, so that builds from source and backports are right too.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import inspect
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from hf_gradacc.errors import VersionError

if TYPE_CHECKING:  # recipes are read without torch, which takes seconds to load
    from torch import Tensor

__all__ = [
    "NEWEST_TESTED",
    "RENAMED_OPTIONS",
    "check_versions",
    "divided_by_stock",
    "is_model_sharded_by_loading",
    "is_sharded_by_loading",
    "options_as_installed",
    "start_method_of_loader",
    "stock_divides_every_loss",
    "stock_splits_rows_in_evaluation",
    "streams_can_seek",
    "zero3_divides_by_all_ranks",
]

NEWEST_TESTED = {
    "torch": "2.13",
    "transformers": "5.24",
    "accelerate": "1.15",
    "datasets": "5.2",
    "peft": "0.21",
    "wandb": "0.31",
}
"""The newest releases that the tests have passed on. Newer ones run, and get one line."""

_OLDEST_TRANSFORMERS = "5.6"
"""Before it the stock loop counts targets and calls its hooks in other ways."""


def check_versions() -> None:
    """Refuse what would train wrongly in silence; name what nobody has tried yet.

    Raises:
        VersionError: If torch or transformers is too old.
    """
    import torch
    from transformers.utils import logging

    # torch 2.10, pytorch/pytorch#164751
    if not hasattr(torch.Tensor, "grad_dtype"):
        raise VersionError(
            f"torch {torch.__version__} is too old: it cannot sum the gradients of bfloat16 "
            f"weights in float32.\n  Install torch 2.10 or later."
        )
    installed = {name: found for name in NEWEST_TESTED if (found := _installed(name)) is not None}
    transformers = installed.get("transformers")
    if transformers is not None and _is_newer(Version(_OLDEST_TRANSFORMERS), transformers):
        raise VersionError(
            f"transformers {transformers} is too old: its Trainer counts targets in another way, "
            f"so gradients could be wrong.\n  Install transformers {_OLDEST_TRANSFORMERS} or later."
        )
    untried = [
        f"{name} {found} (tested up to {NEWEST_TESTED[name]})"
        for name, found in installed.items()
        if _is_newer(found, Version(NEWEST_TESTED[name]))
    ]
    if untried and os.environ.get("RANK", "0") == "0":
        logging.get_logger(__name__).warning_once(
            f"hf_gradacc has not been tested with {', '.join(untried)}."
        )


def _installed(name: str) -> Version | None:
    try:
        return Version(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_newer(found: Version, than: Version) -> bool:
    """Compare by major and minor number; patches, local builds and release candidates are alike."""
    return found.release[:2] > than.release[:2]


# ---- datasets ----------------------------------------------------------------------------------


def streams_can_seek() -> bool:
    """Return whether a ``datasets`` stream stands where its state says.

    Before datasets 5.1 it lost rows behind ``map`` or ``filter`` (huggingface/datasets#8145), and
    in 5.0.0 began anew when it was resumed a second time (huggingface/datasets#8295).
    """
    installed = _installed("datasets")
    return installed is not None and not _is_newer(Version("5.1"), installed)


# ---- deepspeed ---------------------------------------------------------------------------------


def zero3_divides_by_all_ranks() -> bool:
    """Return whether ZeRO-3 divides gradients by all ranks where rows are split between some.

    Stages 1 and 2 divide by the number of replicas, as the sum over a row's parts has to be. In
    DeepSpeed 0.19 stage 3 does so only without ``reduce_scatter``.
    """
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    reduce = getattr(DeepSpeedZeroOptimizer_Stage3, f"_{_ZERO3}__avg_scatter_grads", None)
    return reduce is not None and "sequence_parallel_size" not in inspect.getsource(reduce)


_ZERO3 = "DeepSpeedZeroOptimizer_Stage3"


# ---- transformers ------------------------------------------------------------------------------

RENAMED_OPTIONS = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}
"""Training arguments: their names since transformers 5.23, and the only ones before it."""


def options_as_installed(options: dict[str, Any], arguments: type[Any]) -> dict[str, Any]:
    """Give options the names that the installed class of training arguments knows.

    Args:
        options: By their name of today.
        arguments: A dataclass of training arguments.

    >>> from dataclasses import make_dataclass
    >>> before = make_dataclass("Before", ["gradient_checkpointing"])
    >>> options_as_installed({"activation_checkpointing": True, "seed": 1}, before)
    {'gradient_checkpointing': True, 'seed': 1}
    """
    known: Any = arguments.__dataclass_fields__
    return {
        name if name in known else RENAMED_OPTIONS.get(name, name): value
        for name, value in options.items()
    }


def start_method_of_loader(arguments: Any) -> str | None:
    """Return how loader workers are started; None for Python's default.

    Before transformers 5.15 no argument says so (huggingface/transformers#47164).
    """
    return getattr(arguments, "dataloader_multiprocessing_context", None)


def is_sharded_by_loading(trainer: Any) -> bool:
    """Return whether ``from_pretrained`` has dealt the weights to the ranks.

    Before transformers 5.19 the stock Trainer does not train such models
    (huggingface/transformers#48210), and does not know of them.
    """
    return bool(getattr(trainer, "is_distributed_loading_by_transformers", False))


def is_model_sharded_by_loading(model: Any) -> bool:
    """Return whether a model is one whose weights ``from_pretrained`` has dealt to the ranks."""
    return bool(getattr(model, "is_distributed_loading_by_transformers", False))


def stock_splits_rows_in_evaluation(trainer_class: Any) -> bool:
    """Return whether the stock evaluation runs rows in context parallelism, as training does."""
    return "_prepare_context_parallel_inputs" in trainer_class.prediction_step.__code__.co_names


def stock_divides_every_loss(trainer_class: type) -> bool:
    """Return whether the stock step divides by the divisor if ``loss_is_scaled_for_ga`` is False.

    It does since transformers 5.19.
    """
    return hasattr(trainer_class, "loss_is_scaled_for_ga")


@contextlib.contextmanager
def divided_by_stock(trainer: Any, was_divided: Callable[[], bool]) -> Iterator[Callable[..., Any]]:
    """Let the stock step divide its loss by the divisor, whatever the loss is.

    For trainers that do not by themselves, see `stock_divides_every_loss`: there a
    ``compute_loss_func``, or a count given to a model that takes one, kept it from dividing
    (huggingface/transformers#43595). There the loss is divided on its way into the backward.

    Args:
        trainer: The trainer, whose stock step runs inside of the context.
        was_divided: Tells whether anybody has read the divisor, which means: divides by it.

    Yields:
        A function for the loss that the step returns, to be called inside of the context.
    """
    divisor: float | None = None
    backward = trainer.accelerator.backward

    def divided_backward(loss: Tensor, **kwargs: Any) -> None:
        nonlocal divisor
        if divisor is None:
            divisor = 1.0 if was_divided() else trainer.current_gradient_accumulation_steps
        backward(loss / divisor, **kwargs)

    trainer.accelerator.backward = divided_backward
    try:
        yield lambda loss: loss if divisor is None else loss / divisor
    finally:
        del trainer.accelerator.backward
