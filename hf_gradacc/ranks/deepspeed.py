"""DeepSpeed ZeRO: one step of the engine for each update, however many backwards it took.

DeepSpeed's engine owns gradients, clipping, the loss scale and the optimizer. By default
it counts micro-batches to find the end of an update, and accelerate makes it step inside the last
backward. Here we tell the engine which backward is the last, and it steps after all ranks have
reported success.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from torch import Tensor, nn

from hf_gradacc.compat import zero3_divides_by_all_ranks
from hf_gradacc.errors import CheckpointError, ConfigError
from hf_gradacc.ranks.engine import Engine
from hf_gradacc.ranks.layout import RankLayout
from hf_gradacc.ranks.sequence_parallel import any_batch_size, begin_anew

__all__ = [
    "DeepSpeed",
    "UpdateEngine",
    "complete_config",
    "count_checkpoint_ranks",
    "find_config_problems",
    "get_value",
]

# Settings that change a gradient or its rows, or that were never compared with the whole batch.
_REFUSED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("gradient_allreduce_op", lambda v: str(v).lower() == "sum", "adds up what is a mean here"),
    ("managed_gradient_accumulation", lambda v: v is False, "accelerate cannot drive"),
    ("zero_optimization.zenflow", bool, "delays part of the gradient to later updates"),
    ("zero_optimization.zero_quantized_gradients", bool, "rounds gradients to a few bits"),
    ("zero_optimization.compute_grad_norm", lambda v: v is False, "hides a NaN gradient"),
    ("bf16.check_grad_overflow", lambda v: v is False, "lets a NaN gradient reach the weights"),
    ("curriculum_learning.enabled", bool, "cuts rows off"),
    ("data_efficiency.enabled", bool, "leaves out rows, or tokens of some layers"),
    ("progressive_layer_drop.enabled", bool, "leaves out layers at random"),
    ("compression_training", bool, "changes weights between updates"),
    ("hybrid_engine.enabled", bool, "was never compared with the gradient of the whole batch"),
    ("torch_autocast.enabled", bool, "was never compared with the gradient of the whole batch"),
    ("sparse_gradients", bool, "was never compared with the gradient of the whole batch"),
)


_COMPRESSING_OPTIMIZERS = {"onebitadam", "zerooneadam", "onebitlamb"}


def get_value(config: Mapping[str, Any], key: str) -> Any:
    """Look up a dotted key.

    >>> get_value({"zero_optimization": {"stage": 3}}, "zero_optimization.stage")
    3
    """
    value: Any = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


class DeepSpeed(Engine):
    """ZeRO 1, 2 and 3. The engine steps when the Trainer asks for the norm, see `grad_norm`."""

    lockstep = True
    splits_rows_by = "sp_size"

    def __init__(self, accelerator: Any, args: Any, layout: RankLayout | None = None) -> None:
        super().__init__(accelerator, args, layout)
        self._updates: UpdateEngine | None = None

    @property
    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = self.accelerator.state.deepspeed_plugin.deepspeed_config
        return config

    @property
    def shards_weights(self) -> bool:  # type: ignore[override]
        """Whether weights are sharded: by ZeRO-3 they are; ZeRO-1 and 2 shard only other state."""
        return int(get_value(self._config, "zero_optimization.stage")) == 3

    @property
    def factor(self) -> int:
        """The factor for a loss: the engine divides gradients by it."""
        is_split = self.layout.sp_size > 1
        if is_split and self.shards_weights and zero3_divides_by_all_ranks():
            return self.world_size
        return self.layout.num_replicas

    @property
    def searches_loss_scale(self) -> bool:
        """Whether an overflow may come from a loss scale that is still being searched."""
        return self._updates is not None and self._updates.searches_loss_scale

    def find_problems(self) -> Iterator[str]:
        """Yield settings that train a wrong gradient, or one that was never compared."""
        yield from find_config_problems(
            self._config, sums_in_fp32=self.args.accumulate_grads_in_fp32
        )
        scatters = get_value(self._config, "zero_optimization.reduce_scatter")
        if self.layout.sp_size > 1 and self.shards_weights and scatters is False:
            yield (
                f"sp_size = {self.layout.sp_size} with zero_optimization.reduce_scatter = False: "
                f"ZeRO-3 then divides gradients of small weights and of large ones by different "
                f"numbers. Leave reduce_scatter out."
            )
        if self.args.torch_compile:
            yield (
                "torch_compile = True with DeepSpeed was never compared with the gradient of the "
                "whole batch. Leave out one of the two."
            )

    def before_wrapping(self, checkpoint: str | None, *, is_wrapped: bool) -> None:
        """Check the checkpoint, and complete DeepSpeed's configuration."""
        if is_wrapped:
            raise ConfigError(
                "train() or evaluate() was called before on this trainer, and DeepSpeed cannot "
                "make a second engine from one model. Make a new trainer; with "
                "resume_from_checkpoint it goes on where this one stopped."
            )
        self._check_checkpoint(checkpoint)
        if self.layout.sp_size > 1:
            begin_anew()
            any_batch_size()
            # The ranks of a replica load the same rows here: none has to send its own to others.
            self.accelerator.deepspeed_ulysses_dl_adapter = lambda loader, model: loader
        complete_config(
            self._config,
            sums_in_fp32=self.args.accumulate_grads_in_fp32,
            max_grad_norm=self.args.max_grad_norm,
        )

    def _check_checkpoint(self, folder: str | None) -> None:
        """Refuse a checkpoint that DeepSpeed cannot load, with a clearer error than its own."""
        if folder is None or get_value(self._config, "checkpoint.load_universal"):
            return
        then, now = count_checkpoint_ranks(folder), self.world_size
        if then is None:
            raise CheckpointError(
                f"{Path(folder).name} holds no state of DeepSpeed: it was saved by another engine, "
                f"or with save_only_model.\n  Resume it with that engine; or begin a run with "
                f"these weights: model = {folder!r}, without resume_from_checkpoint."
            )
        if then != now:
            raise CheckpointError(
                f"{Path(folder).name} was saved by {then} ranks and cannot be loaded by {now}: "
                f"DeepSpeed splits optimizer state by rank.\n  Resume with {then}; or convert it "
                f"with DeepSpeed's ds_to_universal and set checkpoint.load_universal = true in its "
                f"configuration."
            )

    def after_wrapping(self, model: nn.Module, *, has_own_step: bool = False) -> None:
        """Keep the engine from stepping inside a backward."""
        super().after_wrapping(model, has_own_step=has_own_step)
        self._updates = UpdateEngine(model)
        self.accelerator.deepspeed_engine_wrapped = self._updates

    def hold_gradients(
        self, model: nn.Module, *, is_last: bool
    ) -> contextlib.AbstractContextManager[Any]:
        """Tell the engine which backward is the update's last."""
        assert self._updates is not None
        self._updates.reduces_now = is_last
        return contextlib.nullcontext()

    def clip(self, model: nn.Module, stock_clip: Callable[[nn.Module], Any]) -> Any:
        """Do nothing: the engine clips when it steps."""
        return None

    def grad_norm(
        self, model: nn.Module, norm: Any, stock_norm: Callable[[nn.Module, Any], Any]
    ) -> Any:
        """Let the engine step, since only then it knows the norm. It skips what is not finite."""
        assert self._updates is not None
        return self._updates.step()


def find_config_problems(config: Mapping[str, Any], *, sums_in_fp32: bool | None) -> Iterator[str]:
    """Yield settings that train another gradient than that of the whole batch.

    Args:
        config: DeepSpeed's configuration.
        sums_in_fp32: ``accumulate_grads_in_fp32``.

    >>> for problem in find_config_problems({"zero_optimization": {"stage": 0}},
    ...                                     sums_in_fp32=None):
    ...     print(problem)
    deepspeed: zero_optimization.stage = 0 shards nothing: leave out deepspeed (that is DDP), or set
      stage = 1, 2 or 3.
    """
    stage = get_value(config, "zero_optimization.stage")
    if stage not in (1, 2, 3):
        yield (
            f"deepspeed: zero_optimization.stage = {stage} shards nothing: leave out deepspeed "
            f"(that is DDP), or set stage = 1, 2 or 3."
        )
    for key, is_set, what in _REFUSED:
        value = get_value(config, key)
        if value is not None and is_set(value):
            shown = "{...}" if isinstance(value, Mapping) else repr(value)
            yield f"deepspeed: {key} = {shown} {what}. Leave it out."
    optimizer = get_value(config, "optimizer.type")
    if str(optimizer).lower() in _COMPRESSING_OPTIMIZERS:
        yield (
            f"deepspeed: optimizer.type = {optimizer!r} compresses gradients between ranks, so "
            f"they are not those of the whole batch. Use AdamW."
        )
    dtype = get_value(config, "data_types.grad_accum_dtype")
    if sums_in_fp32 and dtype is not None and str(dtype) not in ("fp32", "float32", "float"):
        yield (
            f"accumulate_grads_in_fp32 = True contradicts deepspeed: data_types.grad_accum_dtype = "
            f"{dtype!r}. Leave one of them out."
        )


def complete_config(
    config: dict[str, Any], *, sums_in_fp32: bool | None, max_grad_norm: float | None
) -> None:
    """Fill what DeepSpeed's configuration leaves open from the arguments.

    The engine clips, and sums in the dtype of the weights, by its own configuration alone. The
    Trainer fills in `max_grad_norm` only if that configuration says "auto".

    Args:
        config: DeepSpeed's configuration, changed in place.
        sums_in_fp32: ``accumulate_grads_in_fp32``; None means yes for bf16 and fp16 weights.
        max_grad_norm: The norm to clip to.

    >>> config = {"bf16": {"enabled": True}}
    >>> complete_config(config, sums_in_fp32=None, max_grad_norm=1.0)
    >>> config["gradient_clipping"], config["data_types"]
    (1.0, {'grad_accum_dtype': 'fp32'})
    """
    config.setdefault("gradient_clipping", float(max_grad_norm or 0.0))
    half = any(get_value(config, f"{name}.enabled") is True for name in ("bf16", "fp16"))
    if half and sums_in_fp32 is not False:
        config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")


class UpdateEngine(DeepSpeedEngineWrapper):  # type: ignore[misc, unused-ignore]
    """Replaces accelerate's wrapper, which would step in every backward that syncs.

    Attributes:
        reduces_now: Whether the coming backward is the update's last. ZeRO-1 reduces gradients in
            that one alone; ZeRO-2 and 3 reduce in each, because no rank keeps whole gradients.
    """

    reduces_now = True

    def backward(self, loss: Tensor, sync_gradients: bool = True, **kwargs: Any) -> None:
        """Add a micro-batch's gradient to the update's, without a step."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=self.reduces_now)
        # The engine checks gradients only, and an infinite loss can have finite ones. Times NaN
        # they become NaN, after the reduction on all ranks. No rank has to wait for a check.
        bad = ~torch.isfinite(loss.detach())
        self.engine.backward(loss * torch.ones_like(loss).masked_fill(bad, torch.nan), **kwargs)

    def step(self) -> float | None:
        """Clip, and let the optimizer step unless the gradient is not finite.

        Returns:
            The norm of the update's gradient before clipping; infinite if it is not finite.
        """
        self.engine.step()
        if not self.engine.fp16_enabled():
            # After an overflow the stock Trainer does not step the schedule. That is right while a
            # loss scale is searched; an update skipped for its NaN must count in the schedule.
            self.engine.optimizer.overflow = False
        norm: float | None = self.get_global_grad_norm()
        return norm

    @property
    def searches_loss_scale(self) -> bool:
        """Whether an overflow may come from a loss scale that is still being searched."""
        return bool(self.engine.fp16_enabled() and self.engine.dynamic_loss_scale())


def count_checkpoint_ranks(folder: str | Path) -> int | None:
    """Count the ranks that wrote a checkpoint's optimizer state; None if DeepSpeed wrote none."""
    tag = Path(folder) / "latest"
    if not tag.is_file():
        return None
    names = (p.name for p in (Path(folder) / tag.read_text().strip()).glob("*_optim_states.pt"))
    return len({m[1] for name in names if (m := re.search(r"zero_pp_rank_(\d+)_", name))}) or None
