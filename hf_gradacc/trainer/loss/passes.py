"""Updates in two passes: gather what couples their rows, then run each micro-batch knowing it.

The first pass runs the forwards of the second, without gradients: laid out alike, in the same
order, and with the same random numbers. It begins each micro-batch from a seed of its own, so that
a forward that is ended early does not shift the draws of the next.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_gradacc.loss.asking.answers import copied
from hf_gradacc.loss.coupling import Coupling, Exchange, ForwardEnded
from hf_gradacc.ranks.collectives import gather_objects, sum_over_ranks
from hf_gradacc.ranks.engine import Engine
from hf_gradacc.safety.rollback import AttributeState
from hf_gradacc.trainer.loss.asking import prepared, quietly
from hf_gradacc.trainer.step import MicroBatchStep
from hf_gradacc.updates.draws.randomness import seeds_of
from hf_gradacc.updates.update import MicroBatch

__all__ = ["TwoPasses", "make_exchange"]


class TwoPasses:
    """Runs the first pass over an update, and holds what it gathered for the second.

    Args:
        coupling: What couples the rows.
        step: Lays out the micro-batches.
        engine: How the ranks work together.
    """

    def __init__(self, coupling: Coupling, step: MicroBatchStep, engine: Engine) -> None:
        self.coupling = coupling
        self._step = step
        self._engine = engine
        self._seed = 0
        self._num_applied = 0

    def gather(
        self,
        trainer: Any,
        model: nn.Module,
        micro_batches: Sequence[MicroBatch],
        counts: Any,
        tell: Callable[[MicroBatch], None],
    ) -> None:
        """Run the first pass on this rank. No rank waits for another, unless forwards do.

        Args:
            trainer: The trainer.
            model: The wrapped model.
            micro_batches: Those of the attempt.
            counts: What to pass as ``num_items_in_batch`` of each; None to pass none.
            tell: Called with each micro-batch before it runs.
        """
        self._seed = int(torch.randint(2**62, ()))
        self._num_applied = 0
        self.coupling.begin()
        forward = partial(_forward_only, trainer)
        index = 0
        with _without_trace(trainer, model):
            for i, micro_batch in enumerate(micro_batches):
                count = None if counts is None else counts[i]
                watching: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
                if not micro_batch.weightless:
                    self._seed_draws(index)
                    index += 1
                    may_end = not self._engine.lockstep
                    watching = self.coupling.gathering(micro_batch, may_end=may_end)
                elif not self._engine.lockstep:
                    continue
                tell(micro_batch)
                self._step.begin(1.0, micro_batch)
                with contextlib.suppress(ForwardEnded), watching:
                    # A copy, since a forward may write into its inputs (FSMT does, into labels).
                    inputs, device = copied(micro_batch.inputs), trainer.args.device
                    self._step.run(forward, model, inputs, count, device=device)

    def couple(self, trainer: Any, model: nn.Module) -> None:
        """Put together what all ranks have gathered. Every rank calls it."""
        with torch.enable_grad(), _without_trace(trainer, model):
            self.coupling.couple(make_exchange(self._engine))

    @contextlib.contextmanager
    def second(self, trainer: Any, micro_batch: MicroBatch, *, divisor: float) -> Iterator[None]:
        """Run the stock step on the next micro-batch inside.

        Args:
            trainer: The trainer.
            micro_batch: The next one.
            divisor: What its loss is divided by.
        """
        if micro_batch.weightless:
            yield
            return
        index, self._num_applied = self._num_applied, self._num_applied + 1
        self._seed_draws(index)
        settler = trainer._loss_settler
        settler.coupling = self.coupling
        try:
            with self.coupling.applying(index, scale=divisor * self._engine.factor):
                yield
        finally:
            settler.coupling = None

    def _seed_draws(self, index: int) -> None:
        (seed,) = seeds_of(self._seed, index)
        torch.manual_seed(seed)  # of all devices
        np.random.seed(seed % 2**32)
        random.seed(seed)


def make_exchange(engine: Engine) -> Exchange:
    """Return how the ranks of an engine put together what they have gathered."""
    layout, device = engine.layout, engine.args.device

    def add_up(tensor: Tensor) -> Tensor:
        own = layout.once(tensor) if layout.ranks_per_replica > 1 else tensor
        return sum_over_ranks(own, device=device).to(tensor.device)

    def gather(own: Any) -> list[Any]:
        return gather_objects(own)[:: layout.ranks_per_replica]

    if engine.world_size == 1:
        return Exchange()
    return Exchange(add_up, gather, layout.replica)


@contextlib.contextmanager
def _without_trace(trainer: Any, model: nn.Module) -> Iterator[None]:
    """Leave no metric, no log row and no attribute behind."""
    attributes = AttributeState([trainer, *model.modules()], leave_out={*vars(nn.Module())})
    try:
        with quietly(trainer):
            yield
    finally:
        attributes.restore()


def _forward_only(trainer: Any, model: nn.Module, inputs: Any, count: Any) -> Tensor:
    """Stand in for the stock step in the first pass."""
    model.train()
    with torch.no_grad(), trainer.compute_loss_context_manager():
        loss: Tensor = trainer.compute_loss(
            model, prepared(trainer, inputs), num_items_in_batch=count
        )
    return loss
