"""Run other people's programs: stock on the whole batch, stock in pieces, and ours in pieces.

A `Program` is what somebody wrote for the stock Trainer. Nothing in it knows of this package: the
mixin is put before its trainer, and plain ``TrainingArguments`` are handed on. Three updates, of
eight rows, eight and seven, run in float64 by SGD. `Program.ours` says what must hold:

- ``exact``: the weights are those of stock on the whole batch.
- ``as stock``: they are no farther from them than stock's in pieces, and a warning says so.
- ``drawn``: the loss draws numbers, and with another cut others. So each update is held against the
  mean over its rows of the same losses, with the numbers that were drawn.
- ``named``: no cut is the whole batch, and a warning says so. There is nothing to be near to.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import datasets
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from hf_gradacc import GradAccMixin, GradAccTrainer

from .reference import float64_everywhere
from .tiny import PLAIN

datasets.disable_progress_bars()

NUM_ROWS, NUM_UPDATES = 23, 3
WHOLE = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
PIECES = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
ROUNDING = 1e-10
By = Literal["stock", "ours before", "ours behind"]


@dataclass(frozen=True)
class Program:
    """What somebody wrote for the stock Trainer, and what is claimed of it.

    Attributes:
        model: Makes the model.
        rows: Makes the training dataset.
        collate: Its data collator.
        trainer: Its subclass of ``Trainer``.
        options: Of its ``arguments``, beyond plain SGD.
        more: Makes what else its trainer takes, given the model.
        arguments: The class of its arguments.
        ours: What holds of the mixin before it.
        stock: Whether stock in pieces ends with the weights of stock on the whole batch.
        reference: Whose weights on the whole batch are the right ones.
        says: Words of the warning that names what is not exact.
        fault: Why the claim does not hold yet.
        check: Looks at the trainer of ours, once it has trained.
        whole: Options of the whole batch, where a micro-batch is not a number of rows.
        pieces: Likewise of pieces.
    """

    model: Callable[[], nn.Module]
    rows: Callable[[], Any]
    collate: Any = default_data_collator
    trainer: Any = Trainer
    options: dict[str, Any] = field(default_factory=dict)
    more: Callable[[Any], dict[str, Any]] = lambda model: {}
    arguments: Any = TrainingArguments
    ours: Literal["exact", "as stock", "drawn", "named"] = "exact"
    stock: Literal["exact", "off"] = "off"
    reference: Literal["stock", "ours"] = "stock"
    says: str | None = None
    fault: str | None = None
    check: Callable[[Any], None] | None = None
    whole: dict[str, Any] = field(default_factory=lambda: WHOLE)
    pieces: dict[str, Any] = field(default_factory=lambda: PIECES)


class Replay(TrainerCallback):
    """Holds each update's gradient against the mean over its rows, with the numbers it drew."""

    def __init__(self) -> None:
        self.seen: list[tuple[torch.Tensor, Any]] = []
        self.errors: list[float] = []

    def before(self, kind: Any) -> Any:
        """Give a class that notes what each loss was computed of."""
        seen = self.seen

        class Notes(kind):  # type: ignore[misc]
            def compute_loss(self, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
                seen.append((torch.get_rng_state(), dict(inputs)))
                return super().compute_loss(model, inputs, *rest, **more)

        self.loss_of = kind.compute_loss
        return Notes

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Forget what came before the update."""
        self.seen.clear()

    def on_pre_optimizer_step(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        """Compute the losses again, and their mean over rows."""
        seen, state = list(self.seen), torch.get_rng_state()
        sizes = [len(next(iter(inputs.values()))) for _, inputs in seen]
        loss = torch.zeros(())
        for size, (random_state, inputs) in zip(sizes, seen, strict=True):
            torch.set_rng_state(random_state)
            loss = loss + size / sum(sizes) * self.loss_of(self.trainer, model, dict(inputs))
        torch.set_rng_state(state)
        trained = [p for p in model.parameters() if p.grad is not None]
        expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, trained)])
        actual = torch.cat([p.grad.reshape(-1) for p in trained])
        self.errors.append(float((actual - expected).norm() / expected.norm()))


@dataclass
class Trained:
    """What a run left behind."""

    trainer: Any
    weights: torch.Tensor
    warnings: list[str]
    replay: Replay

    def distance(self, other: Trained) -> float:
        """Relative to how far the other run moved the weights."""
        return float((self.weights - other.weights).norm() / other.trainer.moved)


def train(program: Program, out: Path, *, by: By, whole: bool = False) -> Trained:
    """Train a program: as it is, or with the mixin before or behind its class."""
    kind, replay = program.trainer, Replay()
    if by == "ours before":
        kind = type(f"Our{kind.__name__}", (GradAccMixin, kind), {})
    elif by == "ours behind":  # as if it had been written as a subclass of ours
        kind = type(f"Our{kind.__name__}", (kind, GradAccTrainer), {})
    replays = program.ours == "drawn" and by != "stock"
    if replays:
        kind = replay.before(kind)
    options = {"train_sampling_strategy": "sequential", "remove_unused_columns": False}
    options |= {"max_steps": NUM_UPDATES, "output_dir": str(out)}
    options |= program.whole if whole else program.pieces
    # Stock collects garbage before each run, which takes longer than the run.
    idle = mock.patch.object(gc, "collect", return_value=0)
    with idle, float64_everywhere(), warnings_of("hf_gradacc") as warnings:
        torch.manual_seed(0)
        model = program.model()
        trainer = kind(
            model=model,
            args=program.arguments(**PLAIN | options | program.options),
            train_dataset=program.rows(),
            data_collator=program.collate,
            **program.more(model),
        )
        if replays:
            replay.trainer = trainer
            trainer.add_callback(replay)
        before = weights_of(trainer.model)
        trainer.train()
    weights = weights_of(trainer.model)
    trainer.moved = float((weights - before).norm())
    assert math.isfinite(trainer.moved)
    assert trainer.moved > 0
    return Trained(trainer, weights, warnings, replay)


def hold(program: Program, out: Path) -> None:
    """Run a program, whole and in pieces, and hold what it claims.

    A trainer that overrides hooks which we override too has the mixin before it, then behind it.
    """
    if program.reference == "stock":
        whole = train(program, out / "whole", by="stock", whole=True)
    else:
        whole = train(program, out / "whole", by="ours before", whole=True)
    stock = train(program, out / "stock", by="stock")
    theirs = stock.distance(whole)
    if program.ours != "drawn":
        assert (theirs > ROUNDING) == (program.stock == "off"), f"stock in pieces: {theirs:.1e}"
    ways: list[By] = (
        ["ours before"] if program.trainer is Trainer else ["ours before", "ours behind"]
    )
    ways: list[By] = ["ours before", "ours behind"]
    for by in ways if _shares_hooks(program.trainer) else ways[:1]:
        ours = train(program, out / by, by=by)
        mine = ours.distance(whole)
        row = f"{by}: {mine:.1e}, stock in pieces {theirs:.1e}; {ours.warnings or 'silent'}"
        assert ours.trainer.state.global_step == whole.trainer.state.global_step
        if program.check is not None:
            program.check(ours.trainer)
        if program.says is not None:
            assert program.says in "\n".join(ours.warnings), row
        else:
            assert not ours.warnings, row
        if program.ours == "drawn":
            assert max(ours.replay.errors) <= ROUNDING, row
        elif program.ours == "exact":
            assert mine <= ROUNDING, row
        elif program.ours == "as stock":
            assert mine <= theirs * 1.001, row


def _shares_hooks(trainer: Any) -> bool:
    """Return whether a program's own classes and the mixin override the same hook."""
    theirs = [cls for cls in trainer.__mro__ if not cls.__module__.startswith("transformers")]
    names = {name for cls in theirs for name in vars(cls)}
    common = {"__init__", "__module__", "__doc__", "compute_loss"}
    return bool((names & set(vars(GradAccMixin))) - common - set(vars(object)))


def cases(programs: dict[str, Program]) -> list[Any]:
    """Return a parameter for each program; those with a fault are expected to fail."""
    return [
        pytest.param(
            program,
            id=name.replace(" ", "-"),
            marks=pytest.mark.xfail(strict=True, reason=program.fault) if program.fault else (),
        )
        for name, program in programs.items()
    ]


def weights_of(model: nn.Module) -> torch.Tensor:
    """All trainable weights as one vector ``[numbers]``."""
    return torch.cat([p.detach().reshape(-1).double() for p in model.parameters()])


@contextlib.contextmanager
def warnings_of(package: str) -> Iterator[list[str]]:
    """Collect what a package warns of, a second time too if it did so already."""
    from transformers.utils import logging as their_logging

    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler, logger = Keep(level=logging.WARNING), logging.getLogger(package)
    level = logger.level
    their_logging.warning_once.cache_clear()
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
