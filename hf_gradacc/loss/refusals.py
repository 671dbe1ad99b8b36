"""What is known by name to train another gradient: losses, optimizers, kinds of parallelism.

The probe compares rows together with rows alone and would find most of these. Not all: before its
first update a DPO model equals its reference, and then all pairs have the same loss, however it is
made. So what cannot be exact is refused here, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from hf_gradacc.errors import ConfigError, DataError, LossError

__all__ = ["refuse_by_name", "refuse_steps_in_backward", "refuse_unknown_engines"]

# Of TRL 1.16, `trl.experimental` included; every Trainer it ships stands in one of these three.
_MEANS_OVER_ROWS = {"DPOTrainer", "KTOTrainer", "RewardTrainer", "SFTTrainer", "TPOTrainer"}


_GENERATING = {
    "A2POTrainer",
    "AsyncDistillationTrainer",
    "AsyncGRPOTrainer",
    "DistillationTrainer",
    "GKDTrainer",
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


_TWO_MEANS = {"CPOTrainer", "ORPOTrainer"}


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


def refuse_by_name(trainer: Any) -> None:
    """Refuse a trainer whose update is not the sum of its micro-batches.

    Raises:
        LossError: Naming the trainer, the loss, why no cut is exact, and a way out.
        DataError: Several datasets in one dictionary.
    """
    names = {cls.__name__ for cls in type(trainer).__mro__}
    for name in sorted(names & _GENERATING):
        raise LossError(
            f"{name} generates what it trains on, or has it scored elsewhere, and compares answers "
            f"of a group with each other: its updates are not rows of a dataset that may be cut "
            f"anywhere.\n  Use {name} without GradAccMixin."
        )
    for name in sorted(names & _TWO_MEANS):
        raise LossError(
            f"{name} adds a mean over the tokens of the chosen answers to a mean over pairs: no "
            f"weight makes pieces of both add up. It also gathers its metrics over ranks in every "
            f"forward, where ranks with other numbers of micro-batches would wait forever.\n"
            f"  Use DPOTrainer, or {name} without GradAccMixin."
        )
    for cls in type(trainer).__mro__:
        theirs = cls.__module__.startswith("trl.") and cls.__name__.endswith("Trainer")
        if theirs and cls.__name__ not in {"_BaseTrainer", *_MEANS_OVER_ROWS}:
            raise LossError(
                f"{cls.__name__} is a trainer of TRL that is not known here: whether its loss is a "
                f"mean over rows of a dataset has not been looked at.\n"
                f"  Use it without GradAccMixin, or one of {', '.join(sorted(_MEANS_OVER_ROWS))}."
            )
    if "TPOTrainer" in names and getattr(trainer, "tpo_alpha", 1.0) != 0:
        raise LossError(
            f"TPOTrainer with tpo_alpha = {getattr(trainer, 'tpo_alpha', 1.0)} adds a mean over "
            f"the tokens of the reference answers to a mean over pairs: no weight makes pieces of "
            f"both add up.\n  Set tpo_alpha = 0.0, or use TPOTrainer without GradAccMixin."
        )
    if "KTOTrainer" in names and getattr(trainer, "calculate_KL", True):
        raise LossError(
            f"KTOTrainer with loss_type = {getattr(trainer, 'loss_type', 'kto')!r} compares each "
            f"row with the mean KL of the micro-batch it is in, so its loss is no mean over rows "
            f"and no cut of an update is exact.\n"
            f"  Set loss_type = 'apo_zero_unpaired', or use KTOTrainer without GradAccMixin."
        )
    if "DPOTrainer" in names:
        for loss in getattr(trainer, "loss_types", ()):
            if loss in _DPO_LOSSES:
                raise LossError(
                    f"DPOTrainer with loss_type = {loss!r} {_DPO_LOSSES[loss]}: no cut of an "
                    f"update is exact.\n"
                    f"  Set another loss_type, such as 'sigmoid', or use DPOTrainer without "
                    f"GradAccMixin."
                )
    if isinstance(getattr(trainer, "train_dataset", None), Mapping):
        raise DataError(
            f"train_dataset is a dictionary of the datasets {sorted(trainer.train_dataset)}: an "
            f"update is drawn from one. Join them with datasets.concatenate_datasets."
        )
    for loss in _own_losses(trainer):
        if getattr(loss, "n_dims_per_step", -1) > 0:
            raise LossError(
                f"{type(loss).__name__} with n_dims_per_step = {loss.n_dims_per_step} draws other "
                f"dimensions in every micro-batch: the gradient depends on how an update is cut.\n"
                f"  Set n_dims_per_step = -1, which takes all of them."
            )
        # A sum over embeddings cut to several sizes: what counts is the loss inside.
        loss = getattr(loss, "loss", loss) if type(loss).__name__ == "MatryoshkaLoss" else loss
        name = type(loss).__name__
        if type(loss).__module__.startswith("sentence_transformers") and name not in _ROW_BY_ROW:
            raise LossError(
                f"{name} is not known to be a mean over rows. Most losses of sentence-transformers "
                f"compare each row with the others of its micro-batch (in-batch negatives, "
                f"rankings): a smaller micro-batch is another loss and no cut is exact.\n"
                f"  Use a loss of single rows ({', '.join(sorted(_ROW_BY_ROW))}), or a Cached... "
                f"loss, which does its own cutting, without GradAccMixin."
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
    for kind in ("tp", "cp", "sp"):
        size = getattr(trainer, f"get_{kind}_size")()
        if size > 1:
            raise ConfigError(
                f"{kind}_size = {size}: tensor, context and sequence parallelism share rows or "
                f"targets between ranks, which the weight rule does not know yet. Use DDP."
            )


def refuse_steps_in_backward(args: Any) -> None:
    """Refuse optimizers that step inside of each backward where an update has several.

    Stock refuses layer-wise ones for accumulation, but not LOMO (transformers'
    ``trainer_optimizer.py``), and it does not know of updates that are cut by tokens.

    Raises:
        ConfigError: If weights would move in the middle of an update.
    """
    name = str(getattr(args.optim, "value", args.optim))
    if "layerwise" not in name and name not in ("lomo", "adalomo"):
        return
    size = args.per_device_train_batch_size
    size_of_update = args.resolve_effective_batch_size(args.world_size)
    if args.max_tokens_per_micro_batch is None and size_of_update is not None:
        if size_of_update <= size * args.world_size:
            return
        what = f"an update of {size_of_update} sequences in micro-batches of {size}"
    else:
        what = "an update that is cut or drawn by tokens"
    raise ConfigError(
        f"optim = {name!r} steps inside of each backward, so {what} would move weights in every "
        f"micro-batch: it cannot accumulate. Use another optimizer, or one micro-batch per update: "
        f"gradient_accumulation_steps = 1 without max_tokens_per_micro_batch."
    )
