"""Evaluation that goes on with fewer rows at once where a batch does not fit into memory.

Evaluation loss per target token, whatever the evaluation batch size.

The stock Trainer repeats each batch's mean loss once per sequence and averages, so `eval_loss`
moves with ``per_device_eval_batch_size``. Here it is ``Σ loss·n / Σ n`` over batches and ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_pt_utils import nested_concat
from transformers.utils import logging

from hf_gradacc.loss.facts import LossFacts
from hf_gradacc.loss.probe_rows import copies_in
from hf_gradacc.ranks.collectives import sum_over_ranks
from hf_gradacc.safety.out_of_memory import (
    free_memory,
    is_out_of_memory,
    single_row_error,
    words_of,
)
from hf_gradacc.updates.batch import count_rows, slice_rows
from hf_gradacc.updates.collator import make_micro_batch
from hf_gradacc.updates.lengths import measure_length

__all__ = ["EvalLoss", "SplitEvaluation", "perplexity"]

logger = logging.get_logger(__name__)


class SplitEvaluation(Trainer):
    """Runs an evaluation batch in pieces if it must; losses and predictions stay the same."""

    _facts: LossFacts | None = None
    _eval_rows: int | None = None  # sequences that are known to fit, None for all of them
    _rows_per_sequence = 1

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """Run the stock step, after an allocator gave up on fewer rows at a time."""
        step = super().prediction_step
        while True:
            copies = self._rows_per_sequence
            num_rows = count_rows(inputs) // copies if isinstance(inputs, Mapping) else 0
            size = min(num_rows, self._eval_rows or num_rows)
            parts = [inputs]
            if size < num_rows:
                parts = [
                    slice_rows(inputs, range(start, min(start + size, num_rows)), copies=copies)
                    for start in range(0, num_rows, size)
                ]
            try:
                results = [step(model, part, prediction_loss_only, ignore_keys) for part in parts]
                return results[0] if len(results) == 1 else self._join(parts, results)
            except Exception as error:
                if not self._may_split(error, num_rows):
                    raise
                if self._eval_rows is None:
                    # Preferences lie in blocks, chosen rows before rejected ones.
                    loader = self.callback_handler.eval_dataloader
                    self._rows_per_sequence = copies = copies_in(loader)
                    num_rows, size = num_rows // copies, size // copies
                if copies > 1 and not prediction_loss_only:
                    raise  # what such a trainer predicts has no row of its own to go to
                said = words_of(error)
            results = []
            free_memory()
            if size <= 1:
                length = max(
                    measure_length({"input_ids": row}) for row in inputs.get("input_ids", [[0]])
                )
                raise single_row_error(
                    length=length, row=None, tried=[], said=said, evaluation=True
                )
            self._eval_rows = max(1, size // 2)
            logger.warning(
                f"evaluation ran out of memory on {size} rows: it goes on with {self._eval_rows} "
                f"at a time. The results are the same; per_device_eval_batch_size = "
                f"{self._eval_rows} would spare the attempt."
            )

    def _may_split(self, error: Exception, num_rows: int) -> bool:
        """Say whether fewer rows may help and other ranks are not waiting inside the forward."""
        return (
            num_rows > 0
            and bool(getattr(self.args, "recover_from_out_of_memory", True))
            and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
            and is_out_of_memory(error)
        )

    def _join(self, parts: list[Any], results: list[Any]) -> tuple[Any, Any, Any]:
        """Put the pieces' results together: the loss per target, predictions row by row."""
        losses = [loss for loss, _, _ in results]
        loss: Tensor | None = None
        if losses[0] is not None:
            counts = [self._count_targets(part) for part in parts]
            total = sum(counts)
            # A piece without a target has a loss of NaN and no weight.
            weighted = [a * (n / total) for a, n in zip(losses, counts, strict=True) if n]
            loss = sum(weighted[1:], start=weighted[0]) if weighted else losses[0]
        joined = [results[0][1], results[0][2]]
        for _, *more in results[1:]:
            for i, tensors in enumerate(more):
                if tensors is not None:
                    joined[i] = nested_concat(joined[i], tensors, padding_index=-100)
        return loss, joined[0], joined[1]

    def _count_targets(self, part: Any) -> int:
        micro_batch = make_micro_batch(part, copies=self._rows_per_sequence)
        if self._facts is None:
            return micro_batch.num_sequences
        return micro_batch.targets.under(self._facts.rule)


class EvalLoss:
    """Running sum of losses weighted by targets.

    >>> total = EvalLoss()
    >>> total.add(torch.tensor(2.0), num_targets=1)
    >>> total.add(torch.tensor(1.0), num_targets=3)
    >>> total.mean(torch.device("cpu"))
    1.25
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._num_targets = 0

    def add(self, loss: Tensor, *, num_targets: int) -> None:
        """Take in one batch's mean loss. The sum stays on the device: no synchronization."""
        if num_targets == 0:
            return  # the mean over nothing is NaN
        # CPU and CUDA have float64; MPS has not.
        dtype = torch.float32 if loss.device.type == "mps" else torch.float64
        weighted = loss.detach().to(dtype) * num_targets
        self._sum = weighted if self._sum is None else self._sum + weighted
        self._num_targets += num_targets

    def mean(self, device: torch.device) -> float | None:
        """Give the loss per target over all ranks, None if there was no target."""
        local = 0.0 if self._sum is None else float(self._sum)
        dtype = torch.float32 if device.type == "mps" else torch.float64
        total = sum_over_ranks(
            torch.tensor([local, float(self._num_targets)], dtype=dtype), device=device
        )
        return float(total[0] / total[1]) if total[1] > 0 else None


def perplexity(loss: float) -> float:
    """``exp(loss)``, infinite where that overflows.

    >>> perplexity(0.0)
    1.0
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
