"""Decide how bfloat16 and float16 weights are stepped, and carry it from checkpoint to checkpoint.

`safety.low_precision` takes the steps; here is when: which weights, which optimizers, how much
memory, and what a checkpoint must hold.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter
from transformers.utils import logging

from hf_gradacc.arguments import LowPrecisionMode
from hf_gradacc.errors import ConfigError
from hf_gradacc.ranks.collectives import largest_over_ranks
from hf_gradacc.safety.lost_step import measure_lost_share
from hf_gradacc.safety.low_precision import (
    LowPrecisionUpdates,
    Rounding,
    choose_rounding,
    state_values,
)
from hf_gradacc.safety.precision import is_low_precision, low_precision_parameters
from hf_gradacc.text import byte_size
from hf_gradacc.tracking.install import record_event

__all__ = ["MASTERS_NAME", "OptimizerSteps"]

logger = logging.get_logger(__name__)

MASTERS_NAME = "master_weights.safetensors"
"""File of a checkpoint with the float32 values of weights whose rounded ones are the model's."""

_LOST_SHARE_TO_TELL = 0.1


class OptimizerSteps:
    """How the optimizer of a run steps on weights of low precision.

    Attributes:
        rounding: What becomes of a step; "plain" also where there are no such weights.
        lost_share: With "plain", the share of a step that rounding loses; None until measured.
    """

    def __init__(self) -> None:
        self.rounding: Rounding = "plain"
        self.lost_share: float | None = None
        self._optimizer: Any = None
        self._updates: LowPrecisionUpdates | None = None
        self._measuring: Any = None

    @property
    def takes_float32(self) -> bool:
        """Whether the optimizer is given float32 gradients of low-precision weights."""
        return self._updates is not None

    @property
    def masters(self) -> dict[str, Tensor]:
        """The float32 values that weights are rounded from, by name."""
        return {} if self._updates is None else self._updates.masters()

    def begin(self, trainer: Any) -> None:
        """Look at the optimizer that the run has made; the same one goes on as before.

        Raises:
            ConfigError: If what ``low_precision_updates`` asks for cannot be done.
        """
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        if optimizer is self._optimizer:
            return
        self._end()
        self._optimizer = optimizer
        weights = _weights_of(trainer, optimizer)
        self.rounding = _choose(trainer, optimizer, weights)
        if not weights:
            return
        if self.rounding == "plain":
            self._measuring = optimizer.register_step_pre_hook(
                lambda *_: self._measure(trainer, list(weights.values()))
            )
            return
        self._updates = LowPrecisionUpdates(
            optimizer,
            weights,
            keeps_masters=self.rounding == "master",
            seed=lambda: trainer.args.seed * 1_000_003 + trainer.state.global_step,
        )

    @contextlib.contextmanager
    def undoing_failed_step(self) -> Iterator[None]:
        """Leave no weight in float32 when an error inside a step ends the run."""
        try:
            yield
        finally:
            if self._updates is not None:
                self._updates.undo()

    def _end(self) -> None:
        if self._updates is not None:
            self._updates.detach()
        if self._measuring is not None:
            self._measuring.remove()
        self.rounding, self._updates, self._measuring, self.lost_share = "plain", None, None, None

    @contextlib.contextmanager
    def loading(self, trainer: Any, checkpoint: str | None) -> Iterator[None]:
        """Load master weights, and let the optimizer's state be loaded in the type it has here."""
        if checkpoint is None or trainer.optimizer is None:
            yield
            return
        self.begin(trainer)
        file = Path(checkpoint, MASTERS_NAME)
        if self._updates is None:
            if file.is_file():
                logger.warning(
                    f"{Path(checkpoint).name} holds float32 master weights, and this run has none "
                    f"(low_precision_updates = {trainer.args.low_precision_updates!r}): it goes on "
                    f"from the rounded ones."
                )
            yield
            return
        if self.rounding == "master":
            if file.is_file():
                self._updates.load_masters(load_file(file))
            else:
                logger.warning(
                    f"{Path(checkpoint).name} holds no float32 master weights: they begin at its "
                    f"rounded weights."
                )
        with self._updates.widened():
            yield

    def save(self, args: Any, output_dir: str) -> None:
        """Write the master weights into a checkpoint."""
        masters = self.masters if args.should_save else {}
        if masters:
            whole = {name: master.contiguous() for name, master in masters.items()}
            save_file(whole, Path(output_dir, MASTERS_NAME))

    def _measure(self, trainer: Any, weights: list[Parameter]) -> None:
        """Measure what a step loses, once: when the learning rate has reached half of its height.

        A schedule begins at zero where it warms up, and there rounding loses everything.
        """
        groups = self._optimizer.param_groups
        if any(group["lr"] < 0.5 * group.get("initial_lr", group["lr"]) for group in groups):
            return
        self._measuring.remove()
        share = self.lost_share = measure_lost_share(self._optimizer, weights)
        if share is None or share <= _LOST_SHARE_TO_TELL:
            return
        kind = str(weights[0].dtype).removeprefix("torch.")
        text = (
            f"rounding to {kind} weights loses {share:.0%} of the optimizer's step at a learning "
            f"rate of {max(float(group['lr']) for group in groups):.3g}: most weights stay where "
            f"they are. low_precision_updates = 'master' keeps float32 values of them, for "
            f"{byte_size(_extra_bytes(trainer.args, weights))} more; 'stochastic' rounds at "
            f"random; or load the model in float32 and set bf16 = True."
        )
        logger.warning(text)
        record_event(trainer, "step_rounded_away", text=text, lost_share=share)


def _weights_of(trainer: Any, optimizer: Any) -> dict[str, Parameter]:
    """Return the low-precision weights that an optimizer of torch's own kind trains, by name."""
    if trainer.is_deepspeed_enabled:
        return {}  # it keeps float32 weights itself
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    low = {id(p) for p in low_precision_parameters(trainer.model.parameters())}
    named = trainer.model.named_parameters()
    return {name: p for name, p in named if id(p) in low and id(p) in trained}


def _choose(trainer: Any, optimizer: Any, weights: dict[str, Parameter]) -> Rounding:
    """Choose how weights are stepped, the same on all ranks."""
    asked: LowPrecisionMode = trainer.args.low_precision_updates
    if asked == "plain":
        return "plain"
    if trainer.is_deepspeed_enabled:
        if asked != "auto":
            logger.warning_once(
                f"low_precision_updates = {asked!r}: DeepSpeed steps on float32 weights of its own "
                f"and rounds them, so nothing is done here."
            )
        return "plain"
    if problem := _find_obstacle(trainer, optimizer, weights):
        if asked != "auto":
            raise ConfigError(f"low_precision_updates = {asked!r}: {problem}")
        logger.warning_once(f"the optimizer steps on low-precision weights as they are: {problem}")
        return "plain"
    if not weights:
        return "plain"
    if asked != "auto":
        return asked
    free = _free_bytes(trainer.args)
    smallest = -largest_over_ranks(-(-1 if free is None else free), device=trainer.args.device)
    rounding = choose_rounding(
        num_weights=sum(p.numel() for p in weights.values()),
        optimizer=str(getattr(trainer.args.optim, "value", trainer.args.optim)),
        free_bytes=None if smallest < 0 else smallest,
    )
    if rounding == "master":
        extra = byte_size(_extra_bytes(trainer.args, list(weights.values())))
        logger.warning_once(
            f"low_precision_updates = 'auto': the optimizer steps on float32 values of the "
            f"low-precision weights, which takes {extra} more than stepping on these ('plain')."
        )
    return rounding


def _find_obstacle(trainer: Any, optimizer: Any, weights: dict[str, Parameter]) -> str | None:
    """Say why an optimizer cannot be given float32 weights; None if it can."""
    if any(is_low_precision(p) and hasattr(p, "device_mesh") for p in trainer.model.parameters()):
        return (
            "they are split between ranks. Load the model in float32 and set bf16 = True: each "
            "rank then keeps float32 parts, and computes in bfloat16."
        )
    if not weights:
        return None
    kind = type(optimizer).__name__
    if not hasattr(optimizer, "register_step_pre_hook"):
        return f"{kind} is no torch.optim.Optimizer. Load the model in float32 and set bf16 = True."
    if callable(getattr(optimizer, "eval", None)):
        return (
            f"{kind} exchanges the weights itself, for evaluation. Load the model in float32 and "
            f"set bf16 = True."
        )
    return None


def _free_bytes(args: Any) -> int | None:
    """Return the memory this rank may still take on its device; None if nobody can tell."""
    if args.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(args.device)
        kept = torch.cuda.memory_reserved(args.device) - torch.cuda.memory_allocated(args.device)
        return free + kept
    if args.device.type != "cpu":
        return None
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size))
    return int(psutil.virtual_memory().available) // ranks_here


def _extra_bytes(args: Any, weights: list[Parameter]) -> int:
    """Return what master weights take beyond a plain step: they, and a float32 optimizer state."""
    name = str(getattr(args.optim, "value", args.optim))
    states = 0 if "8bit" in name else state_values(name)
    return sum(p.numel() * (4 + 2 * states) for p in weights)
