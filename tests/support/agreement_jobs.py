"""Ranks that begin with something of their own."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.utils.data import Subset

from hf_gradacc import GradAccError

from .tiny import make_trainer, ragged_rows, tiny_llama

ROWS = ragged_rows(12, seed=4)


def _shuffled(rank: int) -> Any:
    return random.Random(rank).sample(ROWS, len(ROWS))


def _partly_frozen(rank: int) -> Any:
    model = tiny_llama()
    model.get_input_embeddings().requires_grad_(rank == 0)  # type: ignore[operator]
    return model


CASES: dict[str, Callable[[int], dict[str, Any]]] = {
    "nothing": lambda rank: {},
    "sharded by the user": lambda rank: {"rows": ROWS[rank::2]},
    "one rank has fewer rows": lambda rank: {"rows": ROWS[rank:]},
    "shuffled by each rank": lambda rank: {"rows": _shuffled(rank)},
    "a subset by rank": lambda rank: {"rows": Subset(ROWS, range(rank, 12, 2))},
    "another seed": lambda rank: {"seed": 42 + rank},
    "a seed that decides no membership": lambda rank: {"seed": 42 + rank, "data_seed": 1},
    "another learning rate": lambda rank: {"learning_rate": 0.1 * (1 + rank)},
    "another width": lambda rank: {"model": tiny_llama(hidden_size=16 + 16 * rank)},
    "other weights": lambda rank: {"model": tiny_llama(seed=rank)},
    "other layers trained": lambda rank: {"model": _partly_frozen(rank)},
}


def begin_differently() -> dict[str, tuple[str, str, int]]:
    """Begin a run in each way; return the error, its text, and how many updates were trained."""
    told = {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, ROWS)  # makes the process group
        rank = dist.get_rank()
        for name, change in CASES.items():
            options = {"effective_batch_size": 4, "max_steps": 1, **change(rank)}
            trainer = make_trainer(folder, options.pop("rows", ROWS), **options)
            try:
                trainer.train()
                told[name] = ("", "", trainer.state.global_step)
            except GradAccError as error:
                told[name] = (type(error).__name__, str(error), trainer.state.global_step)
    return told
