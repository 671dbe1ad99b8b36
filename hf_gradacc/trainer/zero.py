"""The Trainer's DeepSpeed side: the engine steps once per update, after all ranks got through."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer

from hf_gradacc.errors import CheckpointError, ConfigError
from hf_gradacc.ranks.deepspeed import (
    UpdateEngine,
    complete_config,
    count_checkpoint_ranks,
    find_config_problems,
    get_value,
)

__all__ = ["ZeroUpdates"]


class ZeroUpdates(Trainer):
    """Overrides that are only at work under DeepSpeed."""

    _update_engine: UpdateEngine | None = None

    def _find_deepspeed_problems(self) -> Iterator[str]:
        """Yield what is set that would train a wrong gradient, or one that nobody has compared."""
        yield from find_config_problems(
            self._deepspeed_config,
            sums_in_fp32=getattr(self.args, "accumulate_grads_in_fp32", None),
        )
        if self.args.torch_compile:
            yield (
                "torch_compile = True with DeepSpeed was never compared with the gradient of the "
                "whole batch. Leave out one of the two."
            )

    @property
    def _deepspeed_config(self) -> dict[str, Any]:
        config: dict[str, Any] = self.accelerator.state.deepspeed_plugin.deepspeed_config
        return config

    @property
    def _zero_stage(self) -> int:
        return int(get_value(self._deepspeed_config, "zero_optimization.stage"))

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        """Complete DeepSpeed's configuration, and take the engine's step out of its backward."""
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(
                max_steps, train_dataloader, resume_from_checkpoint
            )
        if self.deepspeed is not None:
            raise ConfigError(
                "train() or evaluate() was called before on this trainer, and DeepSpeed cannot "
                "make a second engine from one model. Make a new trainer; with "
                "resume_from_checkpoint it goes on where this one stopped."
            )
        self._check_deepspeed_checkpoint(resume_from_checkpoint)
        complete_config(
            self._deepspeed_config,
            sums_in_fp32=getattr(self.args, "accumulate_grads_in_fp32", None),
            max_grad_norm=self.args.max_grad_norm,
        )
        model, loader = super()._prepare_for_training(
            max_steps, train_dataloader, resume_from_checkpoint
        )
        self._update_engine = UpdateEngine(model)
        self.accelerator.deepspeed_engine_wrapped = self._update_engine
        return model, loader

    def _check_deepspeed_checkpoint(self, folder: str | None) -> None:
        """Refuse a checkpoint that DeepSpeed could not load, before it says so in its own words."""
        if folder is None or get_value(self._deepspeed_config, "checkpoint.load_universal"):
            return
        then, now = count_checkpoint_ranks(folder), self.args.world_size
        if then is None:
            raise CheckpointError(
                f"{Path(folder).name} holds no state of DeepSpeed: it was saved by another engine, "
                f"or with save_only_model.\n  Resume it with that engine; or begin a run with "
                f"these weights: model = {folder!r}, without resume_from_checkpoint."
            )
        if then != now:
            raise CheckpointError(
                f"{Path(folder).name} was saved by {then} ranks and cannot be loaded by {now}: "
                f"DeepSpeed cuts optimizer state by ranks.\n  Resume with {then}; or convert it "
                f"with DeepSpeed's ds_to_universal and set checkpoint.load_universal = true in its "
                f"configuration."
            )

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Leave it to the engine, which clips as it steps."""
        return None if self._update_engine is not None else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Let the engine step: it knows the norm only then, and skips what is not finite."""
        if self._update_engine is None:
            return super()._get_grad_norm(model, grad_norm=grad_norm)
        return self._update_engine.step()
