"""Checkpoints of models whose weights transformers dealt to the ranks while it loaded them.

The stock Trainer trains such a model (``from_pretrained(distributed_config=...)``) but refuses to
save what a resume needs, and it loads whole tensors into weights that are split, which fails. Here
weights are written whole, as stock writes them, and read by ``from_pretrained``, so that they fit
any number of ranks. The optimizer's state is written by torch's distributed checkpoints, each rank
its part, and read by name: another split is no obstacle.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.utils import logging

from hf_gradacc.compat import is_model_sharded_by_loading
from hf_gradacc.errors import CheckpointError
from hf_gradacc.ranks.collectives import share_of_first_rank, wait_for_ranks
from hf_gradacc.ranks.split_state import (
    load_optimizer_state,
    local_part,
    model_class_of,
    save_optimizer_state,
)
from hf_gradacc.trainer.as_requested import changed

__all__ = [
    "holds_split_optimizer",
    "is_split",
    "load_optimizer",
    "load_weights",
    "save_optimizer",
    "saves_checkpoints",
    "writing_together",
]

logger = logging.get_logger(__name__)

_FOLDER = "optimizer"
"""Beside the weights of a checkpoint: the optimizer's state, in parts."""


def saves_checkpoints(values: Iterable[Any]) -> contextlib.AbstractContextManager[Any]:
    """Let the stock constructor take a split model together with checkpoints to resume from.

    It refuses them unless only models are saved.

    Args:
        values: What the constructor is called with.
    """
    values = list(values)
    arguments = next((v for v in values if isinstance(v, TrainingArguments)), None)
    if arguments is None or not any(is_model_sharded_by_loading(v) for v in values):
        return contextlib.nullcontext()
    return changed(arguments, save_only_model=True)


@contextlib.contextmanager
def writing_together(model: nn.Module, output_dir: str) -> Iterator[None]:
    """Write a split model: all ranks put it together, the first writes it, the others wait.

    They wait here, also if the first rank cannot write. Transformers' own wait is left out: a rank
    that fails before it, or after it, would be missed by the others or meet them elsewhere.

    Args:
        model: The model.
        output_dir: Where to write.

    Raises:
        OSError: On all ranks, if the folder cannot be made.
    """
    problem = None
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = error
    if (problem := share_of_first_rank(problem)) is not None:
        raise problem
    waits = [m for m in model.modules() if hasattr(m, _WAIT)]
    for module in waits:
        setattr(module, _WAIT, lambda distributed_config: None)
    try:
        yield
    finally:
        for module in waits:
            delattr(module, _WAIT)
        wait_for_ranks()


_WAIT = "barrier_after_gathered_checkpoint_save"


def save_optimizer(trainer: Any, output_dir: str) -> None:
    """Save the state of the optimizer, each rank its part, and that of the schedule."""
    optimizer = trainer.optimizer.optimizer
    save_optimizer_state(trainer.model, optimizer, str(Path(output_dir, _FOLDER)))
    if trainer.args.should_save:
        torch.save(trainer.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))


def holds_split_optimizer(checkpoint: str | None) -> bool:
    """Return whether a checkpoint holds the state of an optimizer as `save_optimizer` writes it."""
    return checkpoint is not None and Path(checkpoint, _FOLDER, ".metadata").is_file()


def load_optimizer(trainer: Any, checkpoint: str) -> None:
    """Load what `save_optimizer` wrote, however the model is split now; or not at all.

    Raises:
        CheckpointError: If the checkpoint holds the state of a model that was not split.
    """
    if not holds_split_optimizer(checkpoint):
        if Path(checkpoint, OPTIMIZER_NAME).is_file():
            raise CheckpointError(
                f"{Path(checkpoint).name} holds the optimizer of a model that was not split, and "
                f"this one is (distributed_config).\n  Resume it as it was trained; or begin a run "
                f"with these weights: from_pretrained({checkpoint!r}, distributed_config=...), "
                f"without resume_from_checkpoint."
            )
        return
    optimizer = trainer.optimizer.optimizer
    load_optimizer_state(trainer.model, optimizer, str(Path(checkpoint, _FOLDER)))
    schedule = torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True)
    trainer.lr_scheduler.load_state_dict(schedule)


def load_weights(model: PreTrainedModel, checkpoint: str) -> None:
    """Load whole weights into a split model: load another one of them, and copy this rank's part.

    The model itself cannot be loaded anew, since the optimizer holds its weights. For a moment
    there are two, before there are gradients or an optimizer's state.
    """
    loaded = model_class_of(model).from_pretrained(
        checkpoint,
        config=copy.deepcopy(model.config),
        distributed_config=model.config.distributed_config,
        dtype=model.dtype,
    )
    theirs = loaded.state_dict()
    with torch.no_grad():
        for name, mine in model.state_dict().items():
            local_part(mine).copy_(local_part(theirs[name]))


def is_split(model: nn.Module) -> bool:
    """Return whether a model is one that transformers split, and no adapter around it."""
    return isinstance(model, PreTrainedModel) and is_model_sharded_by_loading(model)
