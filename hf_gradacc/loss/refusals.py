"""What is known by name to train another gradient: losses, optimizers, kinds of parallelism.

The probe compares rows together with rows alone and would find most of these. Not all: before its
first update a DPO model equals its reference, and then all pairs have the same loss, however it is
made. So what no cut makes exact is named here, with the reason. It is refused only where an update
is not made of rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from transformers.utils import logging

from hf_gradacc.errors import ConfigError, DataError, LossError

__all__ = [
    "find_inexact_by_name",
    "refuse_by_name",
    "refuse_generating",
    "refuse_steps_in_backward",
    "refuse_unknown_engines",
    "warn_by_name",
]

logger = logging.get_logger(__name__)

# Of TRL 1.16, `trl.experimental` included; every Trainer it ships stands in one of these two.
_OF_ROWS = {
    "CPOTrainer",
    "DPOTrainer",
    "GKDTrainer",
    "KTOTrainer",
    "ORPOTrainer",
    "RewardTrainer",
    "SFTTrainer",
    "TPOTrainer",
}


_GENERATING = {
    "A2POTrainer",
    "AsyncDistillationTrainer",
    "AsyncGRPOTrainer",
    "DistillationTrainer",
    "GMPOTrainer",
    "GOLDTrainer",
    "GRPOTrainer",
    "IWOPDTrainer",
    "OnlineDPOTrainer",
    "RLOOTrainer",
    "SDFTTrainer",
    "SDPOTrainer",
    "ServerDistillationTrainer",
}


_BUILDS_BATCHES = ("_prepare_inputs", "get_train_dataloader")
"""Hooks by which a trainer makes its batches of something else than rows, or several times."""


_DPO_LOSSES = {
    "aot": "sorts the pairs of a micro-batch against each other",
    "aot_unpaired": "sorts the answers of a micro-batch against each other",
    "sft": "is a mean over tokens, while the update is weighted by pairs",
}


# Of sentence-transformers: each row has a loss of its own, and their mean is taken.
_ROW_BY_ROW = {
    "BinaryCrossEntropyLoss",
    "ContrastiveLoss",
    "CosineSimilarityLoss",
    "CrossEntropyLoss",
    "DistillKLDivLoss",
    "MarginMSELoss",
    "MSELoss",
    "SoftmaxLoss",
    "TripletLoss",
}


def refuse_generating(trainer_class: type) -> None:
    """Refuse a trainer whose updates are not made of rows, before it loads what it generates with.

    Raises:
        LossError: Naming the trainer, why, and a way out.
    """
    for name in sorted({cls.__name__ for cls in trainer_class.__mro__} & _GENERATING):
        raise LossError(
            f"{name} generates what it trains on, or has it scored elsewhere, and compares answers "
            f"of a group with each other: its updates are not rows of a dataset that may be cut "
            f"anywhere.\n  Use {name} without GradAccMixin."
        )
    for cls in trainer_class.__mro__:
        theirs = cls.__module__.startswith("trl.") and cls.__name__.endswith("Trainer")
        builds = sorted(x for x in vars(cls) if x in _BUILDS_BATCHES or "generate" in x)
        if theirs and builds and cls.__name__ not in {"_BaseTrainer", *_OF_ROWS}:
            raise LossError(
                f"{cls.__name__} is a trainer of TRL that is not known here, and it has "
                f"{', '.join(builds)}: it may generate what it trains on.\n"
                f"  Use it without GradAccMixin, or one of {', '.join(sorted(_OF_ROWS))}."
            )


def refuse_by_name(trainer: Any) -> None:
    """Refuse settings and data of which no updates can be made.

    Raises:
        LossError: Naming the trainer, why, and a way out.
        DataError: Several datasets in one dictionary.
    """
    share: float = getattr(trainer, "lmbda", 0.5)
    seq_kd: bool = getattr(trainer, "seq_kd", False)
    is_gkd = any(cls.__name__ == "GKDTrainer" for cls in type(trainer).__mro__)
    if is_gkd and (share > 0 or seq_kd):
        raise LossError(
            f"GKDTrainer with lmbda = {share} and seq_kd = {seq_kd} generates what it trains on: "
            f"what a micro-batch weighs is known only when it has run.\n"
            f"  Set lmbda = 0.0 and seq_kd = False, or use GKDTrainer without GradAccMixin."
        )
    if isinstance(getattr(trainer, "train_dataset", None), Mapping):
        raise DataError(
            f"train_dataset is a dictionary of the datasets {sorted(trainer.train_dataset)}: an "
            f"update is drawn from one. Join them with datasets.concatenate_datasets."
        )


def warn_by_name(trainer: Any) -> None:
    """Say of a loss that is no mean over rows that no cut of an update is exact."""
    for reason in find_inexact_by_name(trainer):
        logger.warning_once(f"{reason}: no cut of an update gives exactly the whole.")


def find_inexact_by_name(trainer: Any) -> Iterator[str]:
    """Yield why a trainer's loss is no mean over rows, naming the setting or the loss.

    The few rows a loss is asked with need not show it: where none of them is a positive of another,
    say, a loss that compares them is zero for all.
    """
    names = {cls.__name__ for cls in type(trainer).__mro__}
    for name in sorted(names & {"CPOTrainer", "ORPOTrainer"}):
        alpha = getattr(trainer, "cpo_alpha", 1.0)
        if name == "ORPOTrainer" or alpha != 0:
            yield (
                f"{name} adds a mean over the tokens of the chosen answers to a mean over pairs"
                + (f" (cpo_alpha = {alpha})" if name == "CPOTrainer" else "")
            )
    if "TPOTrainer" in names and getattr(trainer, "tpo_alpha", 1.0) != 0:
        yield (
            f"TPOTrainer with tpo_alpha = {getattr(trainer, 'tpo_alpha', 1.0)} adds a mean over "
            f"the tokens of the reference answers to a mean over pairs"
        )
    if "KTOTrainer" in names and getattr(trainer, "calculate_KL", True):
        yield (
            f"KTOTrainer with loss_type = {getattr(trainer, 'loss_type', 'kto')!r} compares each "
            f"row with the mean KL of its micro-batch ('apo_zero_unpaired' does not)"
        )
    if "DPOTrainer" in names:
        for loss in getattr(trainer, "loss_types", ()):
            if loss in _DPO_LOSSES:
                yield f"DPOTrainer with loss_type = {loss!r} {_DPO_LOSSES[loss]}"
    if hasattr(trainer, "compute_update_loss"):
        yield (
            f"{type(trainer).__name__}.compute_update_loss is meant to be taken of all rows of an "
            f"update, and can be taken of those of a micro-batch only"
        )
    for loss in _own_losses(trainer):
        if getattr(loss, "n_dims_per_step", -1) > 0:
            yield (
                f"{type(loss).__name__} with n_dims_per_step = {loss.n_dims_per_step} draws other "
                f"dimensions in every micro-batch (-1 takes all)"
            )
        # A sum over embeddings cut to several sizes: what counts is the loss inside.
        loss = getattr(loss, "loss", loss) if type(loss).__name__ == "MatryoshkaLoss" else loss
        name = type(loss).__name__
        if type(loss).__module__.startswith("sentence_transformers") and name not in _ROW_BY_ROW:
            yield (
                f"{name} is not known to be a mean over rows; most losses of "
                f"sentence-transformers compare each row with the others of its micro-batch, which "
                f"are fewer the smaller it is"
            )


def _own_losses(trainer: Any) -> Iterable[Any]:
    """Return the losses of a sentence-transformers trainer: one, or one for each dataset."""
    loss = getattr(trainer, "loss", None)
    losses = list(loss.values()) if isinstance(loss, Mapping) else [loss]
    return [x for x in losses if isinstance(x, nn.Module)]


def refuse_unknown_engines(trainer: Any) -> None:
    """Refuse ways to share rows or targets that the weight rule does not know.

    Raises:
        ConfigError: Naming the setting and the way out.
    """
    args = trainer.args
    if args.n_gpu > 1:
        raise ConfigError(
            f"{args.n_gpu} GPUs in one process (DataParallel) cannot be exact: start one "
            f"process per GPU with torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES."
        )
    config = getattr(getattr(trainer.model, "config", None), "distributed_config", None)
    pp_size = getattr(config, "pp_size", 1)
    if pp_size > 1:
        raise ConfigError(
            f"distributed_config: pp_size = {pp_size}: the stock Trainer takes the stages of a "
            f"pipeline for copies of one model, and gives all of them the weights of the first. "
            f"Use tp_size or fsdp_size."
        )


def refuse_steps_in_backward(args: Any, *, num_replicas: int) -> None:
    """Refuse optimizers that step inside of each backward where an update has several.

    Stock refuses layer-wise ones for accumulation, but not LOMO (transformers'
    ``trainer_optimizer.py``), and it does not know of updates that are cut by tokens.

    Args:
        args: The trainer's arguments.
        num_replicas: Replicas of the model that train rows of their own.

    Raises:
        ConfigError: If weights would move in the middle of an update.
    """
    name = str(getattr(args.optim, "value", args.optim))
    if "layerwise" not in name and name not in ("lomo", "adalomo"):
        return
    size = args.per_device_train_batch_size
    size_of_update = args.resolve_effective_batch_size(num_replicas)
    if args.max_tokens_per_micro_batch is None and size_of_update is not None:
        if size_of_update <= size * num_replicas:
            return
        what = f"an update of {size_of_update} sequences in micro-batches of {size}"
    else:
        what = "an update that is cut or drawn by tokens"
    raise ConfigError(
        f"optim = {name!r} steps inside of each backward, so {what} would move weights in every "
        f"micro-batch: it cannot accumulate. Use another optimizer, or one micro-batch per update: "
        f"gradient_accumulation_steps = 1 without max_tokens_per_micro_batch."
    )
