"""The preflight: run the longest rows once, so that memory is known before the run."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_gradacc.safety.out_of_memory import free_memory, is_out_of_memory
from hf_gradacc.trainer.loss.asking import prepared
from hf_gradacc.updates.collator import make_micro_batch
from hf_gradacc.updates.lengths import measure_length
from hf_gradacc.verify.gradients import arguments_for_one_update

__all__ = ["Preflight", "run_preflight"]

# Optimizer state in bytes per byte of trainable weights, by the start of the optimizer's name.
_STATE_PER_WEIGHT = {"adamw": 2.0, "stable_adamw": 2.0, "adafactor": 0.0, "sgd": 0.0, "lion": 1.0}


@dataclass(frozen=True)
class Preflight:
    """What a micro-batch of the longest rows costs.

    Attributes:
        num_sequences: Rows.
        num_tokens: Tokens, padding included.
        longest: Tokens of the longest row.
        seconds: Forward and backward.
        peak_memory_bytes: Most memory in use meanwhile: on an accelerator what torch allocated
            there, on a CPU the whole process.
        optimizer_state_bytes: What the optimizer will add at its first step, None if unknown.
        device: Where it ran.
    """

    num_sequences: int
    num_tokens: int
    longest: int
    seconds: float
    peak_memory_bytes: int
    optimizer_state_bytes: int | None
    device: str

    def __str__(self) -> str:
        state = self.optimizer_state_bytes
        later = "" if state is None else f", {state / 2**30:.2f} GiB more for optimizer state"
        return (
            f"{self.num_sequences:,} x {self.longest:,} tokens on {self.device}: peak "
            f"{self.peak_memory_bytes / 2**30:.2f} GiB{later}; {self.seconds:.2f} s forward and "
            f"backward"
        )


def run_preflight(
    trainer_class: type[Any],
    model: nn.Module,
    rows: list[Any],
    arguments: Any,
    parts: Mapping[str, Any],
) -> tuple[Preflight | None, str]:
    """Run forward and backward of the longest rows as the plan would put them together.

    Unlike the comparison of gradients this trains as the run will: its own dtype, dropout and
    gradient checkpointing.

    Returns:
        The figures, and in plain words what is wrong; None if it ran out of memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        args = arguments_for_one_update(arguments, len(rows), folder)
        args.per_device_train_batch_size = arguments.per_device_train_batch_size
        trainer = trainer_class(model=model, args=args, train_dataset=rows, **parts)
        trainer.get_train_dataloader()  # makes the collator that knows the run's budget
    if args.gradient_checkpointing:
        enable: Any = model.gradient_checkpointing_enable
        enable(args.gradient_checkpointing_kwargs)
    main_input = getattr(model, "main_input_name", "input_ids")
    piece = _longest_micro_batch(trainer.update_collator, rows, main_input)
    longest = measure_length(piece[0], main_input=main_input)
    batch = make_micro_batch(dict(trainer.data_collator(piece)), piece, main_input=main_input)
    num_tokens = batch.num_input_tokens + batch.num_padding_tokens
    device = args.device
    model.train()
    started = time.perf_counter()
    with _Peak(device) as peak:
        try:
            inputs = prepared(trainer, batch.inputs)
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(model, inputs)
            trainer.accelerator.backward(loss)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            failed = False
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            failed = True
    seconds = time.perf_counter() - started
    free_memory(model)
    if failed:
        return None, (
            f"the longest micro-batch, {len(piece):,} rows of up to {longest:,} tokens, does not "
            f"fit on {device}: set max_tokens_per_micro_batch below {num_tokens}"
            + (", cut the longest rows" if len(piece) == 1 else "")
            + " or turn gradient_checkpointing on."
        )
    state = _optimizer_state_bytes(model, str(getattr(arguments.optim, "value", arguments.optim)))
    return (
        Preflight(len(piece), num_tokens, longest, seconds, peak.bytes, state, str(device)),
        "",
    )


def _longest_micro_batch(collator: Any, rows: list[Any], main_input: str) -> list[Any]:
    """The longest rows, as many as the plan's limits let into one micro-batch."""

    def length(row: Any) -> int:
        return measure_length(row, main_input=main_input)

    rows = sorted(rows, key=length, reverse=True)
    most = collator.max_sequences or len(rows)
    if collator.max_tokens is not None:
        most = min(most, collator.max_tokens // max(1, length(rows[0])))
    return rows[: max(1, most)]


def _optimizer_state_bytes(model: nn.Module, optimizer: str) -> int | None:
    trainable = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    for name, ratio in _STATE_PER_WEIGHT.items():
        if optimizer.startswith(name) and "bit" not in optimizer:
            return int(ratio * trainable)
    return None


class _Peak:
    """Measure the most memory in use between enter and exit."""

    bytes = 0

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> _Peak:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with contextlib.suppress(OSError):
                # Linux: makes VmHWM start again from what is in use now.
                Path("/proc/self/clear_refs").write_text("5")
        return self

    def __exit__(self, *exc: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            self.bytes = _resident_peak()


def _resident_peak() -> int:
    """The process's high-water mark of resident memory, in bytes."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(ImportError):  # Windows has no such module
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return 0
